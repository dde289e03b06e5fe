"""Initial weights of a training: those that another one has left."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..engine.loop import first_sentence

HEADS = ("classifier.", "auxiliary.")  # the parts of a network that depend on the number of classes, or on the loss


def read_weights(place: Path, net: nn.Module) -> dict[str, Tensor]:
    """Read the weights of a network.pt, or of the one in a folder, for a network.

    Classifier and auxiliary head keep the weights of `net` where those in the file have other shapes or are missing.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file does not contain weights of this network.
    """
    file = place / "network.pt" if place.is_dir() else place
    if not file.is_file():
        raise FileNotFoundError(f"no file of weights {str(file)!r}")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        got = {k: tuple(v.shape) for k, v in loaded.items()}
    except Exception as error:
        raise ValueError(f"{file} does not contain weights of a network: {first_sentence(error)}") from None
    own = net.state_dict()
    wanted = {k: tuple(v.shape) for k, v in own.items()}
    off = sorted(k for k in {*got, *wanted} if got.get(k) != wanted.get(k))
    body = [k for k in off if not k.startswith(HEADS)]
    if body:
        raise ValueError(
            f"{file} must hold the weights of this network: {body[0]} must have shape {wanted.get(body[0])},"
            f" got {got.get(body[0])}"
        )
    return {k: own[k] if k in off else loaded[k] for k in own}
