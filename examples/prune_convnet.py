"""Prune ResNet-20 in one training: python examples/prune_convnet.py --preset small --data-dir data --macs 0.5

All parameters that are removed with a channel are one group (`groups.coupled`): a channel of the residual stream with its entries
in all blocks, norms included. A group lasso makes groups exactly zero, with a strength that `Budget` controls until the share
--macs of the multiply-adds is left. Then the zeros are frozen, the rest of the training is without penalty, and `compact` removes
the zeros: the network is smaller and computes the same. The same training without a penalty comes first, for comparison.

Presets: full (the default, for a GPU) and small (ten minutes on two cores). Before the first step of each training it is
printed what it will compute, and after a few steps the time and memory that it needs. Results in --out: a table of accuracy,
size and latency of the dense, the sparse and the compact network (table.csv), the channels of each layer (layers.csv),
pruning.png, the compact network (compact.pt), and the folders dense and sparse of the two trainings: train.csv, network.pt, a
checkpoint, and budget.csv with each measurement of the budget. Where TensorBoard is installed (`pip install tensorboard`),
`tensorboard --logdir OUT` shows the columns of train.csv. With several --seeds each has a folder of its own, and OUT/seeds.csv
has the tables of all.

`--resume --out FOLDER` continues an interrupted run, `--config FILE` starts a new one with the settings in a settings.json, and
`--evaluate FOLDER` prints the accuracy of a compact network, which `pruning.load(FOLDER)` returns as a module of PyTorch.
"""

from __future__ import annotations

from typing import Any

from pruning import procedure
from pruning.images import ConvnetSettings, Images

PRESETS = {
    "full": ConvnetSettings(amp=True),
    "small": ConvnetSettings(images=10_000, epochs=8, batch=64, epoch_images=2000, optimizer="proxadam"),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Prune; return a row for each network and seed."""
    return procedure.run(argv, Images, PRESETS, __doc__)


if __name__ == "__main__":
    main()
