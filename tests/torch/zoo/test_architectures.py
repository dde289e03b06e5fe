"""compact on the architectures of benchmarks/architectures.py; those in full size are left to the benchmark."""

from __future__ import annotations

import csv

import compaction
import pytest
import torch
from architectures import ARCHITECTURES, gap, randomise, size

from proxopt_torch import compact

pytestmark = pytest.mark.zoo

SMALL = {case.name: case for case in ARCHITECTURES if not case.full_size}


@pytest.mark.parametrize("name", SMALL)
def test_zeroed_units_are_removed(name):
    """Nearly all of what a network without them saves; the outputs for other batch sizes and lengths are the same."""
    case = SMALL[name]
    model, removable = case.pruned()
    small = compact(model, case.inputs(2))
    torch.manual_seed(1)
    assert all(gap(model, small.model, case.inputs(batch)) <= 1e-4 for batch in (1, 3))
    assert 0.9 * removable <= size(model) - size(small.model) <= removable, small.kept
    if case.narrower:
        assert size(model) - size(case.narrower()) == removable


@pytest.mark.parametrize("name", ["RegNet", "Swin", "BERT", "GPT-2", "Llama", "TransformerEncoder"])
def test_a_network_without_zeros_loses_nothing(name):
    case = SMALL[name]
    torch.manual_seed(0)
    model = case.build().eval()
    randomise(model)
    small = compact(model, case.inputs(2))
    assert small.removed == {} and size(small.model) == size(model)


def test_the_table_is_resumed(tmp_path, capsys):
    table = tmp_path / "compaction.csv"
    compaction.main(["--only", "UNet", "--out", str(table)])
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [row["architecture"] for row in rows] == ["UNet"] and table.with_suffix(".png").exists()
    table.write_text(table.read_text(encoding="utf-8").replace("all channels", "of an earlier run"), encoding="utf-8")
    compaction.main(["--only", "UNet", "LSTM", "--out", str(table)])
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [(row["architecture"], row["units"]) for row in rows] == [("LSTM", "hidden units"), ("UNet", "of an earlier run")]
    with pytest.raises(SystemExit, match="only must be part of the name of an architecture"):
        compaction.main(["--only", "no such network", "--out", str(table)])
