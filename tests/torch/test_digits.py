"""The digits example and the ablation: their files, equality of batched and single runs, resumption of a killed run."""

import csv
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import digits_ablation as ablation
import digits_pruning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from proxopt import Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, load_compact

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KEYS = {"method", "penalty", "metric", "strength", "seed", "accuracy", "sparsity", "features", "neurons"}


def test_the_example_writes_a_smaller_network_that_can_be_loaded(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        digits_pruning.main(["--epochs", "60", "--retrain-epochs", "5", "--strength", "3e-3", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    sparse, small = lines["sparse"], lines["compact"]
    # removal changes the logits by rounding only, but two of the 449 images may lie on a decision boundary
    assert float(small[1]) == pytest.approx(float(sparse[1]), abs=2.5 / 449)
    assert int(small[4]) < int(sparse[4]) == 3630
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    saved = torch.load(tmp_path / "compact.pt", weights_only=True)
    net = nn.Sequential(nn.Linear(64, 40), nn.LeakyReLU(), nn.Linear(40, 20), nn.LeakyReLU(), nn.Linear(20, 10))
    load_compact(net, saved["model"])
    assert sum(p.numel() for p in net.parameters()) == int(small[4])
    _, (x, y) = digits_pruning.digits(0)
    assert digits_pruning.accuracy(net, (x[:, saved["inputs"]], y)) == pytest.approx(
        float(lines["compact, retrained"][2]), abs=1e-4
    )


def run(out, *options):
    ablation.main(["--out", str(out), *options])
    return json.loads((out / "ablation.json").read_text())


def test_the_ablation_writes_what_its_readers_expect(tmp_path, capsys):
    rows = run(tmp_path, "--strengths", "2", "--seeds", "2", "--epochs", "3", "--retrain-epochs", "2")
    assert len(rows) == 2 * 2 * len(ablation.CURVES)
    assert all(set(row) >= KEYS for row in rows)
    assert {(r["method"], r["penalty"], r["metric"]) for r in rows} == {
        ("sgd", "sgl", None),
        ("adam", "sgl", None),
        ("hapg", "sgl", None),
        ("hapg", "lasso", None),
        ("hapg", "group_lasso", None),
        ("adamhapg", "sgl", "median"),
        ("adamhapg", "sgl", "exact"),
        ("proxadam", "sgl", "exact"),
    }
    assert sorted({r["strength"] for r in rows}) == pytest.approx([1e-5, 10**-3.7])
    assert all(0 <= r[key] <= 1 for r in rows for key in ("accuracy", "sparsity"))
    with (tmp_path / "ablation.csv").open() as file:
        assert [float(r["sparsity"]) for r in csv.DictReader(file)] == [r["sparsity"] for r in rows]
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    assert "| HAPG, group lasso |" in capsys.readouterr().out
    before = (tmp_path / "ablation.json").read_bytes()
    run(tmp_path, "--strengths", "2", "--seeds", "2", "--epochs", "3", "--retrain-epochs", "2")
    assert (tmp_path / "ablation.json").read_bytes() == before
    with pytest.raises(SystemExit, match="was written with other settings"):
        run(tmp_path, "--strengths", "3", "--seeds", "2", "--epochs", "3", "--retrain-epochs", "2")
    (tmp_path / "search-sgd.pt").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match=r"search-sgd.pt is not whole .* start over with --fresh"):
        run(tmp_path, "--strengths", "2", "--seeds", "2", "--epochs", "3", "--retrain-epochs", "2")


@pytest.mark.parametrize("name", ["hapg", "adamhapg", "adamhapg_exact"])
def test_a_network_trains_in_a_batch_as_it_does_alone(name):
    settings = ablation.Settings(strengths=3, seeds=2, epochs=4, retrain_epochs=1)
    data = ablation.Data(settings)
    found = ablation.search(ablation.CURVES[name], settings, data, tqdm(disable=True))
    seed, place = 1, 2
    weights, biases = ablation.initial(settings, 1)
    layers = [(nn.Parameter(w[seed, 0].detach()), nn.Parameter(b[seed, 0, :, 0].detach())) for w, b in zip(weights, biases)]
    penalty = SparseGroupLasso(
        settings.strength_grid()[place], 0.5, Groups.along(0), metric="exact" if name.endswith("exact") else None
    )
    groups = [{"params": [w for w, _ in layers], "penalty": penalty}, {"params": [b for _, b in layers]}]
    if name == "hapg":
        optimizer = HAPG(groups, lr=0.05, extrapolation="nesterov")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    else:
        optimizer, scheduler = AdamHAPG(groups, lr=3e-4, betas=(0.5, 0.999), extrapolation="nesterov"), None
    for epoch in range(settings.epochs):
        for images, labels in data.epoch(epoch):
            h = images[seed].T
            for i, (w, b) in enumerate(layers):
                h = F.linear(h, w, b)
                h = F.leaky_relu(h, 0.01) if i < 2 else h
            optimizer.zero_grad()
            F.cross_entropy(h, labels[seed]).backward()
            optimizer.step()
        if scheduler:
            scheduler.step()
    optimizer.eval()
    for i, (w, b) in enumerate(layers):
        torch.testing.assert_close(found[f"weight{i}"][seed, place], w.detach(), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(found[f"bias{i}"][seed, place, :, 0], b.detach(), rtol=1e-3, atol=2e-5)


RESUMED = "--strengths 1 --seeds 1 --epochs 2 --curves hapg".split()


@pytest.mark.parametrize("saves", [1, 2])
def test_a_stopped_ablation_resumes_bit_for_bit(saves, tmp_path, monkeypatch):
    """Stopped after the search, or in the middle of the training from new weights."""

    class Stop(Exception):
        pass

    save, written = ablation.save, []

    def stopping(path, settings, content):
        save(path, settings, content)
        written.append(path.name)
        if len(written) == saves:
            raise Stop
        return content

    options = [*RESUMED, "--retrain-epochs", "210"]
    with monkeypatch.context() as patched:
        patched.setattr(ablation, "save", stopping)
        with pytest.raises(Stop):
            run(tmp_path / "stopped", *options)
    assert written == ["search-hapg.pt", "retrain-unfinished.pt"][:saves]
    assert run(tmp_path / "stopped", *options) == run(tmp_path / "whole", *options)


@pytest.mark.commands
def test_a_killed_ablation_resumes_bit_for_bit(tmp_path):
    options = [*RESUMED, "--retrain-epochs", "500"]
    command = [sys.executable, str(BENCHMARKS / "digits_ablation.py"), "--out", str(tmp_path / "killed"), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not (tmp_path / "killed" / "retrain-unfinished.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "ablation.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| HAPG, SGL |" in done.stdout
    subprocess.run([*command[:3], str(tmp_path / "whole"), *options], capture_output=True, check=True)
    stages = [torch.load(tmp_path / d / "search-hapg.pt", weights_only=True)["content"] for d in ("killed", "whole")]
    assert all(torch.equal(stages[0][k], stages[1][k]) for k in stages[0] if k != "took")
    first, second = (json.loads((tmp_path / d / "ablation.json").read_text()) for d in ("killed", "whole"))
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strengths", "0"], "strengths must be >= 1, got 0"),
        (["--curves", "sgd", "momentum"], "curves must be among sgd, adam, .*, got momentum"),
        (["--batch", "2000"], "batch must be <= 1347"),
    ],
)
def test_a_wrong_setting_is_named(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, *options)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_four_methods_reach_the_numbers_of_the_paper(tmp_path):
    methods = ("sgd", "adam", "hapg", "adamhapg")
    rows = run(tmp_path, "--strengths", "1", "--seeds", "3", "--retrain-epochs", "300", "--curves", *methods)
    mean = lambda method, key: statistics.mean(r[key] for r in rows if r["method"] == method)
    assert 0.10 < mean("sgd", "sparsity") < 0.22
    assert 0.22 < mean("adam", "sparsity") < 0.32
    assert mean("hapg", "sparsity") > 0.38
    assert 0.35 < mean("adamhapg", "sparsity") < 0.50
    dense = statistics.mean(r["dense_accuracy"] for r in rows)
    assert all(mean(m, "accuracy") > dense - 0.01 for m in methods)


@pytest.mark.parametrize("curves", ["hapg adamhapg", pytest.param("sgd adam proxadam", marks=pytest.mark.commands)])
def test_jax_and_torch_agree(curves, tmp_path):
    options = "--strengths 2 --seeds 1 --epochs 4 --retrain-epochs 2 --curves".split() + curves.split()
    ours, theirs = (run(tmp_path / f, "--framework", f, *options) for f in ("torch", "jax"))
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[k] == b[k] for k in ("method", "penalty", "metric", "strength", "seed"))
        assert a["sparsity"] == pytest.approx(b["sparsity"], abs=5e-3)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.02)
