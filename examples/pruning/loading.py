"""The compact network in a file: its weights, what it is built from, and what has to be known of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nas.engine import checkpoint
from torch import nn

from proxopt_torch import Compacted, load_compact

from . import networks
from .task import Task

NAME = "compact.pt"
CONTENT = ("network", "arguments", "about", "weights", "sizes")


def save(out: Path, task: Task, small: Compacted) -> None:
    """Write a compact network to OUT/compact.pt, as plain data and tensors."""
    weights = {name: value.cpu().contiguous() for name, value in small.model.state_dict().items()}
    about = {"network": task.network, "arguments": task.arguments(), "about": task.about()}
    checkpoint.save(out / NAME, {**about, "weights": weights, "sizes": dict(small.sizes)})


def read(folder: Path) -> dict[str, Any]:
    """The content of the file in a folder.

    Raises:
      FileNotFoundError: there is no such folder, or no such file in it.
      ValueError: the file is damaged, or one of something else.
    """
    file = folder / NAME
    if not file.is_file():
        below = sorted(str(found.parent) for found in folder.glob(f"*/{NAME}"))
        hint = f"; there are some in {', '.join(below)}" if below else ""
        raise FileNotFoundError(f"{folder} must be the folder of a pruning that has ended, with {NAME}{hint}")
    found = checkpoint.load(file)
    missing = [part for part in CONTENT if part not in found]
    if missing or not _is_network(getattr(networks, str(found["network"]), None)):
        raise ValueError(f"{file} must be the compact network of a pruning, but it has no {(missing or ['network'])[0]}")
    return found


def _is_network(named: Any) -> bool:
    return isinstance(named, type) and issubclass(named, nn.Module)


def load(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Implementation of `pruning.load`."""
    folder = Path(folder)
    found = read(folder)
    try:
        net = getattr(networks, found["network"])(**found["arguments"])
        return load_compact(net, found["weights"], found["sizes"]).to(device).eval()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / NAME} must hold a network that fits its description, but {error}") from None


def check_about(folder: Path, found: dict[str, Any], task: type[Task]) -> None:
    """Raise ValueError where a file does not tell what an evaluation has to know of the data."""
    about = found["about"] if isinstance(found["about"], dict) else {}
    for name, kind in task.facts.items():
        if not isinstance(about.get(name), kind):
            raise ValueError(f"{folder / NAME} must hold the {name} of the data as a {kind.__name__}, got {about.get(name)!r}")


def refuse_other_data(found: dict[str, Any], task: Task) -> None:
    """Raise ValueError where the data have another number of inputs or outputs than those of a saved network, or are longer."""
    given = task.arguments()
    for name in ("classes", "channels", "vocabulary"):
        if found["arguments"].get(name) != given.get(name):
            raise ValueError(f"the data must have the {found['arguments'][name]} {name} of the network, got {given[name]}")
    most = found["arguments"].get("length", 0)
    if given.get("length", 0) > most:
        raise ValueError(f"length must be at most {most}, as the network reads no more symbols at once, got {given['length']}")
