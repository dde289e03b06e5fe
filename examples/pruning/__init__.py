"""Pruning of networks in one training, shared by `prune_convnet.py` and `prune_transformer.py`.

    networks    the networks, in plain PyTorch
    settings    the optimizer, the penalty, the budget
    task        what a script prunes: network, data, loss, quality; images and text are the two
    training    the training with a budget, and the dense one
    comparison  the cut, the table of quality, size and speed; pictures draws it
    loading     the compact network in a file
    procedure   the command of a script

It builds on `nas.engine` (command line, loop, checkpoints) and `nas.data`.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load"]


def load(folder: str | PathLike[str], device: str = "cpu") -> nn.Module:
    """Load the compact network that a pruning has left in its folder, in evaluation mode.

        net = pruning.load("runs/prune_convnet")
        logits = net(images)   # floats (N, 3, 32, 32), normalised: (pixel / 255 - mean) / std for each channel

    mean and std are in compact.pt: `torch.load("runs/prune_convnet/compact.pt")["about"]`. A language model takes numbers of
    symbols, whose list is there too.

    Args:
      folder: --out of the script.
      device: where the network is loaded to, such as "cuda".

    Raises:
      FileNotFoundError: there is no such folder, or no network in it.
      ValueError: a damaged file, or a file of something else.
    """
    from . import loading

    return loading.load(Path(folder), device)
