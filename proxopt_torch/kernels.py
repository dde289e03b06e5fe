"""Fused implementations of the steps of ``proxopt.updates``, in place, for one dense tensor. They equal them up to rounding.

A step is bound by memory traffic, so that a large tensor is processed in blocks of rows that stay in the cache from the gradient
step to the extrapolation. The gradient steps of Adam and SGD are torch's own fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from proxopt import Groups, ProxOperator, updates
from proxopt.penalties import declared
from proxopt_torch.device.exact import exact_shrink_
from proxopt_torch.param_groups import Entry, ParamGroup, State

Kernel: TypeAlias = Callable[[ParamGroup, ProxOperator | None, Tensor, Tensor, State], None]
Form: TypeAlias = tuple[float, float, tuple[int, ...], str | None]  # see `_form`

BLOCK = 1 << 18  # entries of a block: one MiB of float32
NEWTON_STEPS = 20  # a limit: the loop ends when it has converged, which NaN never does
FLOATS = (torch.float32, torch.float64)


def fits(group: ParamGroup, entry: Entry) -> bool:
    """Whether the kernels can update this entry: one dense real tensor, in eager mode, with step count and lr on the CPU."""
    p, lr = entry[0], group["lr"]
    if group["joint"] or group["differentiable"] or group["capturable"] or not plain_tensor(p):
        return False
    if isinstance(lr, Tensor) and lr.device.type != "cpu":  # reading it would wait for its device
        return False
    return type(p.grad) is Tensor and p.grad.dtype == p.dtype


def plain_tensor(p: Tensor) -> bool:
    """Whether p is a strided float32 or float64 tensor in eager mode, and of no subclass, which may override operations."""
    own = type(p) in (Tensor, torch.nn.Parameter)
    return own and p.dtype in FLOATS and p.layout == torch.strided and p.numel() > 0 and not torch.compiler.is_compiling()


def run(kernel: Kernel, group: ParamGroup, penalty: ProxOperator | None, x: Tensor, grad: Tensor, state: State) -> None:
    """Take one step with ``kernel``, with x, its gradient and its state in the same dense layout.

    torch's fused CPU kernels read each tensor as contiguous memory from its first entry on, and ignore its strides. Tensors of
    different strides would be combined at wrong entries, and for a view that does not fill its memory, the kernels would
    overwrite entries of another tensor.
    """
    dense = x if is_dense(x) else x.contiguous()
    for name, tensor in state.items():
        if name != "step":
            state[name] = in_layout_of(dense, tensor)
    kernel(group, penalty, dense, in_layout_of(dense, grad), state)
    if dense is not x:
        x.copy_(dense)


def is_dense(x: Tensor) -> bool:
    """Whether the entries of x fill one block of memory without gaps or overlaps: it is contiguous in some order of its axes."""
    if x.is_contiguous():
        return True
    size = 1
    for stride, length in sorted((stride, length) for stride, length in zip(x.stride(), x.shape) if length > 1):
        if stride != size:
            return False
        size *= length
    return True


def in_layout_of(x: Tensor, other: Tensor) -> Tensor:
    """``other`` with the shape and strides of the dense tensor x, as a copy unless it has them already.

    Raises RuntimeError where the shapes do not fit, after an assignment to ``x.data`` for example.
    """
    if other.shape == x.shape and (other.stride() == x.stride() or (x.is_contiguous() and other.is_contiguous())):
        return other
    return torch.empty_like(x, dtype=other.dtype, device=other.device).copy_(other)


def prox_sgd(group: ParamGroup, penalty: ProxOperator | None, x: Tensor, grad: Tensor, state: State) -> None:
    """ProxSGD: the fused SGD of torch and the prox, or with ``tau`` the two points of GSparsity."""
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


def hapg(group: ParamGroup, penalty: ProxOperator | None, x: Tensor, grad: Tensor, state: State) -> None:
    """HAPG: gradient step, prox and extrapolation, block by block."""
    lr, u = float(group["lr"]), _next_momentum(group, state)
    state["step"] += 1
    for rows, grad_rows, last in _blocks(penalty, x, grad, state["point"]):
        prox_(penalty, rows.add_(grad_rows, alpha=-lr), lr)
        _extrapolate_(rows, last, u)


def prox_adam(group: ParamGroup, penalty: ProxOperator | None, x: Tensor, grad: Tensor, state: State) -> None:
    """ProxAdam: torch's fused Adam, then the prox, block by block."""
    _adam_(group, x, grad, state, group["weight_decay"] if group["decoupled_weight_decay"] else 0.0)
    if penalty is not None:
        for rows, square in _blocks(penalty, x, state["exp_avg_sq"]):
            _adam_prox_(group, penalty, rows, square, state, "exact")


def adam_hapg(group: ParamGroup, penalty: ProxOperator | None, x: Tensor, grad: Tensor, state: State) -> None:
    """AdamHAPG: torch's fused Adam, then prox and extrapolation, block by block."""
    u = _next_momentum(group, state)
    _adam_(group, x, grad, state, 0.0)
    for rows, square, last in _blocks(penalty, x, state["exp_avg_sq"], state["point"]):
        _adam_prox_(group, penalty, rows, square, state, "median")
        _extrapolate_(rows, last, u)


def prox_(penalty: ProxOperator | None, z: Tensor, step: float) -> None:
    """Replace z by its prox, for a number as step."""
    if penalty is None:
        return
    penalty = _at_positive_part(penalty, z)
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
        z.add_(0.0)  # softshrink leaves -0 where it zeroes a negative entry


def metric_prox_(penalty: ProxOperator, z: Tensor, h: Tensor, scale: float, metric: str) -> None:
    """Replace z by its prox with the step ``scale * h`` for a tensor h > 0, which is overwritten."""
    penalty = _at_positive_part(declared.with_metric(penalty, metric), z)
    form = _form(penalty, z)
    if form is None:
        z.copy_(penalty.prox(z, h.mul_(scale)))
        return
    l1, bound, axes, own_metric = form
    if l1 > 0:  # there is no softshrink with a tensor as threshold
        torch.copysign(z.abs().sub_(h, alpha=l1 * scale).relu_(), z, out=z)
    if bound > 0:
        shrink = {"median": _median_shrink_, "support": _support_shrink_, "exact": _exact_shrink_}[own_metric or "exact"]
        shrink(z, h, bound * scale, axes)
    elif l1 > 0:
        z.add_(0.0)  # turns -0 into 0


def _at_positive_part(penalty: ProxOperator, z: Tensor) -> ProxOperator:
    """The penalty that a nonnegative one takes at max(z, 0), which replaces z then; any other as it is."""
    inner = declared.on_positive_part(penalty)
    if inner is None:
        return penalty
    z.clamp_(min=0).add_(0.0)  # turns -0 into 0
    return inner


def _median_shrink_(z: Tensor, h: Tensor, bound: float, axes: tuple[int, ...]) -> None:
    norm = torch.linalg.vector_norm(z, dim=axes, keepdim=True)
    _scale_(z, norm.reciprocal_().mul_(_median(h, axes).mul_(-bound)))


def _median(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    groups = Groups.along(axes)
    # On a CPU NumPy, which partitions, is faster than torch, which sorts
    median: Tensor = torch.from_numpy(groups.median([x.numpy()])) if x.device.type == "cpu" else groups.median([x])
    return median


def _support_shrink_(z: Tensor, h: Tensor, bound: float, axes: tuple[int, ...]) -> None:
    dual = torch.linalg.vector_norm(torch.div(z, h, out=h), dim=axes, keepdim=True)
    _scale_(z, dual.reciprocal_().mul_(-bound))


def _scale_(z: Tensor, change: Tensor) -> None:
    """Multiply z by ``max(1 + change, 0)``; entries that become zero are +0, also where they were negative."""
    z.mul_(change.add_(1).clamp_(min=0)).add_(0.0)


def _exact_shrink_(z: Tensor, h: Tensor, bound: float, axes: tuple[int, ...]) -> None:
    r"""``proxopt.penalties.metric.metric_shrink`` in place: the shrink of groups with a step for each entry.

    With the threshold b (``bound``) the result is :math:`z_i \rho / (\rho + h_i)`, where :math:`\rho` solves

    .. math::

        \sum_i \frac{z_i^2}{(\rho + h_i)^2} = b^2

    and 0 if :math:`\|z / h\| \le b`. Newton's method starts at the root for the step of the metric "support", is clamped to an
    interval that contains the root, and stops when its next move would be below rounding. That test waits for a device, where
    the number of steps is therefore fixed.
    """
    if z.device.type != "cpu":
        exact_shrink_(z, h, bound, axes)
        return
    ratio = z / h
    dual = torch.linalg.vector_norm(ratio, dim=axes, keepdim=True)
    zeroed = dual <= bound
    norm = torch.linalg.vector_norm(z, dim=axes, keepdim=True)
    low = (norm / bound - h.amax(dim=axes, keepdim=True)).clamp_(min=0)
    high = norm / bound
    root = (high - norm / dual).clamp_(low, high)
    enough = torch.finfo(z.dtype).eps ** 0.5 / 8  # convergence is quadratic: the move after one of this size is below rounding
    below = torch.empty_like(h)
    for _ in range(NEWTON_STEPS):
        torch.add(h, root, out=below)
        torch.div(z, below, out=ratio)
        f = torch.linalg.vector_norm(ratio, dim=axes, keepdim=True).div_(bound)
        slope = ratio.mul_(ratio).div_(below).sum(dim=axes, keepdim=True).div_(bound * bound)
        move = f * f * (f - 1) / slope
        root = (root + move).clamp_(low, high)
        if bool((zeroed | (move.abs_() <= enough * root)).all()):
            break
    root = root.masked_fill(zeroed, 0)
    z.mul_(torch.div(root, h.add_(root), out=h)).add_(0.0)


def _adam_(group: ParamGroup, x: Tensor, grad: Tensor, state: State, decay: float) -> None:
    """Take the step of Adam or AdamW, and update its moments and the step count."""
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


def _adam_prox_(group: ParamGroup, penalty: ProxOperator | None, z: Tensor, square: Tensor, state: State, metric: str) -> None:
    """Replace z by its prox with Adam's step of each entry as step."""
    lr = float(group["lr"])
    if penalty is None or lr == 0:
        return
    # eta = lr / (sqrt(v / c^2) + eps) = lr c / (sqrt(v) + eps c), with the correction c^2 = 1 - beta_2^t of the bias of v
    correction = math.sqrt(1 - group["betas"][1] ** int(state["step"].item()))
    h = square.sqrt().add_(group["eps"] * correction).reciprocal_()
    metric_prox_(penalty, z, h, lr * correction, metric)


def _extrapolate_(x: Tensor, last: Tensor, u: float) -> None:
    """Extrapolate: x holds p_t and then p_t + u (p_t - p_{t-1}), ``last`` holds p_{t-1} and then p_t."""
    search = torch.lerp(last, x, 1 + u)
    last.copy_(x)
    x.copy_(search)


def _next_momentum(group: ParamGroup, state: State) -> float:
    return float(updates.momentum(int(state["step"].item()) + 1, group["extrapolation"]))


def _blocks(penalty: ProxOperator | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching slices along the first axis that fit the cache; the whole tensors where groups extend along that axis."""
    x = tensors[0]
    if x.ndim == 0 or x.numel() <= BLOCK or not _splits(penalty, x):
        yield tensors
        return
    rows = max(1, BLOCK * x.shape[0] // x.numel())
    yield from zip(*(torch.split(t, rows) for t in tensors))


def _splits(penalty: ProxOperator | None, x: Tensor) -> bool:
    """Whether the prox of a slice along the first axis is the slice of the prox."""
    if penalty is None:
        return True
    if declared.batched(penalty, x.ndim) is None:
        return False
    groups = declared.partition(penalty)
    return groups is None or -x.ndim not in groups.axes(x.ndim)


def _form(penalty: ProxOperator, z: Tensor) -> Form | None:
    """Thresholds of entries and of groups at step 1, the axes inside groups, and the metric; None where these are no numbers."""
    form = declared.shrinkage(penalty)
    thresholds = None if form is None else form.thresholds(z)
    return None if thresholds is None or form is None else (*thresholds, form.metric)


def _fused(x: Tensor) -> bool:
    return x.device.type == "cpu"
