"""ProxSGD, HAPG, ProxAdam and AdamHAPG: drop-in optimizers whose steps land on exact zeros.

The maths is `proxopt.updates`; this file says which state each optimizer keeps and which keywords it takes.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from proxopt import updates
from proxopt._checks import in_range
from proxopt_torch import kernels
from proxopt_torch.base import ProximalOptimizer

_FLAGS = """
      penalty: default penalty of groups that name none; groups have their own under the key "penalty".
      maximize: ascend the gradient; the penalty still shrinks.
      foreach: step tensors of one shape as one stacked tensor. None: where many are small.
      capturable: keep the step count on the device, for CUDA graphs.
      differentiable: let autograd run through the step.
      check_finite: refuse NaN and inf in gradients before anything is updated. None: on CPU yes, elsewhere no. Where
        parameters are sharded (DTensor) the ranks agree on it, by one reduction of a number per param group.

    Raises:
      ValueError: an argument out of its domain, a parameter in two groups, groups that do not fit a parameter, a penalty
        that is not supported on a sharded parameter (`proxopt_torch.sharding` says which are).
      TypeError: a penalty that is none.
"""


class ProxSGD(ProximalOptimizer):
    """Proximal SGD with momentum: f(w) + penalty(w), exact zeros.

        v <- (1 - rho) v + rho g
        tau=None:  w <- prox(w - lr v, lr)
        tau > 0:   w_hat = prox(w - v / tau, 1 / tau),   w <- w + lr (w_hat - w)

    With `tau=None` the parameters themselves are sparse. With `tau` (GSparsity) w only decays towards zero, and w_hat is the prox
    point: `optimizer.eval()` swaps it in. At rest exactly at the stationary points of f + penalty.

    Args:
      params: parameters or param groups.
      lr: step size, a number >= 0 or a one-element tensor; epsilon in GSparsity when tau is given.
      rho: weight of the new gradient, in (0, 1]; 1 is no momentum.
      tau: curvature of the model step, > 0, or None.
      weight_decay: adds weight_decay * w to the gradient.FLAGS

    Source: GSparsity, Eq. 1; Yang et al., "ProxSGD", ICLR 2020.

    >>> import torch
    >>> from proxopt import L1
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    >>> optimizer = ProxSGD([{"params": [w], "penalty": L1(0.5)}], lr=0.1)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([0.7900, 0.0000])
    """

    _kernel = staticmethod(kernels.prox_sgd)
    tensors_like_params = ("velocity", "point", "search_point")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        rho: float = 0.8,
        tau: float | None = None,
        *,
        weight_decay: float = 0.0,
        penalty: Any = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool | None = None,
    ) -> None:
        in_range("rho", rho, 0, 1, open_low=True)
        if tau is not None:
            in_range("tau", tau, open_low=True)
        super().__init__(params, _defaults(locals(), "lr rho tau"))

    def _tensors(self, group: dict) -> tuple[str, ...]:
        return ("velocity",) if group["tau"] is None else ("velocity", "point")

    def _update(self, group: dict, penalty: Any, x: Any, grad: Any, values: list, count: Any) -> tuple[Any, tuple]:
        state = updates.ProxSGDState(values[0], values[-1], count)
        return updates.prox_sgd(x, grad, state, penalty, lr=group["lr"], rho=group["rho"], tau=group["tau"])


class HAPG(ProximalOptimizer):
    """Hierarchical accelerated proximal gradient: f(A) + penalty(A), exact zeros.

        p_t = prox(A_{t-1} - lr g_{t-1}, lr),   A_t = p_t + u_t (p_t - p_{t-1}),   u_t = min(cap, max(0, (t-2)/(t+1)))

    The parameters hold the search point A while training; `optimizer.eval()` swaps in the prox point p, which is exactly
    sparse. A parameter without penalty follows the same recursion with prox = identity. At rest exactly at the stationary points
    of f + penalty.

    Args:
      params: parameters or param groups.
      lr: step size, a number >= 0 or a one-element tensor.
      extrapolation: the cap, a number in [0, 1]; or "nesterov", the rule of the paper without a cap; or "as_printed", which has
        u_1 = -1/2 as well. Without a cap minibatch noise accumulates: the error it leaves does not fall with the lr. Pass
        "nesterov" to reproduce the paper, or where gradients are exact and the problem is ill-conditioned.
      weight_decay: adds weight_decay * A to the gradient.FLAGS

    Source: SparseNAS Eq. 6-8.

    >>> import torch
    >>> from proxopt import SparseGroupLasso, Groups
    >>> net = torch.nn.Linear(4, 2)
    >>> penalty = SparseGroupLasso(10.0, groups=Groups.along(0))
    >>> optimizer = HAPG([{"params": [net.weight], "penalty": penalty}, {"params": [net.bias]}], lr=0.1)
    >>> net(torch.ones(4)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.eval()
    >>> int(net.weight.count_nonzero())
    0
    """

    _kernel = staticmethod(kernels.hapg)
    tensors_like_params = ("point", "search_point")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        extrapolation: str | float = updates.EXTRAPOLATION,
        weight_decay: float = 0.0,
        penalty: Any = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool | None = None,
    ) -> None:
        updates.check_extrapolation(extrapolation)
        super().__init__(params, _defaults(locals(), "lr extrapolation"))

    def _tensors(self, group: dict) -> tuple[str, ...]:
        return ("point",)

    def _update(self, group: dict, penalty: Any, x: Any, grad: Any, values: list, count: Any) -> tuple[Any, tuple]:
        state = updates.HAPGState(values[0], count)
        return updates.hapg(x, grad, state, penalty, lr=group["lr"], extrapolation=group["extrapolation"])


class ProxAdam(ProximalOptimizer):
    """Adam or AdamW, then the prox in Adam's own metric: exact zeros, the everyday choice.

        z = w - eta m_hat,   w <- prox(z, eta),   eta_i = lr / (sqrt(v_hat_i) + eps)

    The parameters themselves are sparse after each step. At rest exactly at the stationary points of f + penalty with the exact
    metric (the default) and no decoupled decay.

    Args:
      params: parameters or param groups.
      lr: step size, a number >= 0 or a one-element tensor.
      betas: decay of Adam's two moments, each in [0, 1).
      eps: added to the root of the second moment, >= 0.
      weight_decay: decoupled as in AdamW where `decoupled_weight_decay`, else added to the gradient as in Adam.FLAGS

    Source: Kingma and Ba, "Adam", 2015; Yun, Lozano, Yang, "Adaptive proximal gradient methods for structured neural
    networks", 2021.

    >>> import torch
    >>> from proxopt import L1
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    >>> optimizer = ProxAdam([w], lr=0.1, penalty=L1(0.5))
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([0.8750, 0.0000])
    """

    componentwise = True
    metric = "exact"
    _kernel = staticmethod(kernels.prox_adam)
    tensors_like_params = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        penalty: Any = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool | None = None,
    ) -> None:
        _check_adam(betas, eps)
        super().__init__(params, _defaults(locals(), "lr betas eps decoupled_weight_decay"))

    def _tensors(self, group: dict) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _update(self, group: dict, penalty: Any, x: Any, grad: Any, values: list, count: Any) -> tuple[Any, tuple]:
        decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
        state = updates.ProxAdamState(values[0], values[1], count)
        options = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"], "weight_decay": decay}
        return updates.prox_adam(x, grad, state, penalty, **options)


class AdamHAPG(ProximalOptimizer):
    """HAPG with Adam's gradient step: f(A) + penalty(A), exact zeros.

        p_t = prox(A_{t-1} - eta m_hat, eta),   A_t = p_t + u_t (p_t - p_{t-1}),   eta_i = lr / (sqrt(v_hat_i) + eps)

    The parameters hold the search point A while training; `optimizer.eval()` swaps in the prox point p, which is exactly
    sparse. A penalty's `metric=None` means "median" here, the published rule; with "exact" the method rests exactly
    at the stationary points of f + penalty.

    Args:
      params: parameters or param groups.
      lr: step size, a number >= 0 or a one-element tensor.
      betas: decay of Adam's two moments, each in [0, 1). The extrapolation is momentum already: beta_1 above 0.8 with
        uncapped extrapolation warns, it may diverge.
      eps: added to the root of the second moment, >= 0.
      weight_decay: adds weight_decay * A to the gradient.
      extrapolation: the cap, a number in [0, 1]; or "nesterov", the rule of the paper without a cap; or "as_printed", which has
        u_1 = -1/2 as well. Without a cap minibatch noise accumulates without bound, at any lr. Pass "nesterov" to reproduce the
        paper, or where gradients are exact and the problem is ill-conditioned.FLAGS

    Source: SparseNAS, section "Hierarchical Proximal Optimization".

    >>> import torch
    >>> from proxopt import SparseGroupLasso, Groups
    >>> net = torch.nn.Linear(4, 2)
    >>> penalty = SparseGroupLasso(10.0, groups=Groups.along(0))
    >>> optimizer = AdamHAPG([{"params": [net.weight], "penalty": penalty}, {"params": [net.bias]}], lr=0.1)
    >>> net(torch.ones(4)).sum().backward()
    >>> optimizer.step()
    >>> with optimizer.at_prox_point():
    ...     int(net.weight.count_nonzero())
    0
    """

    componentwise = True
    metric = "median"
    _kernel = staticmethod(kernels.adam_hapg)
    tensors_like_params = ("point", "exp_avg", "exp_avg_sq", "search_point")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        extrapolation: str | float = updates.EXTRAPOLATION,
        penalty: Any = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool | None = None,
    ) -> None:
        _check_adam(betas, eps)
        updates.check_extrapolation(extrapolation)
        if betas[0] > 0.8 and isinstance(extrapolation, str):
            warnings.warn(
                f"betas[0] = {betas[0]} with uncapped extrapolation may diverge, the extrapolation is momentum already: "
                "take betas=(0.5, 0.999)",
                stacklevel=2,
            )
        super().__init__(params, _defaults(locals(), "lr betas eps extrapolation"))

    def _tensors(self, group: dict) -> tuple[str, ...]:
        return ("point", "exp_avg", "exp_avg_sq")

    def _update(self, group: dict, penalty: Any, x: Any, grad: Any, values: list, count: Any) -> tuple[Any, tuple]:
        state = updates.AdamHAPGState(values[0], values[1], values[2], count)
        options = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"]}
        return updates.adam_hapg(x, grad, state, penalty, extrapolation=group["extrapolation"], **options)


def _check_adam(betas: tuple[float, float], eps: float) -> None:
    for i, beta in enumerate(betas):
        in_range(f"betas[{i}]", beta, 0, 1)
        if beta == 1:
            raise ValueError(f"betas[{i}] must lie in [0, 1), got {beta}")
    in_range("eps", eps)


def _defaults(given: dict, own: str) -> dict:
    shared = "weight_decay penalty maximize foreach capturable differentiable check_finite"
    return {key: given[key] for key in f"{own} {shared}".split()}


for _class in (ProxSGD, HAPG, ProxAdam, AdamHAPG):
    _class.__doc__ = (_class.__doc__ or "").replace("FLAGS", _FLAGS.rstrip())
