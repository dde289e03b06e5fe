"""The group shrink with a step for each entry, without a synchronisation of host and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Reduction: TypeAlias = Callable[[Tensor], Tensor]

BISECTIONS = 5  # reduce the ratio of the bounds to its 32nd root: 10 decades to a third of one
NEWTON_STEPS = {torch.float32: 3, torch.float64: 5}  # by dtype: at most a decade from the root the error is squared in each


def exact_shrink_(z: Tensor, h: Tensor, bound: float, axes: tuple[int, ...]) -> None:
    r"""Replace z by the prox of ``bound`` times its group norms with the steps h, which are overwritten.

    With the threshold b (``bound``) and the groups along ``axes``, the result is 0 where :math:`\|z / h\| \le b`, else

    .. math::

        z_i \frac{r}{r + b h_i}, \qquad \sum_i \frac{z_i^2}{(r + b h_i)^2} = 1 .

    The root r is the zero of the concave increasing function :math:`F(r)^{-1/2} - 1`, where F is the sum above. A Newton step
    from any point ends left of the root, and the next ones increase towards it; where the steps h spread over many decades, they
    cover about one decade each, so that the bounds of the root are first bisected on a logarithmic scale. The number of steps is
    fixed, because a test of convergence would wait for the device. Groups are divided by their largest entry, so that no square
    overflows or underflows.
    """
    size = z.abs().amax(dim=axes, keepdim=True)
    unit = size.masked_fill_(~((size > 0) & size.isfinite()), 1)
    y = z / unit
    a = h.mul_(bound).div_(unit).clamp_(min=torch.finfo(z.dtype).tiny)

    def norm(values: Tensor) -> Tensor:
        result: Tensor = torch.linalg.vector_norm(values, dim=axes, keepdim=True)
        return result

    zeroed = norm(y / a) <= 1
    high = norm(y)
    low = torch.maximum((y.abs() - a).amax(dim=axes, keepdim=True), high - a.amax(dim=axes, keepdim=True)).clamp_(min=0)
    root = _root(y, a, low, high, lambda values: values.sum(dim=axes, keepdim=True)).masked_fill_(zeroed, 0)
    z.mul_(torch.div(root, a.add_(root), out=a)).add_(0.0)  # + 0.0 turns -0 into 0


def _root(y: Tensor, a: Tensor, low: Tensor, high: Tensor, total: Reduction) -> Tensor:
    """The root r of ``total(y^2 / (r + a)^2) = 1`` between the bounds."""
    below, ratio = torch.empty_like(a), torch.empty_like(a)

    def newton(point: Tensor) -> Tensor:
        torch.add(a, point, out=below)
        torch.div(y, below, out=ratio)
        f = total(ratio.square_())
        return point + f * (f.sqrt() - 1) / total(ratio.div_(below))

    low = newton(low).clamp_(low, high)
    for _ in range(BISECTIONS):
        middle = (low * high).sqrt_()
        ahead = newton(middle)
        high = torch.where(ahead < middle, middle, high)
        low = ahead.clamp_(low, high)
    for _ in range(NEWTON_STEPS[y.dtype]):
        low = newton(low).clamp_(low, high)
    return low
