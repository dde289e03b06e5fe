"""The examples run, and the networks that they cut compute the same."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits_pruning_jax.py"


@pytest.mark.commands
def test_the_digits_example_cuts_neurons_and_keeps_the_accuracy(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--epochs", "60", "--strength", "0.005"])
    plain, sparse, cut, again = runpy.run_path(str(EXAMPLE))["main"]()
    assert "cut, retrained" in capsys.readouterr().out
    assert plain[1] == sparse[1] == "64-40-20-10"
    assert plain[3] == 0 < sparse[3]
    # 1010 of 3560 weights are left at an accuracy of 0.952: far from what is asked for
    assert cut[2] < 0.6 * plain[2]
    assert sparse[4] == pytest.approx(cut[4], abs=0.01)
    assert again[4] > 0.85


@pytest.mark.commands
def test_the_flax_example_prunes_a_network_and_restores_its_checkpoint(tmp_path, capsys):
    prune_flax = pytest.importorskip("prune_flax")
    plain, sparse, cut, again = prune_flax.main(["--epochs", "6", "--out", str(tmp_path)])
    assert "restored bit for bit" in capsys.readouterr().out
    assert plain[1:3] == sparse[1:3] == ([16, 32, 64, 10], 38282)
    assert cut[1:3] == again[1:3]
    assert all(0 < n <= full for n, full in zip(cut[1], plain[1]))
    assert sparse[3] == pytest.approx(cut[3], abs=0.01)
    assert (tmp_path / "checkpoint").is_dir()


def flax_net(zero):
    """An untrained network of the example, with random biases; ``zero`` maps layers to outputs that are set to zero."""
    prune_flax, nnx = pytest.importorskip("prune_flax"), pytest.importorskip("flax.nnx")
    random, net = np.random.default_rng(0), prune_flax.Net([3, 4, 5])
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    for name, layer in params.items():
        layer["bias"] = layer["bias"] + random.normal(size=layer["bias"].shape).astype(np.float32)
        for key in layer:
            layer[key] = layer[key].at[..., np.array(zero.get(name, []), int)].set(0)
    nnx.update(net, params)
    return prune_flax, net


def test_the_flax_example_removes_what_is_zero_and_the_outputs_stay():
    prune_flax, net = flax_net({"conv1": [1], "conv2": [0, 2], "dense": [4]})
    small = prune_flax.compact(net)
    assert prune_flax.widths_of(small) == [2, 2, 4, 10]
    x = np.random.default_rng(1).normal(size=(6, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(small(x), net(x), atol=1e-5)


def test_the_flax_example_refuses_to_remove_a_whole_layer():
    prune_flax, net = flax_net({"conv2": range(4)})
    with pytest.raises(SystemExit, match="none is left in conv2: choose a smaller one"):
        prune_flax.compact(net)
