"""Searches and trainings from the command line: files, stops, several processes, what goes wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nas_against_random
import nas_cifar10
import nas_kendall
import nas_recovery
import nas_sweeps
import pytest
import torch
import train_cifar10
from nas import checkpoint, data, genotype
from nas_cases import TINY, fake_cifar

HERE = Path(__file__).parent
TRAINING = {"images": 32, "epochs": 1, "batch": 16, "channels": 4, "layers": 3}
PROGRAM = """
import sys
from pathlib import Path
import nas_cases, nas_cifar10, train_cifar10
nas_cases.fake_cifar(Path(sys.argv[1]))
{"search": nas_cifar10, "train": train_cifar10}[sys.argv[2]].main(sys.argv[3:])
"""


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SOURCES", dict(data.SOURCES))
    fake_cifar(tmp_path / "data")
    return ["--data-dir", str(tmp_path / "data")]


def program(tmp_path, *argv, launch=()):
    paths = [HERE, HERE.parent / "examples", HERE.parent / "benchmarks"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    command = [sys.executable, *launch, str(file), str(tmp_path / "data"), *argv]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def rows_of(file):
    with Path(file).open() as opened:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(opened)]


def same_state(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparse_supernet", []),
        ("sparse_supernet", ["--optimizer", "hapg", "--order", "second", "--space", "cherry"]),
        ("sparse_supernet", "--order second --hessian exact --space S1 --probe-every 2".split()),
        ("darts", ["--order", "second"]),
        ("darts", ["--amp"]),
        ("ista", []),
        ("ista", "--recover-every 2 --matrix gaussian --order second --space S2 --sparsity 1".split()),
        ("ista", "--one-stage --search-epochs 1 --epochs 2".split()),
    ],
)
def test_a_search_leaves_a_genotype_a_table_and_pictures(method, options, tmp_path, images, capsys):
    out = tmp_path / "out"
    (row,) = nas_cifar10.main(["--method", method, "--out", str(out), *TINY, *images, *options])
    assert "written" in capsys.readouterr().out
    rows = rows_of(out / "search.csv")
    assert len(rows) == 3
    assert float(rows[-1]["valid_accuracy"]) == row["valid_accuracy"]
    for name in ("cells.svg", "cells.png", "weights.png", "curves.png", "report.html", "settings.json", "checkpoint.pt"):
        assert (out / name).stat().st_size > 0
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "http://www.w3.org" in page and "<script" not in page
    assert len(list((out / "genotypes").glob("*.json"))) == 3
    train_cifar10.main(["--genotype", str(out / "genotype.json"), "--count"])
    assert json.loads(capsys.readouterr().out)["parameters"] > 0


def test_a_killed_search_goes_on_bit_for_bit(tmp_path, images):
    options = ["search", "--method", "sparse_supernet", *TINY, *images, "--checkpoint-minutes", "0", "--strength-step", "0.3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(program(tmp_path, *options, "--out", str(whole)))
    process = program(tmp_path, *options, "--out", str(killed))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = killed / "checkpoint.pt"
        if file.exists() and checkpoint.load(file)["progress"]["epoch"] == 1 and checkpoint.load(file)["progress"]["step"] >= 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "report.html").exists()
    assert "--resume" in program(tmp_path, *options, "--out", str(killed)).communicate()[0]
    finished(program(tmp_path, *options, "--out", str(killed), "--resume"))
    assert rows_of(whole / "search.csv") == rows_of(killed / "search.csv")
    states = [checkpoint.load(d / "checkpoint.pt") for d in (whole, killed)]
    assert same_state(*(s["state"] for s in states))
    assert (whole / "cells.svg").read_text() == (killed / "cells.svg").read_text()


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, images):
    options = "train --preset small --images 96 --epochs 3 --batch 16 --channels 4 --layers 3 --threads 1 --device cpu".split()
    options += [*images, "--checkpoint-minutes", "0", "--genotype", "ISTA"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(program(tmp_path, *options, "--out", str(whole)))
    process = program(tmp_path, *options, "--out", str(killed))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = killed / "checkpoint.pt"
        if file.exists() and checkpoint.load(file)["progress"]["epoch"] >= 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished(program(tmp_path, *options, "--out", str(killed), "--resume"))
    assert rows_of(whole / "train.csv") == rows_of(killed / "train.csv")
    networks = [checkpoint.load(d / "network.pt") for d in (whole, killed)]
    assert same_state(*networks)
    assert (killed / "train.png").stat().st_size > 0


@pytest.mark.parametrize("method", ["sparse_supernet", "darts"])
def test_two_processes_search_the_same_architecture(method, tmp_path, images):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "out"
    finished(
        program(tmp_path, "search", "--method", method, *TINY, *images, "--out", str(out), "--order", "second", launch=launch)
    )
    assert len(rows_of(out / "search.csv")) == 3
    assert checkpoint.load(out / "checkpoint.pt")["identity"]["processes"] == 2


def test_a_search_may_stand_for_its_best_sparse_epoch(tmp_path, images):
    out = tmp_path / "out"
    more = ["--strength-step", "0.5", "--pick-below", "150", "--epochs", "5"]
    row = nas_cifar10.main([*TINY, *images, *more, "--out", str(out)])[0]
    rows = rows_of(out / "search.csv")
    sparse = [r for r in rows if int(r["paths_normal"]) + int(r["paths_reduce"]) <= 150]
    assert sparse and row["restricted_accuracy"] == max(float(r["restricted_accuracy"]) for r in sparse)
    found = genotype.load(out / "genotype.json")
    assert found == genotype.load(out / "genotypes" / f"epoch-{row['epoch'] + 1:03d}.json")
    assert len(found.paths("normal")) == row["paths_normal"]


def test_several_seeds_get_a_folder_each_and_a_table(tmp_path, images, capsys):
    rows = nas_cifar10.main(
        ["--method", "darts", "--out", str(tmp_path / "out"), "--seeds", "0", "1", *TINY, *images, "--epochs", "1"]
    )
    assert [row["seed"] for row in rows] == [0, 1]
    text = capsys.readouterr().out
    assert "mean" in text and "spread" in text
    assert (tmp_path / "out" / "seed-1" / "genotype.json").exists()


def test_a_training_on_a_folder_of_images(tmp_path, capsys):
    from PIL import Image

    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "tree" / split / label).mkdir(parents=True)
            for i in range(8):
                color = (40 * i, 255 if label == "cat" else 0, 10)
                Image.new("RGB", (70 + i, 60), color).save(tmp_path / "tree" / split / label / f"{i}.png")
    options = (
        "--imagenet --preset small --epochs 2 --batch 4 --channels 4 --layers 3 --pixels 64 --workers 0 --auxiliary 0".split()
    )
    place = ["--data-dir", str(tmp_path / "tree"), "--out", str(tmp_path / "out")]
    (row,) = train_cifar10.main([*options, *place])
    assert 0 <= row["valid_accuracy"] <= row["valid_top5"] == 1.0
    (tmp_path / "tree" / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"0\.png must be an image"):
        train_cifar10.main([*options, *place[:2], "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="--data-dir must hold a folder 'train'"):
        train_cifar10.main([*options, "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "other")])


def test_what_goes_wrong_is_said_in_one_sentence(tmp_path, images, capsys):
    out = ["--out", str(tmp_path / "out")]
    run = lambda *more: nas_cifar10.main([*TINY, *images, *out, *more])
    for more, message in (
        (["--space", "S9"], "unknown convolutional space 'S9'"),
        (["--images", "100000"], "images must be at most 320, got 100000"),
        (["--device", "tpu"], "device must be one of auto, cpu.*, got 'tpu'"),
        (["--threads", "-1"], "threads must be >= 0, got -1"),
        (["--seeds"], "--seeds must name at least one seed, got none"),
        (["--method", "random"], "--method must be one of darts, gsparsity, ista, sparse_supernet, got 'random'"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*more)
    with pytest.raises(SystemExit, match="--one-stage belongs to --method ista, got --method sparse_supernet"):
        run("--one-stage")
    with pytest.raises(SystemExit):
        run("--l1-ratio", "3")
    assert "l1_ratio must lie in [0, 1], got 3.0" in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    run("--epochs", "1")
    with pytest.raises(SystemExit, match="holds a run already"):
        run("--epochs", "1")
    with pytest.raises(SystemExit, match=r"--resume must continue .* there lr is 0\.025, not 0\.5"):
        run("--epochs", "1", "--resume", "--lr", "0.5")
    file = tmp_path / "out" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"checkpoint.pt must be a whole checkpoint"):
        run("--epochs", "1", "--resume")


def test_damaged_and_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .* could not be downloaded .* Get http://localhost"):
        data.load("cifar10", tmp_path / "none")
    file = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2 must have the md5 .* the file is damaged"):
        data.load("cifar10", tmp_path / "data")
    with pytest.raises(ValueError, match="data must be one of cifar10, cifar100, got 'mnist'"):
        data.load("mnist", tmp_path)


def test_batches_are_a_function_of_seed_epoch_and_number(tmp_path):
    found = data.load("cifar10", tmp_path / "data")
    augment = data.Augment(found.mean, found.std, padding=4, cutout=8)
    batches = data.Batches(found.train, 16, 3, augment)
    first = list(batches.epoch(2))
    for (a, b), (c, d) in zip(first[5:], batches.epoch(2, start=5), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(first[0][0], next(iter(batches.epoch(3)))[0])
    parts = [list(data.Batches(found.train, 16, 3, augment, share=data.Share(r, 2)).epoch(2)) for r in (0, 1)]
    assert torch.equal(torch.stack([parts[0][0][0], parts[1][0][0]], 1).flatten(0, 1), first[0][0])
    seen = torch.cat([y for _, y in first]).sort().values
    assert torch.equal(seen, found.train.labels.sort().values)


def test_augmentation_crops_flips_and_blanks():
    images = (
        torch.arange(1, 1 + 3 * 32 * 32, dtype=torch.int64)
        .remainder(251)
        .to(torch.uint8)
        .reshape(1, 3, 32, 32)
        .expand(64, -1, -1, -1)
    )
    plain = data.Augment((0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(plain(images), (images / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-5)
    moved = data.Augment((0.0,) * 3, (1 / 255,) * 3, padding=4)(images).round().to(torch.uint8)
    padded = torch.nn.functional.pad(images[:1], (4,) * 4)
    windows = [padded[:, :, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    windows = torch.cat([w for window in windows for w in (window, window.flip(3))])
    assert all(bool((windows == m).flatten(1).all(1).any()) for m in moved)
    blank = data.Augment((0.0,) * 3, (1.0,) * 3, cutout=16)(images + 1) == 0
    areas = blank[:, 0].flatten(1).sum(1)
    assert int(areas.max()) == 256 and int(areas.min()) >= 64


def test_a_sweep_searches_every_value_and_goes_on(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setitem(nas_sweeps.train.PRESETS, "small", nas_sweeps.train.CifarSettings(**TRAINING))
    out = ["--out", str(tmp_path / "out"), *images]
    options = "--values 0.01 0.5 --epochs 1 --images 64 --batch 16 --channels 4 --layers 3 --train".split()
    nas_sweeps.main([*out, *options])
    rows = rows_of(tmp_path / "out" / "sweep.csv")
    assert [float(row["strength_step"]) for row in rows] == [0.01, 0.5]
    assert all(0 <= float(row["test_error"]) <= 1 for row in rows)
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    nas_sweeps.main([*out, *options])
    assert rows_of(tmp_path / "out" / "sweep.csv") == rows


@pytest.mark.parametrize("stages", ["two", "one"])
def test_kendalls_tau_compares_search_and_evaluation(stages, tmp_path, images, capsys, monkeypatch):
    monkeypatch.setitem(nas_kendall.train.PRESETS, "small", nas_kendall.train.CifarSettings(**TRAINING))
    options = "--seeds 0 1 3 --epochs 1 --images 64 --batch 16 --channels 4 --layers 3".split()
    if stages == "one":
        options += ["--one-stage"]
        small = nas_kendall.replace(nas_kendall.one_stage.PRESETS["small"], search_epochs=1)
        monkeypatch.setitem(nas_kendall.one_stage.PRESETS, "small", small)
    tau = nas_kendall.main([*options, *images, "--out", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "kendall.csv")
    pairs = [(float(r["search_accuracy"]), float(r["evaluation_accuracy"])) for r in rows]
    assert len(pairs) == 3 and all(0 <= v <= 1 for pair in pairs for v in pair)
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for i, a in enumerate(pairs) for b in pairs[:i]]
    if all(signs):
        assert tau == pytest.approx(sum(1 if s > 0 else -1 for s in signs) / 3)
    assert "Kendall's tau" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        nas_kendall.main([*images, "--seeds", "0"])
    with pytest.raises(SystemExit):
        nas_kendall.main([*images, "--method", "darts", "--one-stage"])


def test_recovery_improves_with_rows(tmp_path, capsys):
    nas_recovery.main(["--rows", "3", "9", "--draws", "40", "--out", str(tmp_path)])
    rows = {(r["matrix"], r["rows"], r["paths"]): float(r["recovered"]) for r in rows_of(tmp_path / "recovery.csv")}
    for kind in ("uniform", "gaussian"):
        assert rows[kind, "3", "35"] < rows[kind, "9", "35"] <= 1
        assert rows[kind, "9", "14"] >= 0.8
    assert (tmp_path / "recovery.png").stat().st_size > 10_000


def test_random_genotypes_of_the_same_size_are_trained_alike(tmp_path, images, capsys):
    options = "--genotype PC_DARTS --random 1 --seeds 0 1 --epochs 1 --images 32 --batch 16 --channels 4 --layers 3".split()
    nas_against_random.main([*options, *images, "--out", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "against_random.csv")
    assert [(r["genotype"], r["seed"]) for r in rows] == [(g, s) for g in ("searched", "random 0") for s in ("0", "1")]
    sizes = {r["genotype"]: int(r["parameters"]) for r in rows}
    assert abs(sizes["random 0"] / sizes["searched"] - 1) <= 0.3
    drawn = genotype.load(tmp_path / "out" / "random-0" / "seed-0" / "genotype.json")
    assert drawn.clean() == drawn
    assert [len(drawn.paths(c)) for c in ("normal", "reduce")] == [8, 8]
    assert "random 0" in capsys.readouterr().out
