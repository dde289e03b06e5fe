"""ProxSGD, HAPG, ProxAdam and AdamHAPG: drop-in optimizers whose steps land on exact zeros.

The updates themselves are the functions of ``proxopt.updates``. This module defines the hyperparameters and states of each
optimizer. All minimise a loss F plus a penalty R.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from proxopt import ProxOperator, updates
from proxopt._checks import in_range
from proxopt_torch import compiled, kernels
from proxopt_torch.base import ProximalOptimizer, Tensors
from proxopt_torch.options import check_flags
from proxopt_torch.param_groups import ParamGroup, Params
from proxopt_torch.penalised import warn
from proxopt_torch.projections import Projection


class ProxSGD(ProximalOptimizer):
    r"""Proximal SGD with momentum.

    For the loss F and the penalty :math:`R = \lambda r` (``strength`` is :math:`\lambda`), with the step size :math:`\eta`
    (``lr``), the weight of the new gradient :math:`\rho` (``rho``) and :math:`g_t = \nabla F(w_{t-1})`,

    .. math::

        v_t &= (1 - \rho) v_{t-1} + \rho g_t \\
        w_t &= \operatorname{prox}_{\eta R}(w_{t-1} - \eta v_t)

    so that the parameters are sparse themselves. With the curvature :math:`\tau` (``tau``), the method of GSparsity,

    .. math::

        \hat w_t &= \operatorname{prox}_{R / \tau}(w_{t-1} - v_t / \tau) \\
        w_t &= w_{t-1} + \eta (\hat w_t - w_{t-1})

    where :math:`w_t` only decays towards zero and :math:`\hat w_t` is the sparse prox point, which ``eval()`` puts into the
    parameters. Both converge to stationary points of F + R.

    Args:
      params: parameters, named parameters, or param groups, which may have a ``"penalty"`` of their own.
      lr: step size, a number >= 0 or a tensor with one entry; epsilon in GSparsity, if ``tau`` is given.
      rho: weight of the new gradient, in (0, 1]; 1 is no momentum.
      tau: curvature of the quadratic model of F, > 0, or None for ``1 / lr`` and a full step.
      weight_decay: a number >= 0; ``weight_decay * w`` is added to the gradient.
      penalty: penalty of the groups that have none of their own.
      maximize: ascend the gradient; the penalty still shrinks.
      foreach: update tensors of equal shape as one stacked tensor, where compiled loops are not used. None: if they are small
        and at least four.
      capturable: keep the step count on the device of the parameter, for CUDA graphs.
      differentiable: let autograd differentiate through the step.
      check_finite: raise for NaN and inf in gradients before anything is updated. None: on a CPU only. Where parameters are
        sharded (DTensor) the ranks agree on the result, by one reduction of a number for each param group.
      projection: an object with a method ``project(x)``, such as ``proxopt.Sphere``, or a function: what is applied to the
        parameters, and to the prox point where it is another one, after each step. See ``add_param_group``.

    Raises:
      TypeError: an option of the wrong type, or a penalty that is no ``ProxOperator``.
      ValueError: an argument out of its domain, a parameter in two groups, penalty groups that do not fit a parameter, or a
        penalty that is not supported on a sharded parameter (see ``proxopt_torch.sharding``).

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

    state_names = ("velocity", "point")
    _kernel = staticmethod(kernels.prox_sgd)
    _method = staticmethod(compiled.prox_sgd)
    _device_method = "prox_sgd"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        rho: float = 0.8,
        tau: float | None = None,
        *,
        weight_decay: float = 0.0,
        penalty: ProxOperator | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "rho": rho, "tau": tau},
            weight_decay=weight_decay,
            penalty=penalty,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            check_finite=check_finite,
            projection=projection,
        )

    def check_hyperparameters(self, group: ParamGroup) -> None:
        """Check ``rho`` and ``tau``."""
        in_range("rho", group["rho"], 0, 1, open_low=True)
        if group["tau"] is not None:
            in_range("tau", group["tau"], open_low=True)

    def _state_names(self, group: ParamGroup) -> tuple[str, ...]:
        # without tau the parameters are the prox point
        return ("velocity",) if group["tau"] is None else self.state_names

    def update(
        self,
        group: ParamGroup,
        penalty: ProxOperator | None,
        x: Tensors,
        grad: Tensors,
        state: Sequence[Tensors],
        count: int | Tensor,
    ) -> tuple[Tensors, Sequence[Tensors]]:
        """``proxopt.updates.prox_sgd``."""
        before = updates.ProxSGDState(state[0], state[-1], count)
        new, after = updates.prox_sgd(x, grad, before, penalty, lr=group["lr"], rho=group["rho"], tau=group["tau"])
        return new, (after.velocity, after.point)[: len(state)]


class HAPG(ProximalOptimizer):
    r"""Hierarchical accelerated proximal gradient.

    For the loss F and the penalty :math:`R = \lambda r` (``strength`` is :math:`\lambda`), with the step size :math:`\eta`
    (``lr``), the search point A and the prox point p,

    .. math::

        p_t &= \operatorname{prox}_{\eta R}(A_{t-1} - \eta \nabla F(A_{t-1})) \\
        A_t &= p_t + u_t (p_t - p_{t-1}), \qquad
        u_t = \min\left(\text{cap}, \max\left(0, \tfrac{t - 2}{t + 1}\right)\right)

    While training the parameters hold A, where the gradient is taken. ``eval()`` puts p, which is exactly sparse, into the
    parameters. A parameter without penalty follows the same recursion with the identity as prox. The method converges to
    stationary points of F + R.

    Args:
      params: parameters, named parameters, or param groups, which may have a ``"penalty"`` of their own.
      lr: step size, a number >= 0 or a tensor with one entry.
      extrapolation: the cap of :math:`u_t`, a number in [0, 1]; or ``"nesterov"``, the rule of the paper without a cap; or
        ``"as_printed"``, the same with :math:`u_1 = -1/2`. Without a cap minibatch noise accumulates: the error that it leaves
        does not fall with ``lr``. Pass ``"nesterov"`` to reproduce the paper, or where gradients are exact and the problem is
        ill-conditioned.
      weight_decay: a number >= 0; ``weight_decay * A`` is added to the gradient.
      penalty: penalty of the groups that have none of their own.
      maximize: ascend the gradient; the penalty still shrinks.
      foreach: update tensors of equal shape as one stacked tensor, where compiled loops are not used. None: if they are small
        and at least four.
      capturable: keep the step count on the device of the parameter, for CUDA graphs.
      differentiable: let autograd differentiate through the step.
      check_finite: raise for NaN and inf in gradients before anything is updated. None: on a CPU only. Where parameters are
        sharded (DTensor) the ranks agree on the result, by one reduction of a number for each param group.
      projection: an object with a method ``project(x)``, such as ``proxopt.Sphere``, or a function: what is applied to the
        parameters, and to the prox point where it is another one, after each step. See ``add_param_group``.

    Raises:
      TypeError: an option of the wrong type, or a penalty that is no ``ProxOperator``.
      ValueError: an argument out of its domain, a parameter in two groups, penalty groups that do not fit a parameter, or a
        penalty that is not supported on a sharded parameter (see ``proxopt_torch.sharding``).

    Source: SparseNAS, Eq. 6-8.

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

    state_names = ("point",)
    _kernel = staticmethod(kernels.hapg)
    _method = staticmethod(compiled.hapg)
    _device_method = "hapg"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        extrapolation: str | float = updates.EXTRAPOLATION,
        weight_decay: float = 0.0,
        penalty: ProxOperator | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "extrapolation": extrapolation},
            weight_decay=weight_decay,
            penalty=penalty,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            check_finite=check_finite,
            projection=projection,
        )

    def check_hyperparameters(self, group: ParamGroup) -> None:
        """Check ``extrapolation``."""
        updates.check_extrapolation(group["extrapolation"])

    def update(
        self,
        group: ParamGroup,
        penalty: ProxOperator | None,
        x: Tensors,
        grad: Tensors,
        state: Sequence[Tensors],
        count: int | Tensor,
    ) -> tuple[Tensors, Sequence[Tensors]]:
        """``proxopt.updates.hapg``."""
        before = updates.HAPGState(state[0], count)
        new, after = updates.hapg(x, grad, before, penalty, lr=group["lr"], extrapolation=group["extrapolation"])
        return new, (after.point,)


class ProxAdam(ProximalOptimizer):
    r"""Adam or AdamW, then the prox in Adam's own metric: the optimizer for everyday use.

    For the loss F and the penalty :math:`R = \lambda r` (``strength`` is :math:`\lambda`), with Adam's bias-corrected moments
    :math:`\hat m_t` and :math:`\hat v_t` of the gradients :math:`\nabla F(w_{t-1})`,

    .. math::

        \eta_t = \frac{\text{lr}}{\sqrt{\hat v_t} + \text{eps}}, \qquad
        w_t = \operatorname{prox}_{\eta_t R}(w_{t-1} - \eta_t \hat m_t)

    The step :math:`\eta_t` differs from entry to entry, in the prox too. The parameters are exactly sparse after each step. With
    the exact metric (the default) and no decoupled weight decay the method converges to stationary points of F + R.

    Args:
      params: parameters, named parameters, or param groups, which may have a ``"penalty"`` of their own.
      lr: step size, a number >= 0 or a tensor with one entry.
      betas: decay rates of Adam's two moments, each in [0, 1).
      eps: a number >= 0, added to the root of the second moment.
      weight_decay: a number >= 0; decoupled as in AdamW with ``decoupled_weight_decay=True``, else ``weight_decay * w`` is added
        to the gradient as in Adam.
      decoupled_weight_decay: multiply w by ``1 - lr * weight_decay`` before the step instead.
      penalty: penalty of the groups that have none of their own. ``metric=None`` in it means ``"exact"``.
      maximize: ascend the gradient; the penalty still shrinks.
      foreach: update tensors of equal shape as one stacked tensor, where compiled loops are not used. None: if they are small
        and at least four.
      capturable: keep the step count on the device of the parameter, for CUDA graphs.
      differentiable: let autograd differentiate through the step.
      check_finite: raise for NaN and inf in gradients before anything is updated. None: on a CPU only. Where parameters are
        sharded (DTensor) the ranks agree on the result, by one reduction of a number for each param group.
      projection: an object with a method ``project(x)``, such as ``proxopt.Sphere``, or a function: what is applied to the
        parameters, and to the prox point where it is another one, after each step. See ``add_param_group``.

    Raises:
      TypeError: an option of the wrong type, a penalty that is no ``ProxOperator``, or one on complex parameters.
      ValueError: an argument out of its domain, a parameter in two groups, penalty groups that do not fit a parameter, or a
        penalty that is not supported on a sharded parameter (see ``proxopt_torch.sharding``).

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
    state_names = ("exp_avg", "exp_avg_sq")
    _kernel = staticmethod(kernels.prox_adam)
    _method = staticmethod(compiled.prox_adam)
    _device_method = "prox_adam"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        penalty: ProxOperator | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "decoupled_weight_decay": decoupled_weight_decay},
            weight_decay=weight_decay,
            penalty=penalty,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            check_finite=check_finite,
            projection=projection,
        )

    def check_hyperparameters(self, group: ParamGroup) -> None:
        """Check ``betas``, ``eps`` and ``decoupled_weight_decay``."""
        _check_adam(group)
        check_flags(group, ("decoupled_weight_decay",))

    def update(
        self,
        group: ParamGroup,
        penalty: ProxOperator | None,
        x: Tensors,
        grad: Tensors,
        state: Sequence[Tensors],
        count: int | Tensor,
    ) -> tuple[Tensors, Sequence[Tensors]]:
        """``proxopt.updates.prox_adam``."""
        before = updates.ProxAdamState(state[0], state[1], count)
        decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
        options = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"], "weight_decay": decay}
        new, after = updates.prox_adam(x, grad, before, penalty, **options)
        return new, (after.mean, after.square)


class AdamHAPG(ProximalOptimizer):
    r"""HAPG with Adam's gradient step.

    For the loss F and the penalty :math:`R = \lambda r` (``strength`` is :math:`\lambda`), with the search point A, the prox
    point p, and Adam's bias-corrected moments :math:`\hat m_t` and :math:`\hat v_t` of the gradients :math:`\nabla F(A_{t-1})`,

    .. math::

        \eta_t &= \frac{\text{lr}}{\sqrt{\hat v_t} + \text{eps}} \\
        p_t &= \operatorname{prox}_{\eta_t R}(A_{t-1} - \eta_t \hat m_t) \\
        A_t &= p_t + u_t (p_t - p_{t-1}), \qquad
        u_t = \min\left(\text{cap}, \max\left(0, \tfrac{t - 2}{t + 1}\right)\right)

    While training the parameters hold A, where the gradient is taken. ``eval()`` puts p, which is exactly sparse, into the
    parameters. ``metric=None`` in a penalty means ``"median"`` here, the published rule; with ``"exact"`` the method converges to
    stationary points of F + R.

    Args:
      params: parameters, named parameters, or param groups, which may have a ``"penalty"`` of their own.
      lr: step size, a number >= 0 or a tensor with one entry.
      betas: decay rates of Adam's two moments, each in [0, 1). The extrapolation acts as momentum already: the first above 0.8
        without a cap may diverge, and warns.
      eps: a number >= 0, added to the root of the second moment.
      weight_decay: a number >= 0; ``weight_decay * A`` is added to the gradient.
      extrapolation: the cap of :math:`u_t`, a number in [0, 1]; or ``"nesterov"``, the rule of the paper without a cap; or
        ``"as_printed"``, the same with :math:`u_1 = -1/2`. Without a cap minibatch noise accumulates without bound, at any
        ``lr``. Pass ``"nesterov"`` to reproduce the paper, or where gradients are exact and the problem is ill-conditioned.
      penalty: penalty of the groups that have none of their own.
      maximize: ascend the gradient; the penalty still shrinks.
      foreach: update tensors of equal shape as one stacked tensor, where compiled loops are not used. None: if they are small
        and at least four.
      capturable: keep the step count on the device of the parameter, for CUDA graphs.
      differentiable: let autograd differentiate through the step.
      check_finite: raise for NaN and inf in gradients before anything is updated. None: on a CPU only. Where parameters are
        sharded (DTensor) the ranks agree on the result, by one reduction of a number for each param group.
      projection: an object with a method ``project(x)``, such as ``proxopt.Sphere``, or a function: what is applied to the
        parameters, and to the prox point where it is another one, after each step. See ``add_param_group``.

    Raises:
      TypeError: an option of the wrong type, a penalty that is no ``ProxOperator``, or one on complex parameters.
      ValueError: an argument out of its domain, a parameter in two groups, penalty groups that do not fit a parameter, or a
        penalty that is not supported on a sharded parameter (see ``proxopt_torch.sharding``).

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
    state_names = ("point", "exp_avg", "exp_avg_sq")
    _kernel = staticmethod(kernels.adam_hapg)
    _method = staticmethod(compiled.adam_hapg)
    _device_method = "adam_hapg"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        extrapolation: str | float = updates.EXTRAPOLATION,
        penalty: ProxOperator | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "extrapolation": extrapolation},
            weight_decay=weight_decay,
            penalty=penalty,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            check_finite=check_finite,
            projection=projection,
        )
        if betas[0] > 0.8 and isinstance(extrapolation, str):
            warn(
                f"betas[0] = {betas[0]} with uncapped extrapolation may diverge, because the extrapolation acts as momentum "
                "already: use betas=(0.5, 0.999)"
            )

    def check_hyperparameters(self, group: ParamGroup) -> None:
        """Check ``betas``, ``eps`` and ``extrapolation``."""
        _check_adam(group)
        updates.check_extrapolation(group["extrapolation"])

    def update(
        self,
        group: ParamGroup,
        penalty: ProxOperator | None,
        x: Tensors,
        grad: Tensors,
        state: Sequence[Tensors],
        count: int | Tensor,
    ) -> tuple[Tensors, Sequence[Tensors]]:
        """``proxopt.updates.adam_hapg``."""
        before = updates.AdamHAPGState(state[0], state[1], state[2], count)
        options = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"], "extrapolation": group["extrapolation"]}
        new, after = updates.adam_hapg(x, grad, before, penalty, **options)
        return new, (after.point, after.mean, after.square)


def _check_adam(group: ParamGroup) -> None:
    betas = group["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise TypeError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for i, beta in enumerate(betas):
        in_range(f"betas[{i}]", beta, 0, 1)
        if beta == 1:
            raise ValueError(f"betas[{i}] must lie in [0, 1), got {beta}")
    in_range("eps", group["eps"])
