"""Checkpoints of tensors, numbers and strings, written atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from ..space.files import write_bytes
from .loop import first_sentence

PARTS = ("identity", "progress", "random", "state")  # of the checkpoint of a run


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file atomically: if the process is killed or the disk is full, the last checkpoint is unchanged."""
    written = io.BytesIO()  # torch.save hides the error of a file that cannot be written
    torch.save(content, written)
    write_bytes(path, written.getbuffer())


def save_network(path: Path, net: torch.nn.Module) -> None:
    """Write the weights of a network, moved to the CPU, so that any machine can load the file."""
    save(path, {name: value.cpu() for name, value in net.state_dict().items()})


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file that `save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, was written by another program, or contains anything but plain data.
    """
    if path.is_dir() or (path.is_file() and path.stat().st_size == 0):
        raise ValueError(f"{path} must be a complete checkpoint, but is {'a folder' if path.is_dir() else 'an empty file'}")
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} must be a complete checkpoint, but could not be read: {first_sentence(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a complete checkpoint, but contains an object of type {type(found).__name__}")
    return found


def load_run(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read the checkpoint of a run. Raises as `load`, and ValueError for the file of something else."""
    found = load(path, device)
    missing = [part for part in PARTS if part not in found]
    if missing:
        raise ValueError(f"{path} must be the checkpoint of a run, but has no {missing[0]!r}: it contains something else")
    return found


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the global random generators, which drop path and similar operations use."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
