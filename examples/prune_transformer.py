"""Prune a language model in one training: python examples/prune_transformer.py --preset small --data-dir data/ptb --macs 0.5

A small GPT predicts the next character of a text. All parameters that are removed with an attention head or with a hidden unit of
an MLP are one group (`groups.coupled`). A group lasso makes groups exactly zero, with a strength that `Budget` controls until the
share --macs of the multiply-adds is left. Then the zeros are frozen, the rest of the training is without penalty, and `compact`
removes the zeros: the network is smaller and computes the same. The residual stream keeps its width, as a layer norm reads all of
it. The same training without a penalty comes first, for comparison. The folder --data-dir contains Penn Treebank or other text;
without it the text is the documentation of Python.

Presets: full (the default, for a GPU) and small (ten minutes on two cores). Before the first step of each training it is
printed what it will compute, and after a few steps the time and memory that it needs. Results in --out: a table of quality,
size and latency of the dense, the sparse and the compact network (table.csv), the heads and hidden units of each layer
(layers.csv), pruning.png, the compact network (compact.pt), and the folders dense and sparse of the two trainings: train.csv,
network.pt, a checkpoint, and budget.csv with each measurement of the budget. Where TensorBoard is installed (`pip install
tensorboard`), `tensorboard --logdir OUT` shows the columns of train.csv. With several --seeds each has a folder of its own, and
OUT/seeds.csv has the tables of all.

`--resume --out FOLDER` continues an interrupted run, `--config FILE` starts a new one with the settings in a settings.json, and
`--evaluate FOLDER` prints the quality of a compact network, which `pruning.load(FOLDER)` returns as a module of PyTorch.
"""

from __future__ import annotations

from typing import Any

from pruning import procedure
from pruning.text import Text, TransformerSettings

PRESETS = {
    "full": TransformerSettings(amp=True, epochs=30, batch=64),
    "small": TransformerSettings(
        characters=1_000_000,
        epoch_characters=40_000,
        epochs=4,
        batch=16,
        layers=4,
        width=128,
        heads=8,
        hidden=512,
        length=128,
        dropout=0.0,
    ),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Prune; return a row for each network and seed."""
    return procedure.run(argv, Text, PRESETS, __doc__)


if __name__ == "__main__":
    main()
