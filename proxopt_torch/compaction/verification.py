"""Inputs that differ from the example, and the comparison of the outputs of two models on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from proxopt_torch.dependencies import Arguments, flat_tensors, preserved

SEED = 0
"""Of the random state in which both models run, and of the fresh inputs."""

FRESH_BATCHES = (1, 2)
"""What is added to the batch size of the example, for each fresh input."""


def fresh(given: Arguments, more: int, generator: torch.Generator) -> Arguments:
    """Arguments with new values of the observed types and ranges, and a batch that has ``more`` members.

    The first axis of the first tensor is the batch, as is that of every tensor with the same first size.
    """
    first = next((t for t in flat_tensors(given) if t.ndim), None)
    batch = len(first) if first is not None else -1

    def draw(tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        if shape and shape[0] == batch:
            shape = (batch + more, *shape[1:])
        return _drawn(tensor, shape, generator)

    args, kwargs = _mapped(given, draw)
    return args, kwargs


def double(given: Arguments) -> Arguments:
    """The arguments in double precision."""

    def widened(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(torch.complex128)
        return tensor.double() if tensor.is_floating_point() else tensor

    args, kwargs = _mapped(given, widened)
    return args, kwargs


def run(model: nn.Module, given: Arguments) -> list[Tensor]:
    """The tensors that a model returns, without gradients and from a fixed random state.

    The arguments are not changed, nor is the state of the model, such as counters in buffers and results kept in attributes.
    """
    args, kwargs = _mapped(given, torch.clone)
    with torch.no_grad(), fixed_random_state(), preserved(model):
        return tensors(model(*args, **kwargs))


@contextmanager
def fixed_random_state() -> Iterator[None]:
    cuda: Any = torch.cuda
    devices = list(range(cuda.device_count())) if cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        yield


def difference(expected: list[Tensor], got: list[Tensor], tolerance: float) -> str:
    """How the tensors of two outputs differ by more than ``tolerance`` times the largest entry, or an empty text."""
    if len(expected) != len(got):
        return f"{len(got)} output tensors instead of {len(expected)}"
    for want, have in zip(expected, got):
        if want.shape != have.shape:
            return f"an output of shape {tuple(have.shape)} instead of {tuple(want.shape)}"
        if text := _gap(want, have, tolerance):
            return text
    return ""


def _gap(want: Tensor, have: Tensor, tolerance: float) -> str:
    want, have = (t.to_dense() if t.layout != torch.strided else t for t in (want, have))
    if not (want.is_floating_point() or want.is_complex()):
        return "" if torch.equal(want, have) else "integer outputs that differ"
    if not want.numel():
        return ""
    tolerance = max(tolerance, 16 * torch.finfo(want.dtype).eps)  # of half precision, where rounding is coarser
    wide = torch.complex128 if want.is_complex() else torch.float64
    want, have = want.cpu().to(wide), have.cpu().to(wide)
    finite = want.isfinite() if not want.is_complex() else want.abs().isfinite()
    same = torch.equal(finite, have.isfinite()) and torch.equal(want[~finite].nan_to_num(0.5), have[~finite].nan_to_num(0.5))
    if not same:
        return "other outputs that are not finite"
    want, have = want[finite], have[finite]
    if not want.numel():
        return ""
    gap, largest = float((want - have).abs().max()), float(want.abs().max())
    return "" if gap <= tolerance * max(largest, 1e-30) else f"outputs that differ by {gap:.3g} of {largest:.3g}"


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, padded where they are nested tensors."""
    return [t.to_padded_tensor(0.0) if t.is_nested else t for t in flat_tensors(output)]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested arguments with other tensors. Objects that are no containers are passed on."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    return value


def _drawn(tensor: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values like those of a tensor: floats of its mean, deviation and range, integers of its range, and masks as they are."""
    if not tensor.numel() or tensor.dtype == torch.bool or tensor.layout != torch.strided or tensor.is_quantized:
        return _repeated(tensor, shape)
    if tensor.is_complex():
        real, imaginary = (_drawn(part, shape, generator) for part in (tensor.real, tensor.imag))
        return torch.complex(real, imaginary)
    if not tensor.is_floating_point():
        low, high = int(tensor.min()), int(tensor.max())
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)  # on the CPU, as some devices lack this type
        drawn = (low + uniform * (high - low + 1)).floor().clamp(low, high)
        return drawn.to(tensor.dtype).to(tensor.device)
    finite = tensor.detach()[tensor.isfinite()].cpu().double()
    if finite.numel() < tensor.numel():  # an additive mask
        return _repeated(tensor, shape)
    bottom, top = float(finite.min()), float(finite.max())
    if bottom == top:  # a constant shows nothing of the range
        drawn = bottom - 1 + 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    else:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * finite.std() + finite.mean()
        drawn = drawn.clamp(bottom, top)
    return drawn.to(tensor.dtype).to(tensor.device)


def _repeated(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not shape or not len(tensor) or shape[0] == len(tensor):
        return tensor.clone()
    return tensor[torch.arange(shape[0], device=tensor.device) % len(tensor)]
