"""The digits ablation: what it writes, that batching changes nothing, that a killed run goes on."""

import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import digits_ablation
import numpy as np
import pytest
import torch
from digits import in_torch, problem, stages
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from proxopt import Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KEYS = {"method", "penalty", "metric", "strength", "seed", "accuracy", "sparsity", "features", "neurons"}


def run(out, *options):
    digits_ablation.main(["--out", str(out), *options])
    return json.loads((out / "ablation.json").read_text())


def test_the_ablation_writes_what_its_readers_expect(tmp_path, capsys):
    rows = run(tmp_path, "--strengths", "2", "--seeds", "2", "--epochs", "3", "--retrain-epochs", "2")
    assert len(rows) == 2 * 2 * len(problem.CURVES)
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
    (tmp_path / "search-sgd.npz").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match=r"search-sgd.npz cannot be read .* start over with --fresh"):
        run(tmp_path, "--strengths", "2", "--seeds", "2", "--epochs", "3", "--retrain-epochs", "2")


@pytest.mark.parametrize("name", ["hapg", "adamhapg", "adamhapg_exact"])
def test_a_network_in_the_batch_is_the_network_alone(name):
    settings = problem.Settings(strengths=3, seeds=2, epochs=4, retrain_epochs=1)
    data = problem.Data(settings)
    batches = in_torch.Batches(data)
    found = in_torch.search(problem.CURVES[name], settings, data, tqdm(disable=True))
    seed, place = 1, 2
    weights, biases = in_torch.initial(settings, 1)
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
        for images, labels in batches.epoch(epoch):
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
        np.testing.assert_allclose(found[f"weight{i}"][seed, place], w.detach().numpy(), rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(found[f"bias{i}"][seed, place, :, 0], b.detach().numpy(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("seed", "epoch"), [(0, -1), (4, 7), (1, 10**6 + 1)])
def test_permutations_are_those_of_torch(seed, epoch):
    generator = torch.Generator().manual_seed(problem.seed_of(seed, epoch))
    assert problem.permutation(1347, seed, epoch).tolist() == torch.randperm(1347, generator=generator).tolist()


def test_both_frameworks_start_alike():
    """The numbers of `torch.randn` depend on the processor in the last bits."""
    settings = problem.Settings(seeds=2)
    ours = problem.initial(settings, nets=2, draw=1)
    theirs = problem.initial(settings, nets=2, draw=1, normals=in_torch.normals)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype == np.float32
        np.testing.assert_allclose(ours[name], values, atol=1e-6)


RESUMED = "--strengths 1 --seeds 1 --epochs 2 --curves hapg".split()


@pytest.mark.parametrize(("framework", "saves"), [("torch", 1), ("torch", 2), pytest.param("jax", 2, marks=pytest.mark.commands)])
def test_a_stopped_ablation_goes_on_bit_for_bit(framework, saves, tmp_path, monkeypatch):
    """After the search, and in the middle of the training from new weights."""

    class Stop(Exception):
        pass

    save, written = stages.save, []

    def stopping(path, settings, arrays):
        save(path, settings, arrays)
        written.append(path.name)
        if len(written) == saves:
            raise Stop
        return arrays

    options = ["--framework", framework, *RESUMED, "--retrain-epochs", "210"]
    with monkeypatch.context() as patched:
        patched.setattr(stages, "save", stopping)
        with pytest.raises(Stop):
            run(tmp_path / "stopped", *options)
    assert written == ["search-hapg.npz", "retrain-unfinished.npz"][:saves]
    assert run(tmp_path / "stopped", *options) == run(tmp_path / "whole", *options)


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import digits_ablation
digits_ablation.main(sys.argv[2:])
"""


@pytest.mark.parametrize(("framework", "other"), [("torch", "jax"), pytest.param("jax", "torch", marks=pytest.mark.commands)])
def test_a_framework_is_enough_without_the_other(framework, other, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    options = [*RESUMED, "--retrain-epochs", "2", "--framework", framework, "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-c", WITHOUT, other, *options], env=environment, check=True, capture_output=True)
    assert (tmp_path / "ablation.json").exists()


@pytest.mark.commands
def test_a_killed_ablation_goes_on_bit_for_bit(tmp_path):
    options = [*RESUMED, "--retrain-epochs", "500"]
    command = [sys.executable, str(BENCHMARKS / "digits_ablation.py"), "--out", str(tmp_path / "killed"), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not (tmp_path / "killed" / "retrain-unfinished.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "ablation.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| HAPG, SGL |" in done.stdout
    subprocess.run([*command[:3], str(tmp_path / "whole"), *options], capture_output=True, check=True)
    killed, whole = (np.load(tmp_path / d / "search-hapg.npz") for d in ("killed", "whole"))
    assert all(np.array_equal(killed[k], whole[k]) for k in killed if k != "took")
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
def test_the_four_methods_land_where_the_paper_does(tmp_path):
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
def test_jax_and_torch_tell_the_same(curves, tmp_path):
    options = "--strengths 2 --seeds 1 --epochs 4 --retrain-epochs 2 --curves".split() + curves.split()
    ours, theirs = (run(tmp_path / f, "--framework", f, *options) for f in ("torch", "jax"))
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[k] == b[k] for k in ("method", "penalty", "metric", "strength", "seed"))
        assert a["sparsity"] == pytest.approx(b["sparsity"], abs=5e-3)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.02)
