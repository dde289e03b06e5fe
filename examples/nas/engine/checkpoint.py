"""Checkpoints of tensors, numbers and strings, written atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file atomically: if the process is killed, the last checkpoint is unchanged."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def save_network(path: Path, net: torch.nn.Module) -> None:
    """Write the weights of a network, moved to the CPU, so that any machine can load the file."""
    save(path, {name: value.cpu() for name, value in net.state_dict().items()})


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file that `save` wrote.

    Raises:
      ValueError: the file is damaged, or contains anything but plain data.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} must be a complete checkpoint, but could not be read: {error}") from None


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
