"""The largest eigenvalue of the Hessian of a loss in the architecture weights, by the Lanczos method.

The gradient is differentiated exactly: central differences of gradients also measure the jumps of the gradient at the kinks of
ReLUs and max pools, which make them ten times too large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .gradients import Average, Loss


def largest_eigenvalue(
    arch: Sequence[Tensor], loss: Loss, average: Average = lambda tensors: None, most: int = 40, tolerance: float = 1e-3
) -> float:
    """The largest eigenvalue of the Hessian of the loss in `arch`.

    Args:
      arch: the architecture weights; the loss depends on these tensors.
      average: as in `gradients.first_order`.
      most: maximal number of products of the Hessian with a vector; each costs about as much as a gradient.
      tolerance: relative change of the eigenvalue between two products at which it has converged.
    """
    sizes = [a.numel() for a in arch]
    grads = torch.autograd.grad(loss(), arch, create_graph=True)

    def product(v: np.ndarray) -> np.ndarray:
        parts = [d.to(a).view_as(a) for d, a in zip(torch.from_numpy(v).split(sizes), arch)]
        found = [*torch.autograd.grad(grads, arch, parts, retain_graph=True)]
        average(found)
        return np.concatenate([h.double().cpu().numpy().ravel() for h in found])

    return lanczos(product, sum(sizes), most, tolerance)


def lanczos(product: Callable[[np.ndarray], np.ndarray], size: int, most: int, tolerance: float) -> float:
    """The largest eigenvalue of a symmetric matrix of this size, given by its product with a vector."""
    v = np.random.default_rng(0).normal(size=size)
    basis = [v / np.linalg.norm(v)]
    diagonal: list[float] = []
    off: list[float] = []
    found = -np.inf
    while len(diagonal) < min(most, size):
        w = product(basis[-1])
        diagonal.append(float(basis[-1] @ w))
        tridiagonal = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
        last, found = found, float(np.linalg.eigvalsh(tridiagonal)[-1])
        if abs(found - last) <= tolerance * abs(found):
            break
        for _ in range(2):  # once is not enough in finite precision
            for b in basis:
                w = w - (b @ w) * b
        norm = float(np.linalg.norm(w))
        if norm <= 1e-12:
            break
        off.append(norm)
        basis.append(w / norm)
    return found
