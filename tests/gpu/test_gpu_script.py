"""The script for a device that is there for minutes: how it shares its time, what it writes down, and the table made of it."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu
import last_runs
import numpy as np
import pytest
import runner
import torch
from nas.data import cifar, cifar_files
from runner import Part, Place

ROOT = runner.ROOT
TOLD = {"command": "python a", "state": "done", "seconds": 0.1, "peak_mib": 3, "result": "fine"}
IDLE = "import subprocess, sys, time; print('begun', flush=True); time.sleep(60)"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "out").mkdir()
    return Place("cpu", tmp_path / "out", tmp_path / "images.npz", tmp_path, machine="a machine", code="abc")


def part(place, code, **options):
    """A part that runs these lines."""
    script = place.work / "script.py"
    script.write_text(code)
    return Part("a part", (str(script),), **options)


def test_a_part_gets_its_share_of_what_is_left():
    assert runner.limit(480, 0.25) == 120
    assert runner.limit(40, 0.25) == runner.LEAST
    assert runner.limit(12, 0.25) == 12


def test_options_of_a_dry_run_replace_those_of_the_command(place):
    one = Part("one", ("x.py", "--size", "9", "--only", "a b", "c"), ("--out", "{out}", "--device", "{device}"), ("--only", "d"))
    given = ["x.py", "--size", "9", "--only", "a b", "c", "--out", str(place.work / "one"), "--device", "cpu"]
    assert place.words(one) == given
    assert replace(place, dry=True, device="gpu").words(one) == [
        "x.py",
        "--size",
        "9",
        *given[6:8],
        "--device",
        "cuda",
        "--only",
        "d",
    ]
    assert one.command == 'python x.py --size 9 --only "a b" c'


def test_every_part_names_what_exists_and_has_a_small_form():
    assert len({p.file for p in gpu.PARTS}) == len(gpu.PARTS)
    commands = [c for p in gpu.PARTS for c in p.commands]
    assert len(set(commands)) == len(commands)
    for p in gpu.PARTS:
        assert p.words[0] == "-m" or (ROOT / p.words[0]).is_file()
        assert p.dry and (p.patterns or p.shows) and 0 < p.share < 1 and set(p.devices) <= set(runner.DEVICES)


SAID = {
    "nas_cifar10": (
        "ista: 9 paths in the normal cell, 8 in the reduction cell\nsupernet 41.20 %, its nonzero paths alone 40.01 %",
        "9 paths in the normal cell, 8 in the reduction cell; supernet 41.20 %, nonzero paths alone 40.01 %",
    ),
    "nas_ptb": (
        "darts: 8 paths into 8 nodes\nperplexity of the supernet 238.00, of its nonzero paths alone 240.10",
        "8 paths into 8 nodes; perplexity 238.00, nonzero paths alone 240.10",
    ),
    "digits": (
        "At strength 0.0002, mean over 5 seeds; the dense network reaches 97.86 ± 0.44 %.\n"
        "| HAPG, SGL | 97.59 ± 0.22 | 55.4 ± 1.2 | 52.8 ± 2.3 | 40.9 ± 2.6 |\n"
        "| SGD, SGL | 97.64 ± 0.57 | 64.0 ± 0.0 | 60.0 ± 0.0 | 13.7 ± 0.8 |",
        "dense 97.86 ± 0.44 %; HAPG, SGL: 97.59 ± 0.22 %, 40.9 ± 2.6 % zeros",
    ),
    "optimizers": (
        "ResNet-18, NVIDIA H200\noptimizer                          ms  / Adam fused   range\n"
        "torch Adam, fused                0.31          1.00   1.00 - 1.00\n"
        "ProxAdam (exact)                 0.78          2.70   1.98 - 3.41",
        "ResNet-18, beside fused Adam; ProxAdam (exact) 2.70",
    ),
    "proxes": (
        "NVIDIA H200, python 3.12.3, torch 2.13.0\n\ntorch, float32\n"
        "case                                       program                   ms  / copy   range            target\n"
        "L1, 1e+07 entries                          copy                  0.0310    1.00   1.00 - 1.00\n"
        "L1, 1e+07 entries                          proxopt               0.0930    3.00   2.90 - 3.10      1.7 copies\n"
        "SGL, 1e+04 groups of 100                   proxopt               0.0620    2.00   1.90 - 2.10      4 copies\n"
        "SGL, 1e+04 groups of 100 in columns        proxopt               0.0620    2.10   1.90 - 2.10      4 copies\n"
        "L1, 10 entries                             proxopt               0.0310    9.00   8.90 - 9.10",
        "torch, float32, beside a copy; L1 3.00; SGL 2.00",
    ),
    "triton": (
        "transformer of 124M, NVIDIA H200\n"
        "ProxAdam (exact), Triton: first step 9.1 s, largest difference 3.0e-08, 17 zeros, of which 0 differ\n"
        "optimizer                                ms  / Adam fused   range          host ms\n"
        "torch Adam, fused                     1.174          1.00   1.00 - 1.00       0.174\n"
        "ProxAdam (exact), Triton              1.408          1.20   1.19 - 1.22       0.381",
        "transformer of 124M, beside fused Adam; ProxAdam (exact), Triton: 0 zeros differ; ProxAdam (exact), Triton 1.20",
    ),
    "steps": (
        "transcribed, darts first order: 6.298 s, 2632 MiB\ndarts first order: 2.43 s, 1327 MiB\n"
        "gsparsity: left out, CUDA out of memory\n"
        "transcribed, darts first order           6.2976    2632\n"
        "darts first order                      2.4303    1327   0.386   0.381 - 0.391   of transcribed, darts first order",
        "darts first order 2.43 s, 1327 MiB; gsparsity: left out, CUDA out of memory",
    ),
    "steps jax, text": (
        "recurrent first order: 0.1 s, 900 MiB\njax, recurrent first order: 0.05 s, 700 MiB, compiled in 30.1 s\n"
        "case                                       seconds     MiB     arrays MiB  compile CPU s    ratio   range\n"
        "recurrent first order                       0.1000     900",
        "PyTorch, recurrent first order 0.1 s, 900 MiB; jax, recurrent first order 0.05 s, 700 MiB, compiled in 30.1 s",
    ),
    "tests": (
        "FAILED tests/gpu/test_gpu.py::test_x[a] - AssertionError\n======= 1 failed, 164 passed in 71.20s (0:01:11) =======",
        "failed: tests/gpu/test_gpu.py::test_x[a]; 1 failed, 164 passed in 71.20s (0:01:11)",
    ),
    "nasbench201": (
        "supernet of 16 channels, 17 layers, batch 64, sound rule: 0.1 s a step, 78.1 s an epoch of 781 steps, 2048 MiB\n"
        "search of 2000 steps, 2.6 epochs, in 200 s: supernet 60.00 %, its nonzero paths alone 58.10 %, 7 paths, cell |none~0|+|",
        "0.1 s a step, 78.1 s an epoch of 781 steps, 2048 MiB; "
        "2000 steps, 2.6 epochs, in 200 s: 7 paths, 60.00 %, nonzero paths 58.10 %; |none~0|+|",
    ),
    "prune_operations": (
        "        mu  threshold   pruned   before    after    change  retrained\n"
        "       0.5          0    58.2%   25.80%   25.80%         0     33.90%\n"
        "       0.5      1e-06    58.2%   25.80%   25.80%         0",
        "pruned 58.2%: 25.80% before the cut, 25.80% after it, retrained 33.90%",
    ),
    "prune_convnet": (
        "network                 accuracy          parameters         multiply-adds  ms a pass (quartiles)\n"
        "dense                    71.90 %  272 474 (100.0 %)  41 214 592 (100.0 %)     3.10 (3.04 - 3.29)\n"
        "sparse, before the cut   71.30 %  272 474 (100.0 %)  41 214 592 (100.0 %)     3.12 (3.05 - 3.29)\n"
        "compact, after the cut   71.30 %    98 324 (36.1 %)   20 514 102 (49.8 %)     2.01 (1.90 - 2.21)\n"
        "largest change of an output by the cut: 3.1e-07 of the largest output",
        "dense: 71.90 %, parameters 100.0 %, multiply-adds 100.0 %, 3.10 ms; compact, after the cut: 71.30 %, parameters 36.1 %,"
        " multiply-adds 49.8 %, 2.01 ms; largest change of an output by the cut: 3.1e-07",
    ),
    "prune_transformer": (
        "network                 bits per character  perplexity       parameters        multiply-adds  ms a pass (quartiles)\n"
        "compact, after the cut              2.1899       4.562  418 338 (50.9 %)  54 119 200 (50.4 %)    8.23 (8.12 - 9.66)",
        "compact, after the cut: 2.1899, parameters 50.9 %, multiply-adds 50.4 %, 8.23 ms",
    ),
    "digits example": (
        "compact, retrained       0.9689        28       21        570       0.0 %",
        "0.9689, 28 pixels, 21 neurons, 570 parameters",
    ),
    "digits example jax": (
        "cut, retrained          31-14-11-10      702       0     0.970",
        "0.970, layers 31-14-11-10, 702 weights",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_command_gave_is_read_from_its_output(name):
    one = next(p for p in gpu.PARTS if p.name == name)
    output, expected = SAID[name]
    assert runner.result(one, "done", runner.Ended(0, 1.0), output.splitlines()) == expected


def test_tests_that_were_stopped_are_counted():
    one = next(p for p in gpu.PARTS if p.name == "tests")
    lines = [
        "tests/gpu/test_gpu.py::test_a[x] PASSED [  1%]",
        "[gw1] [  2%] PASSED tests/gpu/test_gpu.py::test_b",
        "test_c FAILED [  3%]",
    ]
    assert runner.result(one, "timeout", runner.Ended(None, 60.0), lines) == "not done after 60 s: 2 PASSED; 1 FAILED"


def test_a_part_that_ends_is_a_row(place):
    code = "import sys; print('loss 0.5'); print('other'); print(sys.argv[1:]); open(sys.argv[1] + '/t.csv', 'w').write('a')"
    one = part(place, code, more=("{out}", "--device", "{device}"), patterns=((r"^loss (\S+)", "{0} left"),), keeps=("t.csv",))
    (row,) = runner.run(one, place, 60)
    assert (row["state"], row["result"], row["device"], row["machine"]) == ("done", "0.5 left", "cpu", "a machine")
    assert row["command"] == one.command and row["seconds"] > 0 and row["cpu_seconds"] > 0 and 1 < row["peak_mib"] < 1000
    assert (place.out / "a_part.csv").read_text() == "a"
    assert f"['{place.work}/a_part', '--device', 'cpu']" in (place.out / "log.txt").read_text()


def test_a_part_that_fails_leaves_the_last_lines_of_its_error(place):
    one = part(place, "print('fine'); raise SystemExit('no more memory')", patterns=((r"^loss (\S+)", "{0}"),))
    (row,) = runner.run(one, place, 60)
    assert (row["state"], row["result"]) == ("failed", "exit code 1: fine; no more memory")


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(place, monkeypatch):
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {IDLE!r}])
print("child", child.pid, flush=True)
child.wait()
"""
    words, report = place.words(part(place, code)), place.work / "report.json"
    lines = runner.launch(words, 1000.0, place.out / "log.txt", place.environment(), report)
    pid = int(next(line for line in lines if line.startswith("child")).split()[1])
    assert running(pid)
    real = time.monotonic
    monkeypatch.setattr(runner.time, "monotonic", lambda: real() + 2000)
    ended = list(lines)[-1]
    assert ended.code is None and ended.seconds > 1000 and ended.peak > 1
    for _ in range(200):  # what a killed process had started goes to another parent first
        if not running(pid):
            break
        time.sleep(0.05)
    assert not running(pid)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_whose_time_is_over_is_a_row(place, monkeypatch):
    ended = runner.Ended(None, 12.3)
    monkeypatch.setattr(runner, "launch", lambda *args: iter(["epoch 1\r", " 50%|##   | 3/6", ended]))
    (row,) = runner.run(part(place, ""), place, 12.0)
    assert (row["state"], row["result"], row["seconds"]) == ("timeout", "not done after 12 s: 50%  3/6", 12.3)


def test_rows_that_a_part_tells_come_at_once(place):
    code = f"import time; print('ROW ' + {json.dumps(json.dumps(TOLD))}, flush=True); time.sleep(60)"
    start = time.monotonic()
    rows = runner.run(part(place, code, shows=("python a", "python b")), place, 1000.0)
    first = next(rows)
    rows.close()
    assert time.monotonic() - start < 55 and first["result"] == "fine" and first["device"] == "cpu"


def test_the_first_row_that_is_missing_says_how_the_part_ended(place):
    code = f"print('ROW ' + {json.dumps(json.dumps(TOLD))}); raise SystemExit('no more')"
    first, second = runner.run(part(place, code, shows=("python a", "python b")), place, 1000.0)
    assert (first["command"], first["state"]) == ("python a", "done")
    assert (second["command"], second["state"], second["result"]) == ("python b", "failed", "exit code 1: no more")


def test_rows_stay_whatever_happens_and_done_parts_are_left_out(place, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu, "run", lambda part, place, seconds: iter([row_of(part.command, seconds=seconds, state=states[part.name])])
    )
    parts = [Part(name, (f"{name}.py",), share=0.5) for name in ("one", "two", "three")]
    states = {"one": "done", "two": "failed", "three": "done"}
    found = gpu.run_all(parts[:2], place, minutes=10)
    assert [round(r["seconds"], -1) for r in found] == [300, 300]
    file = place.out / "runs.jsonl"
    file.write_text(file.read_text() + '{"command": "cut o')
    assert [r["command"] for r in gpu.run_all(parts, place, 10)] == ["python two.py", "python three.py"]
    assert len(runner.rows_of(file)) == 4, "the line that was cut off spoils none behind it"
    assert [r["command"] for r in gpu.run_all(parts, replace(place, code="other"), 10, only=["thr"])] == ["python three.py"]
    assert len(gpu.run_all(parts, place, 10, again=True)) == 3
    capsys.readouterr()
    assert gpu.run_all(parts, place, 0.01, again=True) == []
    assert "no time was left for: one, two, three" in capsys.readouterr().out


def row_of(command, **own):
    plain = {"device": "cpu", "machine": "a machine", "date": "2026-01-01T10:00:00", "code": "abc", "dry": False, "threads": 1}
    return {**plain, "command": command, "state": "done", "seconds": 3.0, "peak_mib": 100, "result": "fine", **own}


def test_the_table_has_the_last_run_of_each_command_on_each_device():
    known = gpu.PARTS[0].command
    rows = [
        row_of(known, result="a | b"),
        row_of(known, date="2026-01-03T00:00:00", dry=True, result="dry"),
        row_of(known, date="2025-12-31T00:00:00", result="older"),
        row_of(
            known, device="gpu", machine="NVIDIA H200", threads=0, state="timeout", peak_mib=None, result="not done after 3 s: x"
        ),
        row_of("python other.py", device="tpu", state="failed"),
        row_of("python a.py", cpu_seconds=2.5, threads=0),
    ]
    lines = last_runs.table(rows).splitlines()
    assert lines[0] == "| command | CPU | GPU | TPU |"
    assert (
        f"| `{known}` | 2026-01-01, a machine, one thread, 3 s, 100 MiB: a \\| b | 2026-01-01, NVIDIA H200, 3 s: "
        "**stopped**: not done after 3 s: x | not yet |" in lines
    )
    assert lines[-2].startswith("| `python other.py` | not yet | not yet | 2026-01-01")
    assert lines[-1] == "| `python a.py` | 2026-01-01, a machine, 2.5 CPU s, 100 MiB: fine | not yet | not yet |"
    assert sum("not yet | not yet | not yet" in line for line in lines) == sum(len(p.commands) for p in gpu.PARTS) - 1
    text = f"head\n{last_runs.START}\nold\n{last_runs.END}\ntail"
    new = last_runs.updated(text, rows)
    assert new.startswith("head\n") and new.endswith("\ntail") and "old" not in new and last_runs.updated(new, rows) == new
    assert last_runs.table(rows, [gpu.PARTS[0].name]).count("\n") == 2
    assert set(last_runs.MAIN) <= {part.name for part in gpu.PARTS}
    with pytest.raises(ValueError, match=r"README.md must hold the lines"):
        last_runs.updated("head", rows)


def test_the_tables_are_those_of_the_files():
    last_runs.main(["--check"])


def some_images(n):
    draw = np.random.default_rng(n)
    return cifar_files.Images(draw.integers(256, size=(n, 3, 32, 32), dtype=np.uint8), draw.integers(10, size=n))


def test_packed_images_are_the_first_of_the_data_set(tmp_path, capsys):
    whole = cifar_files.Dataset("cifar10", some_images(20), some_images(8), 10, (0.5,) * 3, (0.2,) * 3)
    file = tmp_path / "some.npz"
    cifar_files.pack(whole, 16, file, test=2)
    found = cifar.load_cifar("cifar10", file)
    for part, n in (("train", 14), ("test", 2)):
        for ours, theirs in zip(getattr(found, part), getattr(whole, part)):
            assert torch.equal(ours, torch.from_numpy(theirs[:n]))
    assert found.mean == cifar_files.SOURCES["cifar10"].mean
    assert "CIFAR-10, a part: 14 of 20 images to train and 2 of 8 to test" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"images to train must lie in \[1, 20\], got 21 of 22"):
        cifar_files.pack(whole, 22, file, test=1)
    with pytest.raises(ValueError, match=r"must end in .npz"):
        cifar_files.pack(whole, 4, tmp_path / "some.bin", test=1)
    with pytest.raises(ValueError, match="must contain cifar100, got cifar10"):
        cifar.load_cifar("cifar100", file)
    with pytest.raises(FileNotFoundError, match=r"no file .*none.npz of packed images"):
        cifar.load_cifar("cifar10", tmp_path / "none.npz")


def test_a_damaged_file_of_images_is_named(tmp_path):
    whole = cifar_files.Dataset("cifar10", some_images(6), some_images(6), 10, (0.5,) * 3, (0.2,) * 3)
    file = tmp_path / "some.npz"
    cifar_files.pack(whole, 4, file, test=1)
    content = bytearray(file.read_bytes())
    content[3000] ^= 1  # a bit of an image
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"some.npz must contain packed images, but could not be read: Bad CRC"):
        cifar.load_cifar("cifar10", file)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"some.npz must contain packed images, but could not be read"):
        cifar.load_cifar("cifar10", file)
    arrays = {"train_images": np.zeros((2, 32, 32, 3), np.uint8), "train_labels": np.zeros(2, np.uint8), "train_of": 2}
    np.savez(file, name="cifar10", **arrays, **{k.replace("train", "test"): v for k, v in arrays.items()})
    with pytest.raises(ValueError, match=r"must contain bytes \(N, 3, 32, 32\) .* got uint8 of shape \(2, 32, 32, 3\)"):
        cifar.load_cifar("cifar10", file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pack", "16"], "--pack and FILE belong together"),
        (["--minutes", "-1"], "minutes and threads must be >= 0, got -1.0 and 0"),
        (["--wheels", "nowhere"], "--wheels must name a folder with wheels, got nowhere"),
    ],
)
def test_a_wrong_option_is_named(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(options)
    assert message in f"{ended.value.code}{capsys.readouterr().err}"


def dry_run(tmp_path, parts, *words):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry", "--minutes", "30", "--out", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{(tmp_path / 'log.txt').read_text()[-4000:]}"
    rows = runner.rows_of(tmp_path / "runs.jsonl")
    assert {r["part"] for r in rows} == {p.name for p in parts}
    assert all(r["state"] == "done" and r["dry"] and r["peak_mib"] > 1 for r in rows)
    log = (tmp_path / "log.txt").read_text()
    found = {p.name: [pattern for pattern, _ in p.patterns if re.search(pattern, log, re.MULTILINE)] for p in parts}
    assert all(found[p.name] for p in parts if p.patterns), f"patterns that no command printed: {found}"


@pytest.mark.commands
def test_parts_of_the_script_run_dry(tmp_path):
    parts = [p for p in gpu.PARTS if any(word in p.name for word in ("gsparsity", "digits example", "optimizers", "proxes"))]
    dry_run(tmp_path, parts, "--only", *(p.name for p in parts))
    assert {"optimizers.csv", "proxes.csv"} <= {f.name for f in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_whole_script_runs_dry(tmp_path):
    dry_run(tmp_path, gpu.PARTS)
    assert {"nas_cifar10.csv", "digits.csv", "optimizers.csv", "steps.csv"} <= {f.name for f in tmp_path.iterdir()}
