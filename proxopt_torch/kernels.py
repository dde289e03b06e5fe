"""The steps of `proxopt.updates` again, in place: faster twins for one dense tensor, equal to rounding.

Temporaries stay inside blocks of rows that fit the cache; Adam and SGD themselves are torch's fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from proxopt import Groups, updates
from proxopt.penalties import declared

BLOCK = 1 << 18  # entries of a block: one MiB of float32
NEWTON_STEPS = 20
FLOATS = (torch.float32, torch.float64)


def fits(group: dict, entry: list[Tensor]) -> bool:
    """Whether one eager, dense, real tensor is to be updated, with numbers as hyperparameters."""
    p = entry[0]
    if group["joint"] or group["differentiable"] or group["capturable"] or not plain_tensor(p):
        return False
    return type(p.grad) is Tensor and p.grad.dtype == p.dtype


def plain_tensor(p: Tensor) -> bool:
    """Whether p is a dense float32 or float64 tensor that runs eagerly, and no subclass with rules of its own."""
    dense = type(p) in (Tensor, torch.nn.Parameter) and p.dtype in FLOATS and p.layout == torch.strided and p.numel() > 0
    return dense and not torch.compiler.is_compiling()


def run(kernel: Any, group: dict, penalty: Any, x: Tensor, grad: Tensor, state: dict) -> None:
    """One step of `kernel`, with x, its gradient and its state in one dense layout.

    torch's fused CPU kernels walk through memory from the first entry of each tensor, whatever its strides: with tensors of
    different strides they pair wrong entries, and behind a view they write into memory that belongs to another tensor.
    """
    dense = x if is_dense(x) else x.contiguous()
    for name, tensor in state.items():
        if name != "step":
            state[name] = in_layout_of(dense, tensor)
    kernel(group, penalty, dense, in_layout_of(dense, grad), state)
    if dense is not x:
        x.copy_(dense)


def is_dense(x: Tensor) -> bool:
    """Whether the entries of x fill one block of memory, each place once: contiguous in some order of the axes."""
    if x.is_contiguous():
        return True
    size = 1
    for stride, length in sorted((stride, length) for stride, length in zip(x.stride(), x.shape) if length > 1):
        if stride != size:
            return False
        size *= length
    return True


def in_layout_of(x: Tensor, other: Tensor) -> Tensor:
    """`other` with the strides of the dense tensor x: itself where it has them, else a copy."""
    if other.stride() == x.stride() or (x.is_contiguous() and other.is_contiguous()):
        return other
    return torch.empty_like(x, dtype=other.dtype, device=other.device).copy_(other)


def prox_sgd(group: dict, penalty: Any, x: Tensor, grad: Tensor, state: dict) -> None:
    lr, rho, tau = float(group["lr"]), group["rho"], group["tau"]
    state["step"] += 1
    if tau is not None:
        velocity = state["velocity"].lerp_(grad, rho)
        point = torch.add(x, velocity, alpha=-1 / tau, out=state["point"])
        prox_(penalty, point, 1 / tau)
        x.lerp_(point, lr)
        return
    sgd(
        [x],
        [grad],
        [state["velocity"]],
        fused=_fused(x),
        foreach=False,
        weight_decay=0.0,
        momentum=1 - rho,
        dampening=1 - rho,
        lr=lr,
        nesterov=False,
        maximize=False,
    )
    prox_(penalty, x, lr)


def hapg(group: dict, penalty: Any, x: Tensor, grad: Tensor, state: dict) -> None:
    lr, u = float(group["lr"]), _next_momentum(group, state)
    state["step"] += 1
    for rows, grad_rows, last in _blocks(penalty, x, grad, state["point"]):
        prox_(penalty, rows.add_(grad_rows, alpha=-lr), lr)
        _extrapolate_(rows, last, u)


def prox_adam(group: dict, penalty: Any, x: Tensor, grad: Tensor, state: dict) -> None:
    _adam_(group, x, grad, state, group["weight_decay"] if group["decoupled_weight_decay"] else 0.0)
    if penalty is not None:
        for rows, square in _blocks(penalty, x, state["exp_avg_sq"]):
            _adam_prox_(group, penalty, rows, square, state, "exact")


def adam_hapg(group: dict, penalty: Any, x: Tensor, grad: Tensor, state: dict) -> None:
    u = _next_momentum(group, state)
    _adam_(group, x, grad, state, 0.0)
    for rows, square, last in _blocks(penalty, x, state["exp_avg_sq"], state["point"]):
        _adam_prox_(group, penalty, rows, square, state, "median")
        _extrapolate_(rows, last, u)


def prox_(penalty: Any, z: Tensor, step: float) -> None:
    """z <- prox(z, step) for a number as step."""
    if penalty is None:
        return
    form = _form(penalty, z)
    if form is None:
        z.copy_(penalty.prox(z, step))
        return
    l1, bound, axes, _ = form
    if l1 * step > 0:
        torch.ops.aten.softshrink.out(z, l1 * step, out=z)
    if bound * step > 0:
        _scale_(z, torch.linalg.vector_norm(z, dim=axes, keepdim=True).reciprocal_().mul_(-bound * step))
    elif l1 * step > 0:
        z.add_(0.0)  # softshrink leaves -0 for a dead negative entry


def metric_prox_(penalty: Any, z: Tensor, h: Tensor, scale: float, metric: str) -> None:
    """z <- prox(z, scale * h) for a tensor h > 0 as step; h is used up."""
    penalty = declared.with_metric(penalty, metric)
    form = _form(penalty, z)
    if form is None:
        z.copy_(penalty.prox(z, h.mul_(scale)))
        return
    l1, bound, axes, own_metric = form
    if l1 > 0:
        torch.copysign(z.abs().sub_(h, alpha=l1 * scale).relu_(), z, out=z)
    if bound > 0:
        shrink = {"median": _median_shrink_, "support": _support_shrink_, "exact": _exact_shrink_}[own_metric or "exact"]
        shrink(z, h, bound * scale, axes)
    elif l1 > 0:
        z.add_(0.0)  # -0 becomes 0


def _median_shrink_(z: Tensor, h: Tensor, bound: float, axes: tuple[int, ...]) -> None:
    norm = torch.linalg.vector_norm(z, dim=axes, keepdim=True)
    _scale_(z, norm.reciprocal_().mul_(_median(h, axes).mul_(-bound)))


def _median(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    groups = Groups.along(axes)
    return torch.from_numpy(groups.median([x.numpy()])) if x.device.type == "cpu" else groups.median([x])


def _support_shrink_(z: Tensor, h: Tensor, bound: float, axes: tuple[int, ...]) -> None:
    dual = torch.linalg.vector_norm(torch.div(z, h, out=h), dim=axes, keepdim=True)
    _scale_(z, dual.reciprocal_().mul_(-bound))


def _scale_(z: Tensor, change: Tensor) -> None:
    """z <- max(1 + change, 0) z, with +0 for dead entries."""
    z.mul_(change.add_(1).clamp_(min=0)).add_(0.0)


def _exact_shrink_(z: Tensor, h: Tensor, bound: float, axes: tuple[int, ...]) -> None:
    """`proxopt.penalties.metric.metric_shrink` in place, with r / bound as unknown: sum z^2 / (rho + h)^2 = bound^2.

    Newton starts at the root for the support step, is kept in its bracket, and stops when the next move would be below rounding.
    """
    ratio = z / h
    dual = torch.linalg.vector_norm(ratio, dim=axes, keepdim=True)
    dead = dual <= bound
    norm = torch.linalg.vector_norm(z, dim=axes, keepdim=True)
    low = (norm / bound - h.amax(dim=axes, keepdim=True)).clamp_(min=0)
    high = norm / bound
    root = (high - norm / dual).clamp_(low, high)
    enough = torch.finfo(z.dtype).eps ** 0.5 / 8  # converges quadratically
    below = torch.empty_like(h)
    for _ in range(NEWTON_STEPS):
        torch.add(h, root, out=below)
        torch.div(z, below, out=ratio)
        f = torch.linalg.vector_norm(ratio, dim=axes, keepdim=True).div_(bound)
        slope = ratio.mul_(ratio).div_(below).sum(dim=axes, keepdim=True).div_(bound * bound)
        move = f * f * (f - 1) / slope
        root = (root + move).clamp_(low, high)
        if bool((dead | (move.abs_() <= enough * root)).all()):
            break
    root = root.masked_fill(dead, 0)
    z.mul_(torch.div(root, h.add_(root), out=h)).add_(0.0)


def _adam_(group: dict, x: Tensor, grad: Tensor, state: dict, decay: float) -> None:
    """x <- (1 - lr decay) x - eta m_hat, moments and step count included."""
    adam(
        [x],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        foreach=False,
        capturable=False,
        differentiable=False,
        fused=_fused(x),
        decoupled_weight_decay=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=decay,
        eps=group["eps"],
        maximize=False,
    )


def _adam_prox_(group: dict, penalty: Any, z: Tensor, square: Tensor, state: dict, metric: str) -> None:
    """z <- prox(z, eta) with Adam's step of each entry."""
    lr = float(group["lr"])
    if penalty is None or lr == 0:
        return
    correction = math.sqrt(1 - group["betas"][1] ** int(state["step"].item()))
    h = square.sqrt().add_(group["eps"] * correction).reciprocal_()
    metric_prox_(penalty, z, h, lr * correction, metric)


def _extrapolate_(x: Tensor, last: Tensor, u: float) -> None:
    """From p_t in x and p_{t-1} in last to p_t + u (p_t - p_{t-1}) in x and p_t in last."""
    search = torch.lerp(last, x, 1 + u)
    last.copy_(x)
    x.copy_(search)


def _next_momentum(group: dict, state: dict) -> float:
    return updates.momentum(int(state["step"].item()) + 1, group["extrapolation"])


def _blocks(penalty: Any, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching slices along the first axis that fit the cache and cut no group; all at once where groups cross that axis."""
    x = tensors[0]
    if x.ndim == 0 or x.numel() <= BLOCK or not _splits(penalty, x):
        yield tensors
        return
    yield from zip(*(t.split(max(1, BLOCK * x.shape[0] // x.numel())) for t in tensors))


def _splits(penalty: Any, x: Tensor) -> bool:
    """Whether the prox may be taken of slices along the first axis, one after the other."""
    if penalty is None:
        return True
    if declared.batched(penalty, x.ndim) is None:
        return False
    groups = declared.partition(penalty)
    return groups is None or -x.ndim not in groups.axes(x.ndim)


def _form(penalty: Any, z: Tensor) -> tuple[float, float, tuple[int, ...], str | None] | None:
    """Thresholds of entries and groups, group axes and metric, of a penalty that declares them as numbers."""
    form = declared.shrinkage(penalty)
    thresholds = None if form is None else form.thresholds(z)
    return None if thresholds is None or form is None else (*thresholds, form.metric)


def _fused(x: Tensor) -> bool:
    return x.device.type == "cpu"
