"""The benchmark scripts that run searches. Each test imports its script itself: one that is broken fails its own tests only."""

import functools
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nas.engine import report, run
from nas.engine.signals import Interrupted
from nas.methods import ista_one_stage
from nas.methods.settings import gsparsity as gsparsity_settings
from nas.methods.settings import ista as ista_settings
from nas.methods.settings import sparse_supernet as sparse_settings
from nas.space import genotype
from nas.space.genotype import RecurrentGenotype, load_genotype
from nas.train.settings import CIFAR_TRAIN_PRESETS, TEXT_TRAIN_PRESETS, CifarTrainSettings
from nas_cases import rows_of

ROOT = Path(__file__).parents[2]
SIZES = "--epochs 1 --images 32 --batch 8 --channels 2 --layers 3".split()
TRAINING = {"images": 16, "epochs": 1, "batch": 8, "channels": 2, "layers": 3, "auxiliary": 0.0, "valid_images": 16}


@pytest.fixture
def place(images):
    return ["--data-dir", str(images)]


def test_a_sweep_searches_every_value_and_goes_on(tmp_path, place, capsys, monkeypatch):
    import nas_sweeps

    monkeypatch.setattr(report, "write", lambda *args: None)
    monkeypatch.setitem(CIFAR_TRAIN_PRESETS, "small", CifarTrainSettings(**TRAINING))
    out = ["--out", str(tmp_path / "out"), *place]
    monkeypatch.setitem(sparse_settings.CIFAR_PRESETS, "small", replace(sparse_settings.CIFAR_PRESETS["small"], space="cherry"))
    options = ["--values", "0.01", "0.5", *SIZES, "--train"]
    nas_sweeps.main([*out, *options])
    rows = rows_of(tmp_path / "out" / "sweep.csv")
    assert [float(row["strength_step"]) for row in rows] == [0.01, 0.5]
    assert all(0 <= float(row["test_error"]) <= 1 for row in rows)
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    nas_sweeps.main([*out, *options])
    assert rows_of(tmp_path / "out" / "sweep.csv") == rows


def test_a_table_of_searches_and_trainings_goes_on(tmp_path, place, capsys, monkeypatch):
    import gsparsity_table

    monkeypatch.setattr(report, "write", lambda *args: None)
    monkeypatch.setitem(CIFAR_TRAIN_PRESETS, "small", CifarTrainSettings(**TRAINING))
    small = replace(gsparsity_settings.CIFAR_PRESETS["small"], valid_images=16)
    monkeypatch.setitem(gsparsity_settings.CIFAR_PRESETS, "small", small)
    options = [*SIZES, "--space", "cherry", "--search-seeds", "0", "1", "--train-seeds", "0", "1", *place, "--out", str(tmp_path)]
    (row,) = gsparsity_table.main(options)
    rows = rows_of(tmp_path / "table.csv")
    assert [(r["search_seed"], r["train_seed"]) for r in rows] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert row["trainings"] == 4 and row["accuracy"] == pytest.approx(sum(float(r["test_accuracy"]) for r in rows) / 4)
    written = (tmp_path / "gsparsity" / "search-1" / "train-1" / "checkpoint.pt").stat().st_mtime_ns
    assert gsparsity_table.main(options) == [row]
    assert (tmp_path / "gsparsity" / "search-1" / "train-1" / "checkpoint.pt").stat().st_mtime_ns == written
    paper = gsparsity_table.training_settings("paper", "S2")
    assert (paper.layers, paper.form, gsparsity_table.training_settings("paper", "").layers) == (17, "gsparsity", 14)


@pytest.mark.parametrize("stages", ["two", "one"])
def test_kendalls_tau_compares_search_and_evaluation(stages, tmp_path, place, capsys, monkeypatch):
    import nas_kendall

    monkeypatch.setattr(report, "write", lambda *args: None)
    monkeypatch.setitem(CIFAR_TRAIN_PRESETS, "small", CifarTrainSettings(**TRAINING))
    monkeypatch.setitem(ista_settings.CIFAR_PRESETS, "small", replace(ista_settings.CIFAR_PRESETS["small"], space="cherry"))
    seeds = ["0", "1", "3"] if stages == "two" else ["0", "1"]
    options = [*SIZES, "--seeds", *seeds]
    if stages == "one":
        options += ["--one-stage"]
        small = replace(ista_one_stage.CIFAR_PRESETS["small"], search_epochs=1, auxiliary=0.0, space="cherry")
        monkeypatch.setitem(ista_one_stage.CIFAR_PRESETS, "small", small)
    tau = nas_kendall.main([*options, *place, "--out", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "kendall.csv")
    pairs = [(float(r["search_accuracy"]), float(r["evaluation_accuracy"])) for r in rows]
    assert len(pairs) == len(seeds) and all(0 <= v <= 1 for pair in pairs for v in pair)
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for i, a in enumerate(pairs) for b in pairs[:i]]
    if all(signs):
        assert tau == pytest.approx(sum(1 if s > 0 else -1 for s in signs) / len(signs))
    assert "Kendall's tau" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        nas_kendall.main([*place, "--seeds", "0"])
    with pytest.raises(SystemExit):
        nas_kendall.main([*place, "--method", "darts", "--one-stage"])


def test_recovery_improves_with_rows(tmp_path, capsys):
    import nas_recovery

    nas_recovery.main(["--rows", "3", "9", "--draws", "40", "--out", str(tmp_path)])
    rows = {(r["matrix"], r["rows"], r["paths"]): float(r["recovered"]) for r in rows_of(tmp_path / "recovery.csv")}
    for kind in ("uniform", "gaussian"):
        assert rows[kind, "3", "35"] < rows[kind, "9", "35"] <= 1
        assert rows[kind, "9", "14"] >= 0.8
    assert (tmp_path / "recovery.png").stat().st_size > 10_000


STOPPED = {
    "nas_sweeps": [],
    "nas_kendall": ["--method", "darts"],
    "nas_against_random": ["--genotype", "PC_DARTS", "--random", "0"],
    "text_against_others": ["--genotype", "DARTS_V1", "--random", "0"],
    "gsparsity_table": [],
    "nas_bench_201_full": [],
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_ends_a_script_with_one_line(name, tmp_path, images, corpus, capsys, monkeypatch):
    def stopped(*_):
        raise Interrupted(signal.SIGTERM, " after step 2 of epoch 1")

    monkeypatch.setattr(run, "join_processes", stopped)  # with which `launch` begins
    place = str(corpus if name == "text_against_others" else images)
    words = ["--data-dir", place, "--out", str(tmp_path), *STOPPED[name]]
    if name == "nas_bench_201_full":
        words += "--seconds 20 --device cpu --images 32 --valid-images 16 --batch 8 --channels 2".split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"stopped by SIGTERM after step 2 of epoch 1: (the same command continues|what it has measured)", last)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_a_run_ends_a_script_with_one_line(number, capsys):
    import stopping

    with pytest.raises(SystemExit) as ended, stopping.in_one_line():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == f"\nstopped by {number.name}: the same command continues\n"


def test_random_genotypes_of_the_same_size_are_trained_alike(tmp_path, place, capsys, monkeypatch):
    import nas_against_random

    monkeypatch.setattr(nas_against_random, "alike", functools.partial(nas_against_random.alike, draws=20))
    options = ["--genotype", "PC_DARTS", "--random", "1", "--seeds", "0", "1", *SIZES, "--images", "16"]
    nas_against_random.main([*options, *place, "--out", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "against_random.csv")
    assert [(r["genotype"], r["seed"]) for r in rows] == [(g, s) for g in ("searched", "random 0") for s in ("0", "1")]
    sizes = {r["genotype"]: int(r["parameters"]) for r in rows}
    assert abs(sizes["random 0"] / sizes["searched"] - 1) <= 0.3
    drawn = genotype.load_genotype(tmp_path / "out" / "random-0" / "seed-0" / "genotype.json")
    assert drawn.clean() == drawn
    assert [len(drawn.paths(c)) for c in ("normal", "reduce")] == [8, 8]
    assert "random 0" in capsys.readouterr().out


def test_several_genotypes_have_random_ones_of_their_own():
    import nas_against_random as script
    from nas.space.spaces import get_space

    genotypes = [load_genotype(name).clean() for name in ("PC_DARTS", "DARTS_V2")]
    edges = lambda g: [sorted((p.node, p.source) for p in g.paths(cell)) for cell in ("normal", "reduce")]
    count = lambda g: len(g.paths("normal"))
    draw = lambda found, i: script.alike(found, get_space("darts"), count, i, draws=3, same_edges=True)
    found = script.entrants(genotypes, 2, draw)
    assert list(found) == ["searched 0", "random 0.0", "random 0.1", "searched 1", "random 1.0", "random 1.1"]
    for name in ("random 0.0", "random 0.1", "random 1.0"):
        assert edges(found[name]) == edges(found[script.opponent(name)]) and found[name] != found[script.opponent(name)]
    results = {"searched 0": 0.5, "random 0.0": 0.4, "random 0.1": 0.6, "searched 1": 0.7, "random 1.0": 0.7, "random 1.1": 0.6}
    rows = [{"genotype": name, "seed": 0, "accuracy": accuracy} for name, accuracy in results.items()]
    assert script.pairs(rows, "genotype", "accuracy", 1).endswith("2 of 4 pairs")
    assert script.pairs(rows, "genotype", "accuracy", -1).endswith("1 of 4 pairs"), "equal ones are no better"


def test_the_loss_free_curves_are_printed_and_drawn(tmp_path, capsys):
    import gsparsity_loss_free

    gsparsity_loss_free.main(["--epochs", "8", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    curve = {int(n): float(v) for v, n in re.findall(r"([\d.]+) \((\d)\)", printed.splitlines()[0])}
    assert {n: curve[n] for n in (1, 2, 3, 5)} == pytest.approx({1: 46.08, 2: 26.72, 3: 17.59, 5: 10.83}, abs=0.1)
    assert "max_pool_3x3   below 1 % from epoch    6" in printed
    assert len(rows_of(tmp_path / "loss_free.csv")) == 18 and (tmp_path / "loss_free.png").stat().st_size > 10_000


# -- cost of a step -----------------------------------------------------------------------------------


def test_cases_in_jax_are_compared_with_their_equals_in_pytorch(monkeypatch):
    import search_step

    choose = functools.partial(search_step.chosen, only=[], compiled=False)
    cases = choose("jax", "paper", device="cpu")
    assert len(cases) == 2 * len(search_step.JAX_CASES)
    assert all(cases[f"jax, {case}"] == (case,) for case in cases if not case.startswith("jax"))
    alone = choose("jax", "paper", device="tpu")
    assert list(alone) == list(search_step.JAX_CASES) and not any(alone.values()), "PyTorch does not run on a TPU"
    monkeypatch.setattr(search_step.importlib.util, "find_spec", lambda name: None)
    assert choose("jax", "small", device="cpu") == alone
    assert not any(
        "transcribed" in word for case, bases in choose("torch", "small", device="cpu").items() for word in (case, *bases)
    )
    assert list(search_step.chosen("torch", "paper", ["recurrent second"], False, "cpu")) == [
        "transcribed, recurrent second order",
        "recurrent second order",
    ]


def test_steps_of_both_libraries_take_turns(tmp_path, capsys, monkeypatch):
    import search_step

    order = []

    class Pretended:
        def __init__(self, case, *args):
            self.case = case

        def measure(self):
            order.append(self.case)
            if "tenth" in self.case:
                raise RuntimeError("out of memory\nmore")
            more = {"compile_wall": 20.0, "compile_cpu": 30.0, "buffers_mib": 7.0} if "jax" in self.case else {}
            return {"cpu": 1.0 + len(order), "mib": 100.0, **more}

        def close(self):
            order.append("end")

    monkeypatch.setattr(search_step, "Apart", Pretended)
    options = ["--framework", "jax", "--only", "recurrent second", "--rounds", "2", "--out", str(tmp_path / "t.csv")]
    with pytest.raises(SystemExit) as ended:
        search_step.main(options)
    both = ["recurrent second order", "jax, recurrent second order"]
    assert [case for case in order if case != "end"] == 2 * both and not ended.value.code
    row = rows_of(tmp_path / "t.csv")[1]
    assert (row["case"], row["against"], float(row["compile_cpu_s"])) == (both[1], both[0], 30.0)
    assert float(row["ratio"]) == pytest.approx((3 / 2 + 5 / 4) / 2) and float(row["ratio_max"]) == 1.5
    with pytest.raises(SystemExit) as ended:
        search_step.main([*options, "--only", "a tenth of the paths"])
    assert ended.value.code == 1 and "left out, out of memory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        search_step.main(["--device", "tpu"])
    assert "--device tpu needs --framework jax" in capsys.readouterr().err


def test_cuda_graphs_are_measured_on_a_device_only(capsys, monkeypatch):
    import search_step

    graphs = lambda on: [c for c in search_step.chosen("torch", "paper", [], False, "cuda", on) if "graph" in c]
    assert graphs(False) == [] and graphs(True) == ["darts first order, CUDA graph", "ista, CUDA graph"]
    monkeypatch.setattr(search_step, "chosen", lambda *args: sys.exit(f"graphs: {args[-1]}"))
    with pytest.raises(SystemExit, match="graphs: False"):
        search_step.main(["--graphs"])
    assert "CUDA graphs: left out, they need --device cuda, got cpu" in capsys.readouterr().err


def test_published_repositories_take_turns_with_our_steps(tmp_path, monkeypatch):
    import published_step

    with pytest.raises(FileNotFoundError, match=r"--repository must be a folder with one of cnn/architect\.py, .* got "):
        published_step.find([tmp_path])
    (tmp_path / "cnn").mkdir()
    (tmp_path / "cnn" / "architect.py").touch()
    order = []
    named = lambda name: lambda: order.append(name)
    theirs = lambda repository, case, sizes, batches, last: named(published_step.VARIANTS[1 + last])
    monkeypatch.setattr(published_step, "PUBLISHED", {"darts": theirs})
    monkeypatch.setattr(published_step, "without_cuda", lambda: None)
    monkeypatch.setattr(published_step.search_step, "build", lambda case, sizes, device: named("ours"))
    monkeypatch.setattr(published_step, "seconds", lambda step: (step(), 2.0 if order[-1] == "ours" else 4.0)[1])
    options = ["--repository", str(tmp_path), "--only", "darts first", "--preset", "tiny", "--rounds", "3"]
    published_step.main([*options, "--out", str(tmp_path / "t.csv")])
    ratios = {row["variant"]: float(row["ratio"]) for row in rows_of(tmp_path / "t.csv")}
    assert ratios == {"ours": 0.5, "published": 1.0, "published, channels last": 1.0}
    assert sorted(order) == sorted(4 * published_step.VARIANTS), "one step before the measured ones"


def test_a_published_network_is_not_moved_to_a_layout_in_which_onednn_corrupts_memory():
    import published_step

    net, images = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 1, 2)), torch.ones(2, 3, 8, 8)
    assert published_step.channels_last(net, images, False) is images
    with pytest.raises(SystemExit, match=r"convolutions must have at least 16 channels .* got 8: choose a larger --preset"):
        published_step.channels_last(net, images, True)
    assert net[1].weight.is_contiguous()
    moved = published_step.channels_last(net[:1], images, True)
    assert moved.is_contiguous(memory_format=torch.channels_last)


def test_modules_of_a_repository_do_not_stay(tmp_path):
    import published_step

    (tmp_path / "operations.py").write_text("import absent\nname = absent.__name__\n")
    with published_step.importing([tmp_path], {"absent": None}):
        import operations

        assert operations.name == "absent"
    assert not {"operations", "absent"} & set(sys.modules) and str(tmp_path) not in sys.path


def test_both_libraries_have_the_paths_and_codes_of_a_case():
    import search_cases

    assert len(search_cases.tenth(98)) == len(set(search_cases.tenth(98))) == 9
    matrices, variables = search_cases.compressed({"normal": [(7, 14), (7, 21)]})
    assert [a.shape for a in matrices["normal"]] == [(7, 14), (7, 21)] and variables["normal"].shape == (2, 7)


@pytest.mark.commands
def test_a_step_in_jax_is_measured_beside_pytorch(tmp_path):
    script = ROOT / "benchmarks" / "search_step.py"
    options = "--framework jax --preset tiny --rounds 2 --steps 1 --only".split()
    command = [sys.executable, str(script), *options, "recurrent first", "--out", str(tmp_path / "t.csv")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    torch_row, row = rows_of(tmp_path / "t.csv")
    assert (torch_row["case"], row["case"]) == ("recurrent first order", "jax, recurrent first order")
    assert float(row["compile_cpu_s"]) > 0 < float(row["buffers_mib"])


@pytest.mark.commands
def test_depthwise_convolutions_are_measured(tmp_path):
    script = ROOT / "benchmarks" / "depthwise_jax.py"
    command = [sys.executable, str(script), "--tiny", "--rounds", "2", "--out", str(tmp_path / "t.csv")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert [r["program"] for r in rows_of(tmp_path / "t.csv")] == [name for name in ("XLA", "ours", "PyTorch") for _ in range(2)]


def test_the_process_of_a_case_in_jax_does_not_import_torch():
    code = "import sys, search_step, search_step_jax as s; from search_cases import PRESETS; " + (
        "s.build('recurrent first order', PRESETS['tiny'], 'cpu'); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_found_cell_is_trained_beside_others_of_its_size(tmp_path, corpus, capsys, monkeypatch):
    import text_against_others

    monkeypatch.setattr(text_against_others, "alike", functools.partial(text_against_others.alike, draws=20))
    monkeypatch.setitem(TEXT_TRAIN_PRESETS, "small", replace(TEXT_TRAIN_PRESETS["small"], hidden=32))
    options = "--genotype DARTS_V2 --random 1 --seeds 0 1 --epochs 1 --tokens 300 --batch 4 --lr 1".split()
    text_against_others.main([*options, "--data-dir", str(corpus), "--out", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "text_against_others.csv")
    assert [r["cell"] for r in rows[::2]] == ["searched", "random 0", "LSTM", "DARTS_V2"] and len(rows) == 8
    sizes = {r["cell"]: int(r["parameters"]) for r in rows}
    assert all(abs(size / sizes["searched"] - 1) < 0.05 for size in sizes.values())
    assert len({r["test_perplexity"] for r in rows}) == 6, "DARTS_V2 is what was searched, with each of its two seeds"
    drawn = load_genotype(tmp_path / "out" / "random-0" / "seed-0" / "genotype.json", RecurrentGenotype)
    assert drawn.clean() == drawn and len(drawn.paths("recurrent")) == 8
    assert "LSTM" in capsys.readouterr().out
    text_against_others.main([*options, "--references", "--data-dir", str(corpus), "--out", str(tmp_path / "out")])
    assert [r["cell"] for r in rows_of(tmp_path / "out" / "text_against_others.csv")[::2]] == ["searched", "random 0"]
