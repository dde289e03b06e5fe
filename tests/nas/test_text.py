"""Text, and searches and trainings on it from the command line."""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import nas_ptb
import numpy as np
import pytest
import torch
import train_ptb
from nas.bilevel.search_text import TextSearch
from nas.data import text
from nas.engine.distributed import SINGLE_PROCESS
from nas.methods import sparse_supernet
from nas.methods.settings import sparse_supernet as sparse_settings
from nas.nets.torch import rnn
from nas.space.genotype import RecurrentGenotype, load_genotype
from nas.train import train_text
from nas.train.settings import TEXT_TRAIN_PRESETS, TextTrainSettings
from nas_cases import TINY_TEXT, rows_of, same

SEARCH = TRAIN = TINY_TEXT
CPU = torch.device("cpu")


@pytest.fixture
def place(corpus):
    return ["--data-dir", str(corpus)]


# -- text -----------------------------------------------------------------------------------


def test_words_lines_and_the_vocabulary_of_all_parts(tmp_path):
    for part, lines in (("train", "the cat\nsat"), ("valid", "the dog"), ("test", "a cat")):
        (tmp_path / f"my.{part}.txt").write_text(lines)
    found = text.load_corpus(tmp_path)
    assert found.vocabulary == ("the", "cat", "<eos>", "sat", "dog", "a")
    assert [found.train.tolist(), found.valid.tolist(), found.test.tolist()] == [[0, 1, 2, 3, 2], [0, 4, 2], [5, 1, 2]]


def test_one_file_is_cut_into_three_parts(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    found = text.load_corpus(tmp_path)
    assert [len(found.train) // 3, len(found.valid) // 3, len(found.test) // 3] == [90, 5, 5]
    assert text.load_corpus(file).fingerprint == found.fingerprint
    file.write_text("line 1\n" * 100)
    assert text.load_corpus(file).fingerprint != found.fingerprint


def test_the_text_that_comes_with_python():
    found = text.load_corpus()
    assert found.name == "python topics"
    assert len(found.train) > 50_000 and 1_000 < len(found.vocabulary) < 10_000
    assert "<unk>" in found.vocabulary and "<eos>" in found.vocabulary


def test_what_is_wrong_with_a_text_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text in .*none: --data-dir names a folder"):
        text.load_corpus(tmp_path / "none")
    (tmp_path / "ptb.train.txt").write_text("no penn treebank")
    (tmp_path / "ptb.valid.txt").write_text("x")
    with pytest.raises(
        FileNotFoundError, match=r"must contain one \.txt file with 'test' in its name, got 0 among ptb.train.txt"
    ):
        text.load_corpus(tmp_path)
    (tmp_path / "ptb.test.txt").write_text("x")
    with pytest.raises(ValueError, match=r"ptb.train.txt must have the md5 f26c4b.* it is damaged"):
        text.load_corpus(tmp_path)
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"bad.txt must be UTF-8 text, but"):
        text.load_corpus(tmp_path)
    (tmp_path / "bad.txt").write_text("one line")
    with pytest.raises(ValueError, match=r"the train part of bad.txt must have at least two words, got 0"):
        text.load_corpus(tmp_path)


def test_columns_are_pieces_of_the_text_side_by_side():
    found = text.text_columns(np.arange(14), 3)
    assert found.T.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(ValueError, match=r"batch must lie in \[1, 4\], a third of the 14 words, got 5"):
        text.text_columns(np.arange(14), 5)


def test_no_window_is_too_short_for_a_change_between_words():
    """The mean change of the hidden state between the words of a window is NaN for a single word."""
    assert all(words >= 2 for bptt in (2, 3) for _, words in text.windows(400, bptt, seed=0, epoch=0))


@pytest.mark.parametrize("spread", [0.0, 5.0])
@pytest.mark.parametrize("rows", [3, 36, 37, 38, 2000])
def test_windows_cover_the_text_once(rows, spread):
    found = text.windows(rows, 35, seed=0, epoch=1, spread=spread)
    assert found[0][0] == 0
    assert np.cumsum([0, *(n for _, n in found)]).tolist()[:-1] == [start for start, _ in found]
    last, words = found[-1]
    assert rows - 2 <= last + words <= rows - 1 and all(n >= 2 for _, n in found[:-1])
    assert text.windows(rows, 35, seed=0, epoch=1, spread=spread) == found
    if rows == 2000:
        lengths = [n for _, n in found[:-1]]
        assert text.windows(rows, 35, seed=0, epoch=2, spread=spread) != found
        if spread:
            assert 5 <= min(lengths) < 35 < max(lengths) <= 55
        else:
            assert set(lengths) == {35, 17}


# -- searches -------------------------------------------------------------------------------


def test_a_search_leaves_a_genotype_a_table_and_pictures(tmp_path, place, capsys):
    (row,) = nas_ptb.main(["--out", str(tmp_path), *SEARCH, *place, "--strength-step", "0.3", "--arch-lr", "0.02"])
    assert "written" in capsys.readouterr().out
    for name in ("cells.svg", "cells.png", "weights.png", "curves.png", "report.html", "settings.json", "checkpoint.pt"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    rows = rows_of(tmp_path / "search.csv")
    assert len(rows) == 2 and float(rows[-1]["valid_perplexity"]) == row["valid_perplexity"] > 1
    train_ptb.main(["--genotype", str(tmp_path / "genotype.json"), "--count"])
    assert json.loads(capsys.readouterr().out)["parameters"] > 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparse_supernet", "--order second --hessian exact".split()),
        ("sparse_supernet", "--order second --probe-every 2 --optimizer hapg".split()),
        ("darts", ["--order", "second"]),
        ("ista", ["--recover-every", "3"]),
    ],
)
def test_every_option_of_a_search_runs(method, options, tmp_path, place):
    (row,) = nas_ptb.main(["--method", method, "--out", str(tmp_path), *SEARCH, *place, *options, "--epochs", "1"])
    found = load_genotype(tmp_path / "genotype.json", RecurrentGenotype)
    assert len(found.paths("recurrent")) == row["paths_recurrent"] >= 1
    assert row["paths_recurrent"] == 8 or method == "sparse_supernet"


def searching(corpus, out, **own):
    settings = sparse_settings.SparseSupernetTextSettings(
        data_dir=corpus, hidden=6, batch=6, bptt=9, tokens=300, order="first", drop_embedding=0.0, drop_input=0.0,
        drop_hidden=0.0, drop_output=0.0, temporal=0.0, weight_decay=0.0, **own,
    )  # fmt: skip
    return TextSearch(sparse_supernet.SparseSupernet, settings, 0, out, SINGLE_PROCESS, CPU)


def test_short_steps_lessen_the_loss_of_their_batch(corpus, tmp_path):
    """To first order a step of length s lowers a loss by s times the squared norm of its gradient."""
    run = searching(corpus, tmp_path, lr=1e-3, clip=1e9, optimizer="hapg", arch_lr=1e-3)
    run.net.double()
    for p in run.method.parameters:
        p.data = p.data.double()
    run.begin_epoch()
    (train, valid) = next(iter(run.batches()))
    start = lambda: {part: run.net.start(6).double() for part in ("train", "valid")}
    loss = lambda batch: run.net.loss(*batch, start()["train"], None, run.method.weights())[0]

    def fall(batch, parameters, step):
        run.steps.state = start()
        before = loss(batch)
        square = sum(float((g**2).sum()) for g in torch.autograd.grad(before, parameters))
        with torch.no_grad():
            step()
            return float(before - loss(batch)), 1e-3 * square

    def weights():
        with torch.enable_grad():
            run.steps.weights(train)

    def architecture():
        with torch.enable_grad():
            run.steps.architecture(0, train, valid)

    fell, foreseen = fall(train, list(run.net.parameters()), weights)
    assert fell == pytest.approx(foreseen * len(train[0]) / 9, rel=0.05) and fell > 0
    fell, foreseen = fall(valid, run.method.parameters, architecture)
    assert fell == pytest.approx(foreseen, rel=0.05) and fell > 0


def test_a_strength_beyond_the_gradient_leaves_the_strongest_way_through_the_cell(corpus, tmp_path, no_pictures):
    """Each step of HAPG shortens weights and nodes by lr times half the strength: no gradient of norm 0.1 balances that."""
    run = searching(corpus, tmp_path, epochs=2, optimizer="hapg", arch_lr=0.1, strength_step=100.0, arch_clip=0.1)
    row = run.run()
    point = run.method.point()["recurrent"]
    assert int((point != 0).sum()) == row["paths_recurrent"] <= 8
    assert row["zeros_recurrent"] == 144 - row["paths_recurrent"]
    assert torch.equal(run.method.parameters[0] != 0, point != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--space", "darts"], "unknown recurrent space 'darts'"),
        (["--batch", "5000"], r"batch must lie in \[1, "),
        (["--bptt", "1"], "bptt must be >= 2, got 1"),
        (["--drop-hidden", "1"], r"drop_hidden must lie in \[0, 1\), got 1"),
        (["--arch-clip", "-1"], "arch_clip must be finite and >= 0, got -1"),
        (["--preset", "large"], "--preset must be one of paper, small, got 'large'"),
        (["--method", "gsparsity"], "--method must be one of darts, ista, sparse_supernet"),
        (["--data-dir", "nowhere"], "no text in nowhere"),
    ],
)
def test_a_wrong_option_is_named(options, message, tmp_path, place, capsys):
    with pytest.raises(SystemExit) as stopped:
        nas_ptb.main([*options[:2], *SEARCH[2:], *place, "--out", str(tmp_path / "out"), *options])
    said = " ".join(f"{stopped.value} {capsys.readouterr().err}".replace("│", " ").split())
    assert re.search(message, said), said


def test_a_search_that_diverges_says_so(tmp_path, place):
    with pytest.raises(SystemExit, match=r"the train loss of epoch 1 must be finite, got nan; .* a lower lr or arch_lr may help"):
        options = "--method darts --lr 1e30 --clip 1e30".split()
        nas_ptb.main([*SEARCH, *place, "--out", str(tmp_path / "out"), *options])


def test_another_text_does_not_continue_a_search(tmp_path, place, no_pictures):
    out = ["--out", str(tmp_path / "out"), "--epochs", "1"]
    nas_ptb.main([*SEARCH, *place, *out])
    with pytest.raises(SystemExit, match=r"--resume must continue with the settings of the search: in the checkpoint .*text is"):
        nas_ptb.main([*SEARCH, *out, "--resume", "--data-dir", "None"])


# -- trainings ------------------------------------------------------------------------------


LEARN = "--hidden 16 --tokens 1200 --lr 20 --epochs 6 --drop-embedding 0 --drop-input 0 --drop-hidden 0 --drop-output 0"


@pytest.mark.parametrize(("genotype", "options"), [("DARTS_V1", "--epochs 2"), ("lstm", LEARN)])
def test_a_training_reports_and_learns(genotype, options, tmp_path, place, capsys):
    out = tmp_path / "out"
    (row,) = train_ptb.main(["--genotype", genotype, "--out", str(out), *TRAIN, *place, *options.split()])
    said = capsys.readouterr().out
    assert f"test {row['test_perplexity']:.2f}" in said
    rows = rows_of(out / "train.csv")
    assert row["valid_loss"] == min(float(r["valid_loss"]) for r in rows)
    assert json.loads((out / "result.json").read_text())["test_perplexity"] == row["test_perplexity"]
    assert (out / "train.png").stat().st_size > 0
    if options == LEARN:  # who knows the frequencies of the words gets to 10.4, who knows their order to 1.6; measured: 1.8
        assert row["valid_perplexity"] < 5


def training(tmp_path, corpus, **own):
    settings = TextTrainSettings(
        **{
            "data_dir": corpus,
            "out": tmp_path,
            "hidden": 6,
            "batch": 6,
            "bptt": 9,
            "tokens": 300,
            "valid_batch": 4,
            "lr": 5.0,
            **own,
        }
    )
    tmp_path.mkdir(exist_ok=True)
    cell = load_genotype("DARTS_V2", RecurrentGenotype)
    return train_text.TextTraining(cell, settings, 0, tmp_path, SINGLE_PROCESS, CPU)


def test_a_short_step_lessens_the_loss_of_its_batch(tmp_path, corpus):
    """To first order a step of length s lowers a loss by s times the squared norm of its gradient."""
    still = dict.fromkeys(("drop_words", "drop_embedding", "drop_input", "drop_hidden", "drop_output"), 0.0)
    run = training(tmp_path, corpus, clip=0.0, temporal=0.0, weight_decay=0.0, **{**still, "lr": 1e-3})
    run.net.double()
    run.hidden = start = run.hidden.double()
    batch = next(iter(run.batches()))
    loss = lambda: run.net.loss(*batch, start, None)[0]
    before = loss()
    square = sum(float((g**2).sum()) for g in torch.autograd.grad(before, run.params))
    run.train_step(batch)
    assert (before - loss()).item() == pytest.approx(1e-3 * len(batch[0]) / 9 * square, rel=0.05)


def test_the_best_epoch_is_what_is_kept(tmp_path, corpus):
    run = training(tmp_path / "out", corpus, epochs=3)
    row = run.run()
    kept = torch.load(tmp_path / "out" / "network.pt", weights_only=True)
    run.net.load_state_dict(kept)
    found = rnn.mean_loss(run.net, run.rows_of["valid"], 9)
    assert found == row["valid_loss"] == min(r["valid_loss"] for r in run.rows)


def test_sgd_is_averaged_once_validation_stops_falling(tmp_path, corpus, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 2.0, 0.0])  # the last is the test text's
    monkeypatch.setattr(train_text, "mean_loss", lambda *args: next(losses))
    run = training(tmp_path / "out", corpus, epochs=7, patience=2)
    run.run()
    # epoch 6: 3.3 > min(5, 4, 3), the best of all but the last two; before, 3.5 and 3.4 were compared with min(5) and min(5, 4)
    assert [row["averaged"] for row in run.rows] == [0, 0, 0, 0, 0, 0, 1]
    assert isinstance(run.sgd, torch.optim.ASGD)
    own = [p.detach().clone() for p in run.params]
    with run.averaged():
        assert all(torch.equal(p, run.sgd.state[p]["ax"]) for p in run.params)
        assert any(not torch.equal(p, q) for p, q in zip(run.params, own))
    assert all(torch.equal(p, q) for p, q in zip(run.params, own))


def test_the_averages_are_means_of_the_iterates(tmp_path, corpus):
    run = training(tmp_path / "out", corpus, epochs=1)
    run.averages, run.sgd = True, None
    run.sgd = run._optimizer()
    seen = []
    for number, batch in enumerate(run.batches()):
        run.train_step(batch)
        seen.append(run.params[0].detach().clone())
        if number == 5:
            break
    # PyTorch's average begins with the second step
    torch.testing.assert_close(run.sgd.state[run.params[0]]["ax"], torch.stack(seen[1:]).mean(0), rtol=1e-5, atol=1e-6)


def test_a_divergence_goes_back_to_the_best_epoch(tmp_path, corpus, monkeypatch):
    run = training(tmp_path / "out", corpus, epochs=3)
    honest, calls = run.net.loss, []

    def sometimes(*args):
        calls.append(run.net.training)
        loss, states, last = honest(*args)
        return (loss * float("nan") if run.net.training and sum(calls) in (12, 13) else loss), states, last

    monkeypatch.setattr(run.net, "loss", sometimes)
    run.run()
    assert sum(calls) > 13 and run.rows[-1]["rollbacks"] == 2
    assert all(np.isfinite(row["valid_loss"]) for row in run.rows)
    assert (tmp_path / "out" / "train.png").stat().st_size > 0


def test_a_divergence_in_the_last_step_of_an_epoch_goes_back_too(tmp_path, place, capsys, monkeypatch):
    honest = train_text.TextTraining.train_step

    def train_step(self, batch):
        honest(self, batch)
        if self.epoch == 1 and self.step == len(self) - 1:
            with torch.no_grad():
                self.params[0].fill_(float("nan"))

    monkeypatch.setattr(train_text.TextTraining, "train_step", train_step)
    (row,) = train_ptb.main(["--genotype", "DARTS_V1", "--out", str(tmp_path / "out"), *TRAIN, *place, "--lr", "5"])
    assert row["rollbacks"] == 1 and np.isfinite([row["valid_loss"], row["test_loss"]]).all()
    assert "the loss was not finite 1 times" in capsys.readouterr().out


def test_what_is_kept_of_the_best_epoch_does_not_move(tmp_path, corpus):
    run = training(tmp_path / "out", corpus, epochs=1)
    run.averages = True
    run.sgd = run._optimizer()
    batches = list(run.batches())
    run.train_step(batches[0])
    run.best = run._copy()
    run.losses = [1.0]
    before = run._copy()
    for batch in batches:
        run._roll_back()
        run.train_step(batch)
    assert same(run.best, before) and not same(run._copy(), before)


def test_a_training_that_only_diverges_says_so(tmp_path, place, capsys):
    options = ["--lr", "1e30", "--clip", "0", "--genotype", "DARTS_V2"]
    with pytest.raises(SystemExit, match=r"the train loss of epoch 1 must be finite, got nan; lr is 1e\+30: a lower lr may help"):
        train_ptb.main(["--out", str(tmp_path / "out"), *TRAIN, *place, *options, "--epochs", "20"])
    assert not (tmp_path / "out" / "network.pt").exists()


def test_a_training_returns_to_its_best_epoch_a_limited_number_of_times(tmp_path, corpus):
    run = training(tmp_path / "out", corpus, epochs=1)
    run.losses = [1.0]
    for _ in range(train_text.ROLLBACKS):
        run._roll_back()
    with pytest.raises(ValueError, match="the loss was not finite 21 times: lr 5 is too large"):
        run._roll_back()


def test_a_convolutional_genotype_is_refused(tmp_path):
    file = tmp_path / "g.json"
    file.write_text('{"normal": {}, "reduce": {}}')
    with pytest.raises(SystemExit, match="a recurrent genotype is an object with the key 'recurrent', got 'normal', 'reduce'"):
        train_ptb.main(["--genotype", str(file)])
    with pytest.raises(SystemExit, match="unknown genotype 'PDARTS'"):
        train_ptb.main(["--genotype", "PDARTS"])


@pytest.mark.slow
def test_penn_treebank_is_counted_as_published():
    """Needs the corpus: PTB_DIR names its folder."""
    folder = os.environ.get("PTB_DIR")
    if not folder:
        pytest.skip("PTB_DIR does not name the folder of Penn Treebank")
    found = text.load_corpus(folder)
    assert (len(found.train), len(found.valid), len(found.test)) == (929_589, 73_760, 82_430)
    assert len(found.vocabulary) == 10_000
    assert hashlib.md5((Path(folder) / "ptb.train.txt").read_bytes()).hexdigest() == text.PTB_MD5["ptb.train.txt"]


@pytest.mark.usefixtures("no_pictures")
def test_cells_of_several_seeds_are_compared_by_a_short_training(tmp_path, place, monkeypatch):
    small = replace(TEXT_TRAIN_PRESETS["small"], hidden=6, batch=6, bptt=9)
    monkeypatch.setitem(TEXT_TRAIN_PRESETS, "small", small)
    options = "--method darts --seeds 0 1 --epochs 1 --select-by-training 1".split()
    rows = nas_ptb.main([*SEARCH, *place, *options, "--out", str(tmp_path)])
    best = min(rows, key=lambda row: row["selection_perplexity"])
    assert [row["selected"] for row in rows] == [int(row is best) for row in rows]
    read = lambda folder: load_genotype(folder / "genotype.json", RecurrentGenotype)
    assert read(tmp_path) == read(tmp_path / f"seed-{best['seed']}")
    assert len(rows_of(tmp_path / "seeds.csv")) == 2
