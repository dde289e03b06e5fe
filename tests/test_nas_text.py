"""Text, and searches and trainings on it from the command line."""

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nas_ptb
import numpy as np
import pytest
import text_against_others
import torch
import train_ptb
from nas import checkpoint, text, text_train
from nas.genotype import RecurrentGenotype, load
from nas.processes import ALONE

HERE = Path(__file__).parent
SEARCH = "--preset small --hidden 8 --batch 8 --bptt 9 --epochs 3 --tokens 600 --threads 1 --device cpu".split()
TRAIN = "--preset small --hidden 8 --batch 8 --bptt 9 --epochs 3 --tokens 600 --threads 1 --device cpu".split()


@pytest.fixture
def corpus(tmp_path):
    """A small text with an order that can be learnt."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part, lines in (("train", 300), ("valid", 60), ("test", 60)):
        starts = rng.integers(10, size=lines)
        written = "\n".join(" ".join(f"w{(s + i) % 10}" for i in range(4)) for s in starts)
        (folder / f"{part}.txt").write_text(written + "\n")
    return ["--data-dir", str(folder)]


def rows_of(file):
    with Path(file).open() as opened:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(opened)]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


# -- text -----------------------------------------------------------------------------------


def test_words_lines_and_the_vocabulary_of_all_parts(tmp_path):
    for part, lines in (("train", "the cat\nsat"), ("valid", "the dog"), ("test", "a cat")):
        (tmp_path / f"my.{part}.txt").write_text(lines)
    found = text.load(tmp_path)
    assert found.vocabulary == ("the", "cat", "<eos>", "sat", "dog", "a")
    assert [found.train.tolist(), found.valid.tolist(), found.test.tolist()] == [[0, 1, 2, 3, 2], [0, 4, 2], [5, 1, 2]]


def test_one_file_is_cut_into_three_parts(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    found = text.load(tmp_path)
    assert [len(found.train) // 3, len(found.valid) // 3, len(found.test) // 3] == [90, 5, 5]
    assert text.load(file).fingerprint == found.fingerprint
    file.write_text("line 1\n" * 100)
    assert text.load(file).fingerprint != found.fingerprint


def test_the_text_that_comes_with_python():
    found = text.load()
    assert found.name == "python topics"
    assert len(found.train) > 50_000 and 1_000 < len(found.vocabulary) < 10_000
    assert "<unk>" in found.vocabulary and "<eos>" in found.vocabulary


def test_what_is_wrong_with_a_text_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text in .*none: --data-dir names a folder"):
        text.load(tmp_path / "none")
    (tmp_path / "ptb.train.txt").write_text("no penn treebank")
    (tmp_path / "ptb.valid.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"must hold one \.txt file with 'test' in its name, got 0 among ptb.train.txt"):
        text.load(tmp_path)
    (tmp_path / "ptb.test.txt").write_text("x")
    with pytest.raises(ValueError, match=r"ptb.train.txt must have the md5 f26c4b.* it is damaged"):
        text.load(tmp_path)
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"bad.txt must be UTF-8 text, but"):
        text.load(tmp_path)
    (tmp_path / "bad.txt").write_text("one line")
    with pytest.raises(ValueError, match=r"the train part of bad.txt must have at least two words, got 0"):
        text.load(tmp_path)


def test_columns_are_pieces_of_the_text_side_by_side():
    found = text.columns(torch.arange(14), 3)
    assert found.t().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(ValueError, match=r"batch must lie in \[1, 4\], a third of the 14 words, got 5"):
        text.columns(torch.arange(14), 5)


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


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparse_supernet", ["--strength-step", "0.3"]),
        ("sparse_supernet", "--order second --hessian exact --epochs 1".split()),
        ("sparse_supernet", "--order second --probe-every 2".split()),
        ("darts", ["--order", "second"]),
        ("ista", ["--recover-every", "3"]),
    ],
)
def test_a_search_leaves_a_genotype_a_table_and_pictures(method, options, tmp_path, corpus, capsys):
    out = tmp_path / "out"
    (row,) = nas_ptb.main(["--method", method, "--out", str(out), *SEARCH, *corpus, *options])
    assert "written" in capsys.readouterr().out
    rows = rows_of(out / "search.csv")
    assert float(rows[-1]["valid_perplexity"]) == row["valid_perplexity"] > 1
    for name in ("cells.svg", "cells.png", "weights.png", "curves.png", "report.html", "settings.json", "checkpoint.pt"):
        assert (out / name).stat().st_size > 0
    assert (out / "report.html").read_text().count("<svg") == 3
    found = load(out / "genotype.json", RecurrentGenotype)
    assert len(found.paths("recurrent")) == row["paths_recurrent"] >= 1
    if method != "sparse_supernet":
        assert row["paths_recurrent"] == 8
    train_ptb.main(["--genotype", str(out / "genotype.json"), "--count"])
    assert json.loads(capsys.readouterr().out)["parameters"] > 0


def test_a_search_learns_and_prunes(tmp_path, corpus):
    options = "--epochs 8 --strength-step 1.0 --arch-lr 0.01 --lr 2 --drop-input 0 --drop-output 0".split()
    nas_ptb.main(["--out", str(tmp_path), *SEARCH, *corpus, *options])
    rows = rows_of(tmp_path / "search.csv")
    assert float(rows[-1]["valid_perplexity"]) < float(rows[0]["valid_perplexity"])
    assert int(rows[-1]["paths_recurrent"]) < 144 and int(rows[-1]["zeros_recurrent"]) > 0


PROGRAM = """
import sys
import nas_ptb, train_ptb
{"search": nas_ptb, "train": train_ptb}[sys.argv[1]].main(sys.argv[2:])
"""


def program(tmp_path, *argv, launch=()):
    paths = [HERE.parent / "examples"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    command = [sys.executable, *launch, str(file), *argv]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize(
    ("kind", "table", "options"),
    [
        ("search", "search.csv", [*SEARCH, "--strength-step", "0.5"]),
        ("train", "train.csv", [*TRAIN, "--genotype", "DARTS_V2", "--epochs", "6", "--patience", "1", "--lr", "25"]),
    ],
)
def test_what_is_killed_goes_on_bit_for_bit(kind, table, options, tmp_path, corpus):
    options = [kind, *options, *corpus, "--checkpoint-minutes", "0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(program(tmp_path, *options, "--out", str(whole)))
    process = program(tmp_path, *options, "--out", str(killed))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        file = killed / "checkpoint.pt"
        if file.exists() and (p := checkpoint.load(file)["progress"])["epoch"] >= 1 and p["step"] >= 1:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "--resume" in program(tmp_path, *options, "--out", str(killed)).communicate()[0]
    finished(program(tmp_path, *options, "--out", str(killed), "--resume"))
    assert rows_of(whole / table) == rows_of(killed / table)
    states = [checkpoint.load(d / "checkpoint.pt")["state"] for d in (whole, killed)]
    assert same(*states)


def test_several_processes_are_refused(tmp_path, corpus):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said, _ = program(tmp_path, "search", *SEARCH, *corpus, "--out", str(tmp_path / "out"), launch=launch).communicate()
    assert "text is read by one process; start it without torchrun, got 2 processes" in said


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
def test_a_wrong_option_is_named(options, message, tmp_path, corpus, capsys):
    with pytest.raises(SystemExit) as stopped:
        nas_ptb.main([*options[:2], *SEARCH[2:], *corpus, "--out", str(tmp_path / "out"), *options])
    said = " ".join(f"{stopped.value} {capsys.readouterr().err}".replace("│", " ").split())
    assert re.search(message, said), said


def test_a_search_that_diverges_says_so(tmp_path, corpus):
    with pytest.raises(SystemExit, match=r"the train loss of epoch 1 must be finite, got nan; .* a lower lr or arch_lr may help"):
        options = "--method darts --lr 1e30 --clip 1e30".split()
        nas_ptb.main([*SEARCH, *corpus, "--out", str(tmp_path / "out"), *options])


def test_another_text_does_not_continue_a_search(tmp_path, corpus):
    out = ["--out", str(tmp_path / "out"), "--epochs", "1"]
    nas_ptb.main([*SEARCH, *corpus, *out])
    with pytest.raises(SystemExit, match=r"--resume must continue with the settings of the search: there .*text is"):
        nas_ptb.main([*SEARCH, *out, "--resume"])


# -- trainings ------------------------------------------------------------------------------


@pytest.mark.parametrize("genotype", ["DARTS_V1", "lstm"])
def test_a_training_learns_and_reports(genotype, tmp_path, corpus, capsys):
    out = tmp_path / "out"
    options = "--epochs 6 --lr 5 --drop-input 0 --drop-output 0".split()
    (row,) = train_ptb.main(["--genotype", genotype, "--out", str(out), *TRAIN, *corpus, *options])
    said = capsys.readouterr().out
    assert f"test {row['test_perplexity']:.2f}" in said
    rows = rows_of(out / "train.csv")
    assert float(rows[-1]["train_perplexity"]) < float(rows[0]["train_perplexity"])
    assert row["valid_loss"] == min(float(r["valid_loss"]) for r in rows)
    assert json.loads((out / "result.json").read_text())["test_perplexity"] == row["test_perplexity"]
    assert (out / "train.png").stat().st_size > 0


def training(tmp_path, corpus, **own):
    settings = text_train.TextTrainSettings(
        data_dir=Path(corpus[1]), out=tmp_path, hidden=8, batch=8, bptt=9, tokens=600, valid_batch=4, lr=5.0, **own
    )
    tmp_path.mkdir(exist_ok=True)
    cell = load("DARTS_V2", RecurrentGenotype)
    return text_train.TextTraining(cell, settings, 0, tmp_path, ALONE, torch.device("cpu"))


def test_the_best_epoch_is_what_is_kept(tmp_path, corpus):
    run = training(tmp_path / "out", corpus, epochs=4)
    row = run.run()
    kept = torch.load(tmp_path / "out" / "network.pt", weights_only=True)
    run.net.load_state_dict(kept)
    found = text_train.mean_loss(run.net, run.rows_of["valid"], 9)
    assert found == row["valid_loss"] == min(r["valid_loss"] for r in run.rows)


def test_sgd_is_averaged_once_validation_stops_falling(tmp_path, corpus, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 2.0, 0.0])  # the last is the test text's
    monkeypatch.setattr(text_train, "mean_loss", lambda *args: next(losses))
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
        run.take(batch)
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
    assert run.rows[-1]["rollbacks"] == 2
    assert all(np.isfinite(row["valid_loss"]) for row in run.rows)
    assert (tmp_path / "out" / "train.png").stat().st_size > 0


def test_a_divergence_in_the_last_step_of_an_epoch_goes_back_too(tmp_path, corpus, capsys):
    (row,) = train_ptb.main(
        ["--genotype", "DARTS_V1", "--out", str(tmp_path / "out"), *TRAIN, *corpus, "--lr", "1e20", "--clip", "0"]
    )
    assert row["rollbacks"] and np.isfinite([row["valid_loss"], row["test_loss"]]).all()
    assert f"the loss was not finite {row['rollbacks']} times" in capsys.readouterr().out


def test_what_is_kept_of_the_best_epoch_does_not_move(tmp_path, corpus):
    run = training(tmp_path / "out", corpus, epochs=1)
    run.averages = True
    run.sgd = run._optimizer()
    batches = list(run.batches())
    run.take(batches[0])
    run.best = run._copy()
    before = run._copy()
    for batch in batches:
        run._roll_back()
        run.take(batch)
    assert same(run.best, before) and not same(run._copy(), before)


def test_a_training_that_only_diverges_says_so(tmp_path, corpus, capsys):
    options = ["--lr", "1e30", "--clip", "0", "--genotype", "DARTS_V2"]
    with pytest.raises(SystemExit, match=r"the loss was not finite 21 times: lr 1e\+30 is too large"):
        train_ptb.main(["--out", str(tmp_path / "out"), *TRAIN, *corpus, *options, "--epochs", "20"])


def test_a_convolutional_genotype_is_refused(tmp_path):
    file = tmp_path / "g.json"
    file.write_text('{"normal": {}, "reduce": {}}')
    with pytest.raises(SystemExit, match="a recurrent genotype is an object with the key 'recurrent', got 'normal', 'reduce'"):
        train_ptb.main(["--genotype", str(file)])
    with pytest.raises(SystemExit, match="unknown genotype 'PDARTS'"):
        train_ptb.main(["--genotype", "PDARTS"])


def test_what_was_found_is_trained_beside_others_of_its_size(tmp_path, corpus, capsys):
    options = "--genotype DARTS_V2 --random 1 --seeds 0 1 --epochs 1 --tokens 300 --batch 4 --lr 1".split()
    text_against_others.main([*options, *corpus, "--out", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "text_against_others.csv")
    assert [r["cell"] for r in rows[::2]] == ["searched", "random 0", "LSTM", "DARTS_V2"] and len(rows) == 8
    sizes = {r["cell"]: int(r["parameters"]) for r in rows}
    assert all(abs(size / sizes["searched"] - 1) < 0.05 for size in sizes.values())
    assert len({r["test_perplexity"] for r in rows}) == 6, "DARTS_V2 is what was searched, with each of its two seeds"
    drawn = load(tmp_path / "out" / "random-0" / "seed-0" / "genotype.json", RecurrentGenotype)
    assert drawn.clean() == drawn and len(drawn.paths("recurrent")) == 8
    assert "LSTM" in capsys.readouterr().out


@pytest.mark.slow
def test_penn_treebank_is_counted_as_published():
    """Needs the corpus: PTB_DIR names its folder."""
    folder = os.environ.get("PTB_DIR")
    if not folder:
        pytest.skip("PTB_DIR does not name the folder of Penn Treebank")
    found = text.load(folder)
    assert (len(found.train), len(found.valid), len(found.test)) == (929_589, 73_760, 82_430)
    assert len(found.vocabulary) == 10_000
    assert hashlib.md5((Path(folder) / "ptb.train.txt").read_bytes()).hexdigest() == text.PTB_MD5["ptb.train.txt"]
