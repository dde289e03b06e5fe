"""The pruning scripts: what they train, cut, compare, write and load."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import prune_convnet
import prune_transformer
import pruning
import pytest
import torch
from nas.data.text import load_corpus
from nas.engine.command_line import field_texts
from nas.engine.distributed import SINGLE_PROCESS, Processes
from nas_cases import TINY_TRANSFORMER, same
from pruning import comparison, networks, pictures
from pruning.images import ConvnetSettings, Images
from pruning.settings import PruningSettings
from pruning.task import Layer
from pruning.text import Text, TransformerSettings, characters_of
from pruning.training import Pruning
from torch import nn

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY_IMAGES = ConvnetSettings(images=32, batch=8, blocks=1, width=4, epochs=2, valid_images=16, epoch_images=6, threads=1)
TINY_TEXT = TransformerSettings(
    characters=800, batch=8, length=16, layers=1, width=8, heads=4, hidden=16, epochs=2, dropout=0.0, threads=1
)


def message(stop):
    """What a program says that ends with an error."""
    with pytest.raises(SystemExit) as stopped:
        stop()
    return str(stopped.value)


def rows_in(file):
    with file.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(tmp_path_factory, corpus):
    """The rows and the folder of a pruning of a transformer."""
    out = tmp_path_factory.mktemp("cut") / "out"
    options = "--epochs 8 --macs 0.6 --lr 0.01 --start 0 --due 0.9 --tolerance 0.1".split()
    rows = prune_transformer.main([*TINY_TRANSFORMER, *options, "--data-dir", str(corpus), "--out", str(out)])
    return rows, out


def test_the_compact_network_is_smaller_and_computes_the_same(cut):
    (dense, sparse, compact), out = cut
    assert [row["network"] for row in (dense, sparse, compact)] == ["dense", "sparse", "compact"]
    assert compact["parameters"] < sparse["parameters"] == dense["parameters"]
    assert compact["macs"] < sparse["macs"] == dense["macs"]
    assert compact["largest_change"] < 1e-5
    assert compact["valid_bits"] == pytest.approx(sparse["valid_bits"], rel=1e-5) != dense["valid_bits"]
    assert all(0 < row["latency_low"] <= row["latency_ms"] <= row["latency_high"] for row in (dense, sparse, compact))
    assert [row["network"] for row in rows_in(out / "table.csv")] == ["dense", "sparse", "compact"]


def test_what_the_budget_counts_is_what_the_cut_leaves(cut):
    (dense, _, compact), out = cut
    share = float(rows_in(out / "sparse" / "budget.csv")[-1]["share"])
    assert compact["macs"] == round(share * dense["macs"])
    layers = rows_in(out / "layers.csv")
    assert [layer["kind"] for layer in layers] == ["attention heads", "hidden units"]
    net = pruning.load(out)
    assert [int(layer["after"]) for layer in layers] == [
        len(net.blocks[0].attention.query.weight) // 2,
        len(net.blocks[0].fc1.weight),
    ]
    assert [int(layer["before"]) for layer in layers] == [4, 16] and (out / "pruning.png").stat().st_size > 10_000


def test_the_compact_network_is_loaded_and_evaluated(cut, tmp_path, capsys):
    (*_, compact), out = cut
    net = pruning.load(out)
    assert not net.training and sum(p.numel() for p in net.parameters()) == compact["parameters"]
    (row,) = prune_transformer.main(["--evaluate", str(out)])
    assert row["valid_bits"] == compact["valid_bits"] and f"{compact['parameters']} parameters" in capsys.readouterr().out
    assert "must be of a run of prune_convnet.py, but is of one of prune_transformer.py" in message(
        lambda: prune_convnet.main(["--evaluate", str(out)])
    )
    other = tmp_path / "other.txt"
    other.write_text("w §\n" * 400, encoding="utf-8")
    said = message(lambda: prune_transformer.main(["--evaluate", str(out), "--data-dir", str(other)]))
    assert "the text must have the 13 symbols of the network, got '§'" in said


def test_a_pruning_that_has_ended_is_not_repeated(cut, capsys):
    rows, out = cut
    assert "already contains a run" in message(lambda: prune_transformer.main(["--out", str(out)]))
    assert same(rows, prune_transformer.main(["--resume", "--out", str(out)]))
    assert "steps    " not in capsys.readouterr().err, "no training says what it will compute"


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a pruning that has ended, with compact\.pt"):
        pruning.load(tmp_path)
    torch.save({"weights": {}}, tmp_path / "compact.pt")
    with pytest.raises(ValueError, match="must be the compact network of a pruning, but it has no network"):
        pruning.load(tmp_path)
    content = {
        "network": "ResNet",
        "arguments": {"blocks": 1, "width": 2},
        "about": {},
        "weights": {"a": torch.ones(1)},
        "sizes": {},
    }
    torch.save(content, tmp_path / "compact.pt")
    with pytest.raises(ValueError, match="must hold a network that fits its description"):
        pruning.load(tmp_path)
    (tmp_path / "seed-0").mkdir()
    os.replace(tmp_path / "compact.pt", tmp_path / "seed-0" / "compact.pt")
    with pytest.raises(FileNotFoundError, match=r"there are some in .*seed-0"):
        pruning.load(tmp_path)


def test_an_evaluation_refuses_what_it_cannot_compute_in_one_line(cut, tmp_path):
    _, out = cut
    evaluated = lambda folder, *words: message(lambda: prune_transformer.main(["--evaluate", str(folder), *words]))
    assert evaluated(out, "--length", "32").startswith("error: length must be at most 16, as the network reads no more symbols")
    assert evaluated(out, "--threads", "-1") == "error: threads must be >= 0, got -1"
    content = torch.load(out / "compact.pt", weights_only=True)
    for about in ({}, None, {"symbols": None}):
        torch.save({**content, "about": about}, tmp_path / "compact.pt")
        assert "compact.pt must hold the symbols of the data as a str, got None" in evaluated(tmp_path)
    for network in ("F", "torch", "nobody"):
        torch.save({**content, "network": network}, tmp_path / "compact.pt")
        assert "must be the compact network of a pruning, but it has no network" in evaluated(tmp_path)
    torch.save({**content, "sizes": [1]}, tmp_path / "compact.pt")
    assert r"but sizes must be a dict of integers by name or None, got [1]" in evaluated(tmp_path)


BAD = [
    (["--macs", "1.5"], r"macs must lie in \(0, 1\), got 1.5"),
    (["--due", "0.05"], r"due must lie in \(start, 1\] = \(0.1, 1\], got 0.05"),
    (["--lr", "0"], "lr must be finite and > 0, or auto, got 0"),
    (["--momentum", "1"], r"momentum must lie in \[0, 1\), got 1.0"),
    (["--penalty", "sparse_group_lasso", "--l1-ratio", "0"], r"l1_ratio must lie in \(0, 1\), got 0"),
    (["--l1-ratio", "0.2"], r"l1_ratio must be auto with the penalty group_lasso, .* got 0\.2"),
    (["--measurements", "0"], "measurements must be >= 1, got 0"),
    (["--weight-decay", "-1"], "weight_decay must be finite and >= 0, got -1"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_settings_outside_their_domain_are_refused(options, said, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {said}"):
        prune_convnet.main([*options, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_settings_of_a_network_outside_their_domain_are_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="blocks must be >= 1, got 0"):
        replace(TINY_IMAGES, blocks=0)
    with pytest.raises(ValueError, match="heads must divide the width 8, got 3"):
        replace(TINY_TEXT, heads=3)
    with pytest.raises(ValueError, match="length must be >= 2, got 1"):
        replace(TINY_TEXT, length=1)
    with pytest.raises(ValueError, match="batch must leave a text of 16016 characters, got 1000 for 800"):
        Text(replace(TINY_TEXT, data_dir=corpus, batch=1000), 0, CPU)
    with pytest.raises(ValueError, match="heads must be >= 1 and divide the width 8, got 3"):
        networks.GPT(5, 1, 8, 3, 4, 4)
    with pytest.raises(ValueError, match="width must be >= 1, got 0"):
        networks.resnet20(0)
    two = Processes(0, 2)
    with pytest.raises(ValueError, match="a network is pruned by one process; start it without torchrun, got 2 processes"):
        Pruning(Text, replace(TINY_TEXT, data_dir=corpus), True, 0, tmp_path, two, CPU)


@pytest.mark.parametrize("script", [prune_convnet, prune_transformer])
def test_every_setting_has_a_help_text_and_every_preset_a_default(script):
    texts = field_texts(type(script.PRESETS["full"]))
    assert not {f.name for f in fields(script.PRESETS["full"])} - {*texts} and all(len(text) > 15 for text in texts.values())
    assert len({tuple(preset.plain()) for preset in (type(script.PRESETS["full"])(), *script.PRESETS.values())}) == 1


# -- the training -----------------------------------------------------------------------------


def trained(task, settings, sparse, out, steps=3):
    """A training after some steps."""
    run = Pruning(task, settings, sparse, 0, out, SINGLE_PROCESS, CPU)
    run.begin_epoch()
    for batch, _ in zip(run.batches(), range(steps)):
        run.train_step(batch)
        run.step += 1
    return run


@pytest.mark.parametrize("optimizer", ["proxsgd", "proxadam"])
def test_without_strength_the_sparse_training_is_the_dense_one(optimizer, images, tmp_path):
    settings = replace(TINY_IMAGES, data_dir=images, optimizer=optimizer, start=0.9, due=1.0)
    runs = [trained(Images, settings, sparse, tmp_path / str(sparse)) for sparse in (True, False)]
    assert runs[0].budget.record.strength == 0.0
    for (name, a), (_, b) in zip(*(run.net.named_parameters() for run in runs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_the_learning_rate_grows_and_falls_to_zero():
    settings = PruningSettings(lr=0.5, warmup=0.2)
    assert [settings.rate(done) for done in (0.0, 0.1, 0.2)] == [0.0, 0.25, 0.5]
    assert settings.rate(0.6) == pytest.approx(0.25) and settings.rate(1.0) == pytest.approx(0.0)
    assert replace(TINY_IMAGES, optimizer="proxadam").largest_lr == ConvnetSettings.usual_lr["proxadam"]


# -- networks and data ------------------------------------------------------------------------


def test_the_residual_network_is_that_of_the_paper():
    net = networks.resnet20()
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for name, m in net.named_modules() if "shortcut" not in name) == 20
    assert [len(stage[0].conv1.weight) for stage in net.stages] == [16, 32, 64]
    block, x = networks.BasicBlock(4, 8, 2).eval(), torch.randn(2, 4, 6, 6)
    weight, norm = block.shortcut[0].weight, block.shortcut[1]
    inner = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), (inner + norm(nn.functional.conv2d(x, weight, stride=2))).relu())


def test_the_language_model_sees_no_later_symbol():
    torch.manual_seed(0)
    net = networks.GPT(7, 2, 8, 4, 16, 6).eval()
    symbols = torch.randint(7, (2, 6))
    other = symbols.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 7
    before, after = net(symbols), net(other)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any()


def test_a_text_is_spelt_as_in_its_file(corpus):
    read = load_corpus(corpus)
    assert characters_of(read, read.valid) == (corpus / "valid.txt").read_text()


def test_the_windows_of_an_epoch_follow_each_other_and_go_on_after_a_stop(corpus):
    task = Text(replace(TINY_TEXT, data_dir=corpus), 3, CPU)
    task.train = torch.arange(len(task.train))  # so that the characters are their places
    found = list(task.batches(1, 0))
    assert len(found) == task.steps() == (800 // 16 - 1) // 8
    inputs, targets = (torch.cat(part) for part in zip(*found))
    places = inputs.sort(0).values
    assert torch.equal(targets, inputs + 1) and len(inputs.unique()) == inputs.numel(), "no character is read twice"
    assert ((places[:, 0] - places[0, 0]) % 16 == 0).all() and torch.equal(inputs, inputs[:, :1] + torch.arange(16))
    again = list(task.batches(1, 2))
    assert all(torch.equal(a, b) for one, other in zip(found[2:], again, strict=True) for a, b in zip(one, other))
    assert not torch.equal(found[0][0], next(task.batches(2, 0))[0])


def test_only_some_images_are_evaluated_after_an_epoch(images):
    task = Images(replace(TINY_IMAGES, data_dir=images), 0, CPU)
    seen = []

    class Counting(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return torch.zeros(len(x), 10)

    task.evaluate(Counting(), whole=False)
    task.evaluate(Counting())
    assert seen == [6, 16]


# -- the comparison ---------------------------------------------------------------------------


def test_the_table_shows_shares_of_the_first_network():
    row = {"network": "dense", "valid_accuracy": 0.5, "parameters": 2000, "macs": 10_000}
    times = {"latency_ms": 2.0, "latency_low": 1.5, "latency_high": 3.25}
    rows = [{**row, **times}, {**row, **times, "network": "compact", "parameters": 500, "macs": 4500}]
    head, dense, compact = comparison.table(rows, Images.qualities).splitlines()
    assert head.split("  ")[0] == "network" and len(head) == len(dense) == len(compact)
    assert "2 000 (100.0 %)" in dense and "500 (25.0 %)" in compact
    assert re.search(r" 4 500 \(45\.0 %\) +2\.00 \(1\.50 - 3\.25\)$", compact)


def test_times_are_taken_in_turns(monkeypatch):
    order = []
    pretended = lambda net, example: (order.append(net), 3.0 if net == "a" else float(len(order)))[1]
    monkeypatch.setattr(comparison, "milliseconds", pretended)
    found = comparison.latencies({"dense": "a", "compact": "b"}, torch.zeros(1), 3)
    assert order == ["a", "b"] * 4 and found == {"dense": (3.0, 3.0, 3.0), "compact": (5.0, 6.0, 7.0)}


def test_a_picture_has_the_numbers_of_all_layers():
    layers = [Layer("one", "channels", 8, 3), Layer("two", "channels", 4, 4), Layer("one", "heads", 2, 1)]
    sparse = [{"epoch": e, "valid_accuracy": 0.1 * e} for e in (1, 2)]
    measured = [{"step": s, "share": 1 - s / 20, "wanted": 1.0, "frozen": s == 8} for s in (4, 8)]
    figure = pictures.pruning(layers, sparse, [], measured, 4, Images.qualities[0])
    bars, heads, quality, share = figure.axes
    assert [text.get_text() for text in bars.texts] == ["3", "4"] and [text.get_text() for text in heads.texts] == ["1"]
    assert list(quality.lines[0].get_ydata()) == pytest.approx([10, 20])
    assert list(share.lines[1].get_ydata()) == pytest.approx([80, 60])
    assert list(share.lines[-1].get_xdata()) == [2, 2], "the zeros are frozen after two epochs"
    pictures.plt.close(figure)


# -- whole command lines ----------------------------------------------------------------------


@pytest.mark.commands
def test_a_transformer_is_pruned_without_data(tmp_path):
    paths = [ROOT / "examples", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "examples" / "prune_transformer.py")
    command = partial(subprocess.run, capture_output=True, text=True, env=environment, cwd=tmp_path)
    done = command([sys.executable, script, *TINY_TRANSFORMER, "--no-baseline", "--seeds", "0", "1"])
    assert done.returncode == 0, done.stderr
    assert "compact, after the cut" in done.stdout and "python topics: 800 characters to train on" in done.stderr
    found = json.loads((tmp_path / "runs" / "prune_transformer" / "seed-1" / "settings.json").read_text(encoding="utf-8"))
    assert found["command"] == "prune_transformer" and found["seed"] == 1
    rows = rows_in(tmp_path / "runs" / "prune_transformer" / "seeds.csv")
    assert [(row["seed"], row["network"]) for row in rows] == [(s, n) for s in "01" for n in ("sparse", "compact")]
    done = command([sys.executable, script, "--macs", "2"])
    assert done.returncode == 1 and done.stderr == "error: macs must lie in (0, 1), got 2.0\n"
