"""Gradients of architecture weights A in min_A L_val(w*(A), A), w*(A) = argmin_w L_train(w, A).

First order approximates w* by w. Second order approximates it by one step of the weight optimizer, w' = w - lr d(w, A):

    dA = grad_A L_val(w', A) - lr grad_A <grad_w L_train(w, A), v>,    v = grad_w' L_val(w', A)

where the last term is computed by a central difference in w, as in DARTS, or exactly by differentiating twice. With `clip` the
gradients grad_w L_train and v are first clipped to that norm, as DARTS does for recurrent networks; the clipping factor of the
former then multiplies the last term.

Source: Liu, Simonyan, Yang, "DARTS", 2019, Eq. 5-8; SparseNAS, Eq. 11-13 (which print v with the training loss; by the chain
rule, and in the code they refer to, it is the validation loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .settings import HESSIANS, RADIUS

Loss = Callable[[], Tensor]
Average = Callable[[Sequence[Tensor]], None]


def first_order(arch: Sequence[Tensor], valid_loss: Loss, average: Average = lambda tensors: None) -> list[Tensor]:
    """Compute grad_A L_val(w, A), without a gradient of the weights.

    Args:
      arch: the architecture weights A.
      valid_loss: returns L_val(w, A).
      average: replaces tensors by their mean over the processes of a data-parallel run.
    """
    grads = [_or_zero(g, a) for g, a in zip(_grad(valid_loss(), arch), arch)]
    average(grads)
    return grads


def second_order(
    arch: Sequence[Tensor],
    weights: Sequence[Tensor],
    train_loss: Loss,
    valid_loss: Loss,
    lr: float,
    direction: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda grads: grads,
    hessian: str = "difference",
    average: Average = lambda tensors: None,
    clip: float = 0.0,
) -> list[Tensor]:
    """Compute the second-order gradient above. `weights` are changed meanwhile, and restored exactly.

    Args:
      arch: the architecture weights A.
      weights: the weights w; both losses use these tensors and `arch`.
      lr: learning rate of the step to w'.
      direction: computes d(w, A) from grad_w L_train(w, A): adds momentum and weight decay of the weight optimizer.
      hessian: "difference", by two gradients at w +- 0.01 v / ||v||, or "exact".
      average: as in `first_order`.
      clip: clipping threshold of the norms of grad_w L_train and v; 0: no clipping.

    Raises:
      ValueError: an unknown `hessian`.
    """
    if hessian not in HESSIANS:
        raise ValueError(f"hessian must be one of {', '.join(HESSIANS)}, got {hessian!r}")
    start = [w.detach().clone() for w in weights]
    grads = [_or_zero(g, w) for g, w in zip(torch.autograd.grad(train_loss(), weights, allow_unused=True), weights)]
    average(grads)
    grads, factor = clipped(grads, clip)
    with torch.no_grad():
        torch._foreach_add_(list(weights), list(direction(grads)), alpha=-lr)
    both = [*arch, *weights]
    found = [_or_zero(g, t) for g, t in zip(_grad(valid_loss(), both), both)]
    average(found)
    outer, (v, _) = found[: len(arch)], clipped(found[len(arch) :], clip)
    _restore(weights, start)
    inner = _exact(arch, weights, train_loss, v) if hessian == "exact" else _difference(arch, weights, train_loss, v, start)
    average(inner)
    return [o - lr * factor * i for o, i in zip(outer, inner)]


def clipped(grads: list[Tensor], clip: float) -> tuple[list[Tensor], Tensor | float]:
    """Clip the gradients to the norm `clip` (0: no clipping); return them and the factor."""
    if not clip:
        return grads, 1.0
    factor = clip_factor(grads, clip)
    return [g * factor for g in grads], factor


@torch.no_grad()
def clip(grads: list[Tensor], threshold: float) -> None:
    """Clip the gradients to the norm `threshold` in place, without reading it on the host."""
    torch._foreach_mul_(grads, clip_factor(grads, threshold))


def clip_factor(grads: Sequence[Tensor], threshold: float) -> Tensor:
    """The factor that clips gradients to this norm."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return (threshold / (norm + 1e-6)).clamp(max=1.0)


@contextmanager
def constant(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Context in which the tensors need no gradient, so that nothing is kept or computed for it."""
    for t in tensors:
        t.requires_grad_(False)
    try:
        yield
    finally:
        for t in tensors:
            t.requires_grad_(True)


def _difference(
    arch: Sequence[Tensor], weights: Sequence[Tensor], loss: Loss, v: list[Tensor], start: list[Tensor]
) -> list[Tensor]:
    norm = torch.stack(torch._foreach_norm(v)).norm()
    eps = torch.where(norm > 0, RADIUS / norm, 0.0)
    sides = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for w, s, d in zip(weights, start, v):
                w.copy_(s + sign * eps * d)
        with constant(weights):
            found = _grad(loss(), arch)
        sides.append([_or_zero(g, a) for g, a in zip(found, arch)])
    _restore(weights, start)
    return [torch.where(eps > 0, (plus - minus) / (2 * eps), 0.0) for plus, minus in zip(*sides)]


def _exact(arch: Sequence[Tensor], weights: Sequence[Tensor], loss: Loss, v: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss(), weights, create_graph=True, allow_unused=True)
    product = sum((g * d).sum() for g, d in zip(grads, v) if g is not None)
    if not isinstance(product, Tensor) or not product.requires_grad:
        return [torch.zeros_like(a) for a in arch]
    return [_or_zero(g, a) for g, a in zip(torch.autograd.grad(product, arch, allow_unused=True), arch)]


def _grad(loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradient of a loss; None for tensors that it does not depend on, as if a cell has no path to its output."""
    return torch.autograd.grad(loss, tensors, allow_unused=True) if loss.requires_grad else [None] * len(tensors)


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.detach()


@torch.no_grad()
def _restore(weights: Sequence[Tensor], start: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(weights), list(start))
