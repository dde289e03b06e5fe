"""The table of NAS-Bench-201 and the benchmark on it, with a made-up table: the real one is not shipped."""

import csv
import json
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import worker_processes
from nas.data import nats_bench
from nas.data.nats_bench import COLUMNS, OPTIMA, Table, all_cells, size
from nas.space import drawing
from worker_processes import Done, Job

ALL_3X3 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
ONE_1X1 = "|none~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|none~2|"


def made_up_rows():
    """Accuracies that grow with the number of parameters and have ties; the best are the published optima."""
    cells = list(all_cells())
    sizes = np.array([size(cell) for cell in cells])
    noise = np.random.default_rng(0).integers(20, size=len(cells))
    cifar10 = 10 + sizes + noise / 10
    cifar10[cells.index(ALL_3X3)] = OPTIMA[0]
    columns = [cifar10, cifar10 * OPTIMA[1] / OPTIMA[0], cifar10 * OPTIMA[2] / OPTIMA[0]]
    return [f"{a:.4f},{b:.4f},{c:.4f},{cell},x" for a, b, c, cell in zip(*columns, cells)]


@pytest.fixture(scope="module")
def lines():
    return [",".join((*COLUMNS, "UniqueString")), *made_up_rows()]


@pytest.fixture(scope="module")
def table_file(lines, tmp_path_factory):
    file = tmp_path_factory.mktemp("table") / "table.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def table(table_file):
    return Table.read(table_file)


def test_a_cell_has_a_rank_and_two_percentiles(table):
    best = table.place(ALL_3X3)
    assert (best.cifar10, best.rank, best.percentile) == (OPTIMA[0], 1, 100 / 15625)
    assert (best.same_size, best.size_percentile) == (1, 50.0), "a cell that is alone has no better and no worse"
    places = [table.place(cell) for cell in table.architectures if size(cell) == size(ONE_1X1)]
    assert len(places) == 6 * 3**5 == table.place(ONE_1X1).same_size
    assert np.mean([p.size_percentile for p in places]) == pytest.approx(50)
    equal = [p for p in places if p.cifar10 == places[0].cifar10]
    assert len({(p.rank, p.size_percentile) for p in equal}) == 1 and len(equal) > 1
    assert places[0].rank == 1 + sum(table.cifar10 > places[0].cifar10)


def test_a_cell_is_looked_up_as_object_too(table):
    class Cell:
        def to_string(self):
            return ONE_1X1

    assert table.place(Cell()) == table.place(ONE_1X1)
    with pytest.raises(ValueError, match=r"cell must be one of the 15 625 cells of NAS-Bench-201, got 'DARTS_V2'"):
        table.place("DARTS_V2")


def changed(lines, number, old, new):
    return [line.replace(old, new) if i == number else line for i, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], r"must have all 15 625 cells, got 15 624; \|avg_pool_3x3~0\|.* is missing"),
        (lambda lines: [*lines, lines[7]], r"line 15627: \|none~0\|.* appears twice"),
        (lambda lines: changed(lines, 0, COLUMNS[1], "Accuracy"), r"line 1 must name the columns .*: CIFAR100.* is missing"),
        (lambda lines: changed(lines, 3, lines[3][:5], "nan"), r"line 4: CIFAR10.* must be a number in \[0, 100\], got 'nan"),
        (lambda lines: changed(lines, 3, lines[3][:5], "x"), r"line 4: CIFAR10.* must be a number in \[0, 100\], got 'x"),
        (lambda lines: changed(lines, 2, "none~0|+", "zero~0|+"), r"line 3: ArchitectureString must be a cell such as \|none"),
        (lambda lines: [lines[0]], r"must have all 15 625 cells, got 0"),
        (lambda lines: [], r"line 1 must name the columns .*, got none"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(change, message, lines, tmp_path):
    file = tmp_path / "wrong.csv"
    file.write_text("\n".join(change(lines)))
    with pytest.raises(ValueError, match=r"wrong.csv.*" + message):
        Table.read(file)


def test_a_table_of_another_export_is_refused(lines, tmp_path):
    file = tmp_path / "other.csv"
    file.write_text("\n".join(line.replace(f"{OPTIMA[0]:.4f}", "93.1") for line in lines))
    with pytest.raises(ValueError, match=r"best accuracy on cifar10 must be the published one, 94.37 %, got 93.10 %"):
        Table.read(file)


def test_a_missing_table_names_where_users_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none.csv .*nats_bench of its authors"):
        Table.read(tmp_path / "none.csv")
    assert nats_bench.COLUMNS[0] in nats_bench.HOW_TO_GET


# -- the benchmark, whose searches run in this process ------------------------------------------------------

TINY = ("--set", "channels=2", "layers=3", "epochs=1", "epoch_steps=2", "images=64", "batch=8", "valid_images=8")


@pytest.fixture
def bench(monkeypatch, no_pictures):
    """The benchmark without processes: searches run here, one after the other, and each takes 3 CPU seconds."""
    import nas_bench_201

    def here(jobs, workers):
        for job in jobs:
            yield job, Done(job.function(*job.arguments), "", 3.0, 4.0)

    monkeypatch.setattr(nas_bench_201, "run", here)
    monkeypatch.setattr(drawing, "save", lambda figure, *files: drawing.plt.close(figure))
    return nas_bench_201


@pytest.fixture
def command(table_file, images, tmp_path):
    return ["--table", str(table_file), "--data-dir", str(images), "--out", str(tmp_path / "out"), *TINY]


def rows_of(file):
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_methods_search_and_are_summarised(bench, command, tmp_path, table, capsys, monkeypatch):
    methods = ["--methods", "hapg", "ista", "gsparsity", "darts_second"]
    assert bench.main([*command, *methods, "--seeds", "0"]) == 0
    rows = rows_of(tmp_path / "out" / "runs.csv")
    assert [row["key"] for row in rows] == ["hapg-published", "hapg-sound", "ista", "gsparsity", "darts_second"]
    for row in rows:
        place = table.place(row["architecture"])
        assert (int(row["rank"]), row["cpu_seconds"]) == (place.rank, "3.0")
        found = json.loads((tmp_path / "out" / row["key"] / "seed-0" / "result.json").read_text())
        assert found["architecture"] == row["architecture"]
    printed = capsys.readouterr().out
    assert "python examples/nas_cifar10.py --method sparse_supernet --rule sound --preset nasbench201_small" in printed
    assert "DrNAS, published figure" in printed and "all 3x3" in printed and "[5/5]" in printed
    titles = [row["title"] for row in rows_of(tmp_path / "out" / "summary.csv")]
    assert titles[:2] == ["SparseNAS, HAPG, published rule", "SparseNAS, HAPG, sound rule"]

    monkeypatch.setattr(bench, "search", None)  # nothing is searched again
    assert bench.main([*command, *methods, "--seeds", "0"]) == 0
    text = (tmp_path / "out" / "summary.txt").read_text()
    (tmp_path / "out" / "summary.txt").unlink()
    assert bench.main([*command, "--only-summary"]) == 0
    assert (tmp_path / "out" / "summary.txt").read_text() == text
    with pytest.raises(SystemExit, match=r"results of ista by other settings \(batch is 8, not 4\): choose another --out"):
        bench.main([*command, "batch=4", "--methods", "ista"])


def test_random_search_returns_the_best_of_its_cells(bench, command, tmp_path, capsys):
    import nas_bench_201_random

    options = ["--methods", "random_search", "--cells", "2", "--cost", "0.4", "--held-out", "16", "--seeds", "3"]
    assert bench.main([*command, *options]) == 0
    trials = json.loads((tmp_path / "out" / "random_search" / "seed-3" / "cells.json").read_text())
    assert [t["architecture"] for t in trials] == nas_bench_201_random.drawn(2, 3)
    (row,) = rows_of(tmp_path / "out" / "runs.csv")
    assert row["architecture"] == max(trials, key=lambda t: t["accuracy"])["architecture"]


def test_proxy_compares_operations_on_an_edge_after_training_alone(command, tmp_path, monkeypatch, capsys):
    import nas_bench_201_proxy as proxy

    strings = [proxy.architecture(edge, "skip_connect") for edge in proxy.EDGES]
    assert strings[3] == "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    assert len(set(strings)) == 6 and proxy.architecture("1<-0", "nor_conv_3x3") == ALL_3X3
    result = lambda job: Done({"loss": 2.0 - job.arguments[2] / 10, "accuracy": 10.0}, cpu_seconds=1.0, seconds=1.0)
    monkeypatch.setattr(proxy, "run", lambda jobs, workers: ((job, result(job)) for job in jobs))
    out = tmp_path / "proxy"
    options = [
        *command[: command.index("--set")],
        "--out",
        str(out),
        "--transitions",
        "patch",
        "--seeds",
        "0",
        "--steps",
        "1",
        "2",
    ]
    rows = proxy.main(options)
    assert [(row["steps"], row["operation"]) for row in rows][:2] == [(1, "skip_connect"), (1, "avg_pool_3x3")] and len(rows) == 6
    assert rows_of(out / "proxy.csv")[-1]["loss"] == "1.8" and (out / "proxy.png").exists()
    several = [{**row, "seed": seed, "loss": row["loss"] * (1 + seed)} for row in rows for seed in (0, 1)]
    several += [
        {**row, "loss": row["loss"] + 1.0, "operation": "nor_conv_1x1"} for row in several if row["operation"] == "skip_connect"
    ]
    assert proxy.gaps(several, "patch", "nor_conv_1x1", 2) == pytest.approx([1.0, 1.0])
    with pytest.raises(SystemExit):
        proxy.main([*options, "--operations", "avg_pool_3x3"])
    assert "--operations must hold skip_connect" in capsys.readouterr().err


def test_runs_that_fail_are_named_and_tried_again(bench, command, tmp_path, capsys, monkeypatch):
    fails = lambda jobs, workers: ((job, Done(None, "the train loss must be finite")) for job in jobs)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "run", fails)
        assert bench.main([*command, "--methods", "ista", "--seeds", "0", "7"]) == 1
    printed = capsys.readouterr().out
    assert "failed: ISTA-NAS, seed 7: the train loss must be finite (see " in printed and "2 runs failed" in printed
    monkeypatch.setattr(bench, "search", lambda *args: {"rows": [{"seed": args[3], "architecture": ONE_1X1}]})
    assert bench.main([*command, "--methods", "ista", "--seeds", "0", "7"]) == 0
    assert [row["seed"] for row in rows_of(tmp_path / "out" / "runs.csv")] == ["0", "7"]


def test_in_jax_all_seeds_are_one_program(bench, command, tmp_path, monkeypatch):
    calls = []

    def sweep(settings, seeds, out):
        calls.append((settings.optimizer, tuple(seeds), settings.resume))
        return [{"seed": seed, "architecture": ALL_3X3} for seed in seeds]

    method = bench.registry("torch").CIFAR["sparse_supernet"]._replace(sweep=sweep)
    monkeypatch.setattr(bench, "registry", lambda framework: SimpleNamespace(CIFAR={"sparse_supernet": method}))
    options = ["--methods", "hapg", "--rule", "published", "--framework", "jax", "--seeds"]
    assert bench.main([*command, *options, "0", "1"]) == 0
    rows = rows_of(tmp_path / "out" / "runs.csv")
    assert [(row["key"], row["seed"], row["cpu_seconds"]) for row in rows] == [("hapg-published-jax", s, "1.5") for s in "01"]
    assert bench.main([*command, *options, "0", "1", "5"]) == 0
    assert calls == [("hapg", (0, 1), True), ("hapg", (5,), True)], "only the seed that is missing"


def test_the_ablation_takes_back_one_switch_at_a_time(bench):
    from nas.methods.settings.sparse_supernet import sound

    found = bench.ablation("torch", [])
    base = found[0].settings
    published = bench.entry("hapg", "published", "torch", []).settings
    assert len({one.key for one in found}) == len(found) >= 8
    assert base.plain() == sound(published).plain()
    for one in found[1:]:
        switch = one.key.removeprefix("hapg-sound-without_")
        changed = {k for k, v in one.settings.plain().items() if v != base.plain()[k]}
        assert changed and changed <= {*bench.SWITCHES[switch]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "chanels=2", "--methods", "ista"], "--set chanels=2: none of ista has a setting chanels"),
        (
            ["--set", "dartz.epochs=2"],
            "--set must be NAME=VALUE or METHOD.NAME=VALUE with a METHOD of adamhapg, hapg, .*hapg-sound",
        ),
        (["--seeds", "1", "1"], "--seeds must be different numbers >= 0, got 1 1"),
        (["--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["--held-out", "0"], "--held-out must be >= 1, got 0"),
        (["--cost", "0"], "--cost must be finite and > 0, got 0"),
        (["--cost", "nan"], "--cost must be finite and > 0, got nan"),
        (["--only-summary"], "runs.csv has no runs to summarise"),
        (["--methods", "random_search"], "random_search needs --cost, as there are no searches"),
    ],
)
def test_a_wrong_option_of_the_benchmark_is_named(bench, command, options, message):
    with pytest.raises(SystemExit, match=message):
        bench.main([*command[:-8], *options])


def test_a_setting_can_be_for_one_method(bench):
    changes = ["strength=0.5", "hapg-sound.strength=0.25", "ista.rows=3"]
    strengths = {one.key: one.settings.strength for one in bench.entries(["hapg", "ista"], bench.RULES, "torch", changes)}
    assert strengths == {"hapg-published": 0.5, "hapg-sound": 0.25, "ista": 0.5}


def test_a_summary_counts_cells_above_the_median_of_their_size(table):
    from nas_bench_201_summary import ALL_3X3 as WHOLE
    from nas_bench_201_summary import picture, summary

    best = [max(same, key=lambda a: table.place(a).cifar10) for same in by_size(table, (1, 2, 9))]
    rows = [
        {"title": "a method", "seed": i, **table.place(cell)._asdict(), "cpu_seconds": 10.0 + i} for i, cell in enumerate(best)
    ]
    rows.append({"title": "a method", "seed": 3, **table.place(WHOLE)._asdict(), "cpu_seconds": 5.0})
    (row, *rest) = summary(rows, table, 8)
    assert (row["runs"], row["above"], row["p"], row["cpu_seconds"]) == (4, "3 of 3", 0.125, 10.5), "ties do not count"
    assert row["ranks"].split() == [str(r["rank"]) for r in rows]
    random = next(r for r in rest if r["title"] == "a random cell")
    assert random["percentile"] == pytest.approx(50, abs=1) and random["size_percentile"] == pytest.approx(50, abs=1)
    drawing.plt.close(picture(rows, table))


def by_size(table, sizes):
    return [[a for a in table.architectures if size(a) == wanted] for wanted in sizes]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", b"{", "settings.json must be the settings of this benchmark, but Expecting"),
        ("settings.json", b"[]", "settings.json must be the settings of this benchmark, but it is no object of objects"),
        ("runs.csv", b"key,seed\n\xff,0\n", "runs.csv, line 2 is no row of this benchmark"),
        ("ista/seed-0/found.json", b"{}", "has results of ista, but no settings of them: choose another --out"),
    ],
)
def test_a_damaged_folder_is_named(bench, command, tmp_path, name, content, message):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        bench.main([*command, "--methods", "ista", "--seeds", "0"])


def test_random_search_needs_more_time_than_the_images_take(images, tmp_path):
    from nas_bench_201_random import RandomSearchSettings, search

    settings = RandomSearchSettings(cells=1, cost=1e-6, held_out=8, data_dir=images, images=64, batch=8, channels=2, layers=3)
    with pytest.raises(ValueError, match=r"cost must be more than the \d+\.\d CPU seconds of reading the images, got 1e-06"):
        search(settings, 0, tmp_path / "out")


@pytest.mark.commands
def test_the_whole_command_runs_in_processes(table_file, tmp_path):
    import gpu

    images = gpu.random_images(tmp_path / "images.npz", 64)
    script = Path(gpu.__file__).parent / "nas_bench_201.py"
    where = ["--table", str(table_file), "--data-dir", str(images), "--out", str(tmp_path / "out")]
    options = ["--methods", "hapg", "random_search", "--rule", "sound", "--seeds", "0", "--cells", "2", "--held-out", "16", *TINY]
    done = subprocess.run([sys.executable, str(script), *where, *options], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    rows = rows_of(tmp_path / "out" / "runs.csv")
    assert [(row["key"], row["seed"]) for row in rows] == [("hapg-sound", "0"), ("random_search", "0")]
    assert all(float(row["cpu_seconds"]) > 0 for row in rows)
    assert (tmp_path / "out" / "nas_bench_201.png").stat().st_size > 10_000


# -- worker processes ---------------------------------------------------------------------------------------


def test_workers_return_results_and_errors_and_do_not_repeat(tmp_path):
    jobs = [
        Job("good", operator.add, (1, 2), tmp_path / "good"),
        Job("bad", json.loads, ("{",), tmp_path / "bad"),
        Job("later", operator.add, ("a", "b"), tmp_path / "later", ("json",)),
    ]
    done = {job.name: found for job, found in worker_processes.run(jobs, workers=2)}
    assert (done["good"].found, done["later"].found) == (3, "ab") and done["good"].cpu_seconds >= 0
    assert "Expecting property name" in done["bad"].error
    wrong = Job("good", operator.truediv, (1, 0), tmp_path / "good")
    assert [found.found for _, found in worker_processes.run([wrong], workers=1)] == [3], "it is finished already"
    (tmp_path / "good" / worker_processes.RESULT).write_text("{")
    with pytest.raises(ValueError, match=r"found.json must be the result of a finished run"):
        list(worker_processes.run([wrong], workers=1))


def test_workers_end_with_the_process_that_started_them(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; import worker_processes as w\n"
        f"if __name__ == '__main__': list(w.run([w.Job('sleeps', time.sleep, (600,), Path({str(tmp_path / 'job')!r}))], 1))"
    )
    script = tmp_path / "start.py"
    script.write_text(code)
    path = os.pathsep.join(map(str, (Path(worker_processes.__file__).parent, Path(worker_processes.__file__).parent.parent)))
    started = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path})
    clock = tmp_path / "job" / worker_processes.CLOCK
    wait_until(clock.exists)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = clock.stat().st_mtime_ns
    time.sleep(1.5 * worker_processes.BETWEEN_CLOCKS)
    stopped = clock.stat().st_mtime_ns
    time.sleep(1.5 * worker_processes.BETWEEN_CLOCKS)
    assert clock.stat().st_mtime_ns == stopped >= before, "it would still be written if the worker ran on"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
