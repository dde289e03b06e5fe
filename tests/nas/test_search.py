"""Searches and trainings from the command line: files, stops, several processes, what goes wrong."""

import json
import math
import signal
from dataclasses import replace
from unittest.mock import Mock

import nas_cifar10
import pytest
import torch
import train_cifar10
from nas.bilevel.search_cifar import CifarSearch
from nas.data import cifar
from nas.engine import report
from nas.engine.distributed import SINGLE_PROCESS
from nas.engine.selection import select_by_training
from nas.engine.settings import RunSettings
from nas.engine.signals import Interrupted
from nas.methods import darts, registry
from nas.methods.settings import darts as darts_settings
from nas.space import genotype
from nas.train import short
from nas.train.settings import CIFAR_TRAIN_PRESETS
from nas.train.train_cifar import ImageTraining
from nas_cases import TINY, fake_cifar, rows_of


@pytest.fixture
def place(images):
    return ["--data-dir", str(images)]


PICTURES = ("cells.svg", "cells.png", "weights.png", "curves.png", "report.html")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparse_supernet", ["--space", "S1"]),
        ("ista", "--one-stage --space cherry --search-epochs 1 --extra-epochs 0 --epochs 1 --auxiliary 0".split()),
        ("gsparsity", "--space S1 --mu 0.05 --lr 0.1 --lr-min 0.1 --valid-images 16".split()),
    ],
)
def test_a_search_leaves_a_genotype_a_table_and_pictures(method, options, tmp_path, place, capsys):
    out = tmp_path / "out"
    (row,) = nas_cifar10.main(["--method", method, "--out", str(out), *TINY, *place, *options])
    said = capsys.readouterr().out
    assert "written" in said and ("the cut changes logits by 0\n" in said or method != "gsparsity")
    rows = rows_of(out / "search.csv")
    assert len(rows) == 2
    assert float(rows[-1]["valid_accuracy"]) == row["valid_accuracy"]
    for name in (*PICTURES, "settings.json", "checkpoint.pt"):
        assert (out / name).stat().st_size > 0
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "http://www.w3.org" in page and "<script" not in page
    assert len(list((out / "genotypes").glob("*.json"))) == 2
    train_cifar10.main(["--genotype", str(out / "genotype.json"), "--count", "--channels", "4", "--layers", "3"])
    assert json.loads(capsys.readouterr().out)["parameters"] > 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparse_supernet", []),
        ("sparse_supernet", ["--optimizer", "hapg", "--order", "second", "--space", "cherry"]),
        ("sparse_supernet", "--order second --hessian exact --space S1 --probe-every 2".split()),
        ("darts", ["--order", "second", "--space", "S3"]),
        ("darts", ["--amp", "--space", "cherry"]),
        ("ista", []),
        ("ista", "--recover-every 2 --matrix gaussian --order second --space S2 --sparsity 1".split()),
    ],
)
def test_every_option_of_a_search_runs(method, options, tmp_path, place):
    (row,) = nas_cifar10.main(["--method", method, "--out", str(tmp_path), *TINY, *place, *options, "--epochs", "1"])
    found = genotype.load_genotype(tmp_path / "genotype.json")
    assert [len(found.paths(cell)) for cell in genotype.CELLS] == [row["paths_normal"], row["paths_reduce"]]
    (written,) = rows_of(tmp_path / "search.csv")
    assert float(written["valid_loss"]) == row["valid_loss"] and 0 <= row["restricted_accuracy"] <= 1


def test_a_search_may_stand_for_its_best_sparse_epoch(tmp_path, images, monkeypatch):
    settings = darts_settings.DartsSettings(
        data_dir=images, images=32, batch=8, channels=2, layers=3, space="cherry", epochs=4, pick_below=20
    )
    run = CifarSearch(darts.Darts, settings, 0, tmp_path, SINGLE_PROCESS, torch.device("cpu"))
    found = [(12, 12, 0.9), (11, 9, 0.5), (9, 11, 0.7), (5, 5, 0.6)]
    columns = ("epoch", "paths_normal", "paths_reduce", "restricted_accuracy")
    run.rows = [dict(zip(columns, (epoch, *values))) for epoch, values in enumerate(found, 1)]
    assert run.result()["epoch"] == 3
    drawn = []
    monkeypatch.setattr(report, "write", lambda out, name, rows, point, *rest: drawn.append(point))
    run.points = [{"epoch": i + 1} for i in range(4)]
    for i in range(4):
        run.method.parameters[0].data[i] = 5.0 + i
        run.method.genotype().save(tmp_path / "genotypes" / f"epoch-{i + 1:03d}.json")
    run.finish()
    assert genotype.load_genotype(tmp_path / "genotype.json") == genotype.load_genotype(tmp_path / "genotypes" / "epoch-003.json")
    assert drawn == [{"epoch": 3}]
    run.rows = [{**row, "paths_normal": 12} for row in run.rows]
    assert run.result()["epoch"] == 4, "without a sparse epoch the last one counts"


@pytest.mark.usefixtures("no_pictures")
def test_a_new_method_is_a_class_and_a_row_of_the_registry(tmp_path, place, monkeypatch):
    class Fixed(darts.Darts):
        """Never changes its logits."""

        name = "fixed"

        def update(self, grads):
            pass

    monkeypatch.setitem(registry.CIFAR, "fixed", registry.bilevel(CifarSearch, Fixed, darts_settings.CIFAR_PRESETS))
    (row,) = nas_cifar10.main(["--method", "fixed", "--space", "cherry", "--out", str(tmp_path), *TINY, *place, "--epochs", "1"])
    assert row["paths_normal"] > 0 and json.loads((tmp_path / "settings.json").read_text())["method"] == "fixed"


@pytest.mark.usefixtures("no_pictures")
def test_several_seeds_get_a_folder_each_and_a_table(tmp_path, place, capsys):
    options = "--method darts --space cherry --seeds 0 1".split()
    rows = nas_cifar10.main([*options, "--out", str(tmp_path / "out"), *TINY, *place, "--epochs", "1"])
    assert [row["seed"] for row in rows] == [0, 1]
    text = capsys.readouterr().out
    assert "mean" in text and "spread" in text
    assert (tmp_path / "out" / "seed-1" / "genotype.json").exists()


def test_a_training_on_a_folder_of_images(tmp_path, capsys):
    from PIL import Image

    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "tree" / split / label).mkdir(parents=True)
            for i in range(4):
                color = (40 * i, 255 if label == "cat" else 0, 10)
                Image.new("RGB", (70 + i, 60), color).save(tmp_path / "tree" / split / label / f"{i}.png")
    options = (
        "--imagenet --preset small --epochs 1 --batch 4 --channels 2 --layers 3 --pixels 64 --workers 0 --auxiliary 0".split()
    )
    tree = ["--data-dir", str(tmp_path / "tree")]
    (row,) = train_cifar10.main([*options, *tree, "--out", str(tmp_path / "out")])
    assert 0 <= row["valid_accuracy"] <= row["valid_top5"] == 1.0
    (tmp_path / "tree" / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"0\.png must be an image"):
        train_cifar10.main([*options, *tree, "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="--data-dir must contain a folder 'train'"):
        train_cifar10.main([*options, "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "other")])


@pytest.mark.usefixtures("no_pictures")
def test_what_goes_wrong_is_said_in_one_sentence(tmp_path, place):
    out = ["--out", str(tmp_path / "out")]
    run = lambda *more: nas_cifar10.main([*TINY, "--space", "cherry", *place, *out, *more])
    for more, message in (
        (["--space", "S9"], "unknown convolutional space 'S9'"),
        (["--images", "100000"], "images must be at most 160, got 100000"),
        (["--device", "tpu"], "device must be one of auto, cpu.*, got 'tpu'"),
        (["--threads", "-1"], "threads must be >= 0, got -1"),
        (["--seeds"], "--seeds must name at least one seed, got none"),
        (["--l1-ratio", "3"], r"l1_ratio must lie in \[0, 1\], got 3.0"),
        (["--order", "secnd"], "--order must be one of first, second, got 'secnd'; did you mean second"),
        (["--preset", "smal"], "--preset must be one of paper, small, .*, got 'smal'; did you mean small"),
        (["--device", "cuds"], "--device must be one of auto, cpu, cuda, gpu, tpu, got 'cuds'; did you mean cuda"),
        (["--data", "folde"], "--data must be one of cifar10, cifar100, folder, got 'folde'; did you mean folder"),
        (["--space", "dart"], "unknown convolutional space 'dart'; did you mean 'darts'"),
        (["--method", "ist"], "got 'ist'; did you mean ista"),
        (["--process", "1"], "--process belongs to --framework jax"),
        (["--method", "random"], "--method must be one of darts, gsparsity, ista, pc_darts, sparse_supernet, got 'random'"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*more)
    with pytest.raises(SystemExit, match="--one-stage belongs to --method ista, got --method sparse_supernet"):
        run("--one-stage")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    run("--epochs", "1")
    with pytest.raises(SystemExit, match="already contains a run"):
        run("--epochs", "1")
    with pytest.raises(SystemExit, match=r"--resume must continue .* in the checkpoint lr is 0\.025, not 0\.5"):
        run("--epochs", "1", "--resume", "--lr", "0.5")
    file = tmp_path / "out" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"checkpoint.pt must be a complete checkpoint"):
        run("--epochs", "1", "--resume")


def test_damaged_and_missing_data_are_named(tmp_path, images):
    fake_cifar(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .* could not be downloaded .* Get http://localhost"):
        cifar.load_cifar("cifar10", tmp_path / "none")
    file = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2 must have the md5 .* the file is damaged"):
        cifar.load_cifar("cifar10", tmp_path / "data")
    with pytest.raises(ValueError, match="data must be one of cifar10, cifar100, got 'mnist'"):
        cifar.load_cifar("mnist", tmp_path)


def test_batches_are_a_function_of_seed_epoch_and_number(images):
    found = cifar.load_cifar("cifar10", images)
    augment = cifar.Augment(found.mean, found.std, padding=4, cutout=8)
    batches = cifar.Batches(found.train, 16, 3, augment)
    first = list(batches.epoch(2))
    for (a, b), (c, d) in zip(first[5:], batches.epoch(2, start=5), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(first[0][0], next(iter(batches.epoch(3)))[0])
    parts = [list(cifar.Batches(found.train, 16, 3, augment, share=cifar.Share(r, 2)).epoch(2)) for r in (0, 1)]
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
    plain = cifar.Augment((0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(plain(images), (images / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-5)
    moved = cifar.Augment((0.0,) * 3, (1 / 255,) * 3, padding=4)(images).round().to(torch.uint8)
    padded = torch.nn.functional.pad(images[:1], (4,) * 4)
    windows = [padded[:, :, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    windows = torch.cat([w for window in windows for w in (window, window.flip(3))])
    assert all(bool((windows == m).flatten(1).all(1).any()) for m in moved)
    blank = cifar.Augment((0.0,) * 3, (1.0,) * 3, cutout=16)(images + 1) == 0
    areas = blank[:, 0].flatten(1).sum(1)
    assert int(areas.max()) == 256 and int(areas.min()) >= 64


@pytest.mark.usefixtures("no_pictures")
def test_results_of_several_seeds_are_compared_by_a_short_training(tmp_path, place, capsys, monkeypatch):
    options = [*"--method darts --space cherry --seeds 0 1 --epochs 1 --select-by-training 1".split(), "--out", str(tmp_path)]
    small = replace(CIFAR_TRAIN_PRESETS["small"], channels=2, layers=3)
    monkeypatch.setitem(CIFAR_TRAIN_PRESETS, "small", small)
    rows = nas_cifar10.main([*TINY, *place, *options])
    best = max(rows, key=lambda row: row["selection_accuracy"])
    assert [row["selected"] for row in rows] == [int(row is best) for row in rows]
    assert f"selected: seed {best['seed']}" in capsys.readouterr().out
    read = lambda folder: genotype.load_genotype(folder / "genotype.json")
    assert read(tmp_path) == read(tmp_path / f"seed-{best['seed']}")
    (tmp_path / "genotype.json").unlink()
    assert nas_cifar10.main(["--resume", "--out", str(tmp_path)]) == rows, "the folder is all that it needs"
    assert read(tmp_path) == read(tmp_path / f"seed-{best['seed']}")
    table = rows_of(tmp_path / "seeds.csv")
    assert [float(row["selection_accuracy"]) for row in table] == [row["selection_accuracy"] for row in rows]
    assert len(rows_of(tmp_path / "seed-0" / "selection" / "train.csv")) == 1
    steps = []
    monkeypatch.setattr(ImageTraining, "train_step", lambda self, batch: steps.append(batch))
    assert nas_cifar10.main([*TINY, *place, *options, "--resume"]) == rows
    assert not steps, "a finished training is not repeated"
    monkeypatch.setattr(short, "train_images", Mock(side_effect=Interrupted(signal.SIGTERM)))
    with pytest.raises(SystemExit, match="143"):
        nas_cifar10.main([*TINY, *place, *options, "--resume"])
    assert "stopped by SIGTERM; continue with: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--select-by-training must be a whole number >= 1, got '0'"):
        nas_cifar10.main(["--select-by-training", "0"])


def test_a_result_with_an_empty_cell_is_not_selected(tmp_path):
    settings = RunSettings(out=tmp_path, seeds=(0, 1, 2))
    whole = genotype.load_genotype("DARTS_V2")
    empty = genotype.Genotype.from_paths(normal=(), reduce=whole.paths("reduce"))
    for seed, found in enumerate((whole, empty, genotype.load_genotype("PDARTS"))):
        found.save(tmp_path / f"seed-{seed}" / "genotype.json")
    accuracies = {"seed-0": 0.5, "seed-2": 0.75}
    train = lambda found, folder: {"valid_accuracy": accuracies[folder.parent.name]}
    rows = [{"seed": seed, "loss": 1.0} for seed in settings.seeds]
    found = select_by_training(settings, rows, ["loss"], train, "valid_accuracy")
    assert [row["selected"] for row in found] == [0, 0, 1] and math.isnan(found[1]["selection_accuracy"])
    assert genotype.load_genotype(tmp_path / "genotype.json") == genotype.load_genotype("PDARTS")
