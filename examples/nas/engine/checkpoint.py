"""Checkpoints that are whole or not there, of plain tensors, numbers and strings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, content: dict[str, Any]) -> None:
    """Write in one move: a process that is killed leaves the last checkpoint as it was."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def save_network(path: Path, net: torch.nn.Module) -> None:
    """Write the weights of a network, on the CPU: a file for `load` on any machine."""
    save(path, {name: value.cpu() for name, value in net.state_dict().items()})


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save` wrote.

    Raises:
      ValueError: the file is damaged, or holds something else than plain data.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} must be a whole checkpoint, but could not be read: {error}") from None


def refuse_other(kind: str, wanted: dict[str, Any], found: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ValueError, naming every difference, unless a checkpoint was written under the same settings.

    defaults: what a setting is taken to be that the checkpoint does not name, as an earlier release had no such setting.
    """
    found = {**defaults, **found}
    other = [f"{k} is {found.get(k)!r}, not {v!r}" for k, v in wanted.items() if found.get(k) != v]
    if other:
        raise ValueError(f"--resume must continue with the settings of the {kind}: there {'; '.join(other)}")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The global random generators, for drop path and the like."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
