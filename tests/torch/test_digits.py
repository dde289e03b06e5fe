"""The digits example: what it writes, and that the smaller network loads."""

import digits_pruning
import pytest
import torch
from torch import nn

from proxopt_torch import load_compact


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
