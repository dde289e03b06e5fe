"""A prox after the step of any torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, RAdam
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from proxopt import ProxOperator
from proxopt_torch import checkpoints, compiled, frozen_zeros, kernels, param_groups, projections
from proxopt_torch.frozen_zeros import FROZEN
from proxopt_torch.options import GROUP_DEFAULTS
from proxopt_torch.param_groups import Entry, ParamGroup
from proxopt_torch.penalised import Penalised, warn
from proxopt_torch.projections import Projection

Step: TypeAlias = float | Tensor

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Proximal(Penalised, Optimizer):
    r"""The step of any torch optimizer, then the prox with one step size for all entries.

    .. math::

        w_t = \operatorname{prox}_{s R}(\operatorname{base}(w_{t-1})), \qquad
        s = \begin{cases}
            \text{lr}\, \dfrac{1 - \text{dampening}}{1 - \text{momentum}} & \text{for a base of the class } \texttt{SGD} \\
            \text{lr} & \text{for every other base}
        \end{cases}

    for the penalty :math:`R = \lambda r` (``strength`` is :math:`\lambda`). The optimizer wraps ``base`` and shares its param
    groups, state and hooks, so that schedulers, ``GradScaler`` and checkpoints treat the two as one. With ``torch.optim.SGD`` as
    base it converges to stationary points of F + R for the loss F, with momentum too.

    A base that rescales the gradient (Adam, RMSprop, Muon, ...) applies the strength to the rescaled steps, and the limit is
    not a stationary point of F + R. Use ``ProxAdam`` for one. With :math:`F(w) = (w - 3)^2 / 2` and :math:`R(w) = \lambda |w|`,
    the limits from w = 5 and w = 1 are (``benchmarks/proximal_bases.py`` has more bases):

    =====================  ============  ============  ============  ============
    base                   strength 0.1  strength 0.5  strength 1    strength 2
    =====================  ============  ============  ============  ============
    solution               2.90          2.50          2.00          1.00
    ProxAdam               2.90          2.50          2.00          1.00
    SGD, any momentum      2.90          2.50          2.00          1.00
    Adam, AdamW            3.00          2.94 to 2.97  1.00 to 2.22  0.00
    RMSprop                3.00          3.00          1.89 to 2.57  0.00
    Adagrad, Adadelta      0.00          0.00          0.00          0.00
    Muon                   3.00          3.00          0.00          0.00
    =====================  ============  ============  ============  ============

    Args:
      base: a torch optimizer whose param groups have an ``"lr"``. They may have ``"penalty"``, ``"strength"``,
        ``"joint"`` and ``"projection"``.
      penalty: penalty of the groups that have none of their own.
      check_finite: raise for NaN and inf in gradients before anything is updated. None: on a CPU only. Where parameters are
        sharded (DTensor) the ranks agree on the result, by one reduction of a number for each param group.
      projection: an object with a method ``project(x)``, such as ``proxopt.Sphere``, or a function: what is applied to the
        parameters after each prox. See ``ProximalOptimizer.add_param_group``.

    Raises:
      TypeError: ``base`` is no torch optimizer, or has a prox of its own; a penalty that is no ``ProxOperator``; a flag of the
        wrong type.
      ValueError: penalty groups that do not fit a parameter, a base without learning rate, or a penalty that is not supported on
        a sharded parameter (see ``proxopt_torch.sharding``). From ``step``: a fused base with parameters that do not fill one
        block of memory, or SGD with a momentum of 1.

    >>> import torch
    >>> from proxopt import L1
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    >>> optimizer = Proximal(torch.optim.RMSprop([w], lr=0.01), penalty=L1(10.0))
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([0.8000, 0.0000])
    """

    def __init__(
        self,
        base: Optimizer,
        penalty: ProxOperator | None = None,
        *,
        check_finite: bool | None = None,
        projection: Projection | None = None,
    ) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch optimizer, got {type(base).__name__}")
        if isinstance(base, Penalised) or isinstance(getattr(base, "optimizer", None), Penalised):
            raise TypeError(f"base must be an optimizer without a prox of its own, got {type(base).__name__}")
        if any("lr" not in group for group in base.param_groups):
            raise ValueError(f"base must have a learning rate, got {type(base).__name__} without lr")
        defaults = {**GROUP_DEFAULTS, "penalty": penalty, "check_finite": check_finite, "projection": projection}
        param_groups.normalise(defaults)
        self.base = base
        # First all checks on copies of the groups, then the changes: an error leaves the base as it was
        adopted = []
        for group in base.param_groups:
            _warn_of_misspelt(group, base.defaults)
            trial = {**defaults, **group}
            self._adopt(trial, group.get("strength"))
            adopted.append(trial)
        for key in GROUP_DEFAULTS:
            base.defaults.setdefault(key, defaults[key])
        base.defaults.setdefault("differentiable", False)  # the decorator of `step` reads it, and Muon has none
        for group, trial in zip(base.param_groups, adopted):
            group.update(trial)
        self.__dict__.pop("_penalties", None)  # cached by the identity of the copies
        # Optimizer.__init__ is not called, because groups and state are the base's. Of what it sets up this alone is needed
        self._patch_step_function()

    @property
    def _steps_of_adam(self) -> bool:
        return isinstance(self.base, (Adam, AdamW, NAdam, RAdam, Adamax))

    @property
    def param_groups(self) -> list[ParamGroup]:  # type: ignore[override]
        """The param groups of the base."""
        return self.base.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state of the base."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the base."""
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        if name in _HOOKS:  # shared: a hook that is registered on either of the two runs once, after the prox
            return getattr(self.base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"Proximal({self.base!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._patch_step_function()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as in ``torch.optim``."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base; it may have ``"penalty"``, ``"strength"``, ``"joint"`` and ``"projection"``.

        Raises TypeError or ValueError, and leaves both optimizers as they were, where the penalty does not fit a parameter.
        """
        given = param_group.get("strength") if isinstance(param_group, dict) else None
        if isinstance(param_group, dict):
            _warn_of_misspelt(param_group, self.defaults)
        self.base.add_param_group(param_group)
        try:
            self._adopt(self.param_groups[-1], given)
        except Exception:
            self.param_groups.pop()
            raise

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the base, then the prox of every parameter that has a gradient.

        Args:
          closure: computes the loss and its gradients, as in ``torch.optim``.

        Returns:
          What the step of the base returned: the loss, or None.

        Raises:
          ValueError: a gradient that is not finite (see ``check_finite``), a learning rate or strength that is negative, SGD with
            a momentum of 1, or a fused base with parameters that do not fill one block of memory.
          RuntimeError: the optimizer is in eval mode, or a gradient is sparse.

        An error of a ``"projection"`` leaves all parameters and states as they were, as in the other optimizers; for one that is
        no ``proxopt.Sphere`` all parameters and states are copied before each step.
        """
        # Penalties and steps before the base moves: they belong to the learning rate of this step, and they may raise
        work = [(group, self._step_penalty(group), prox_step(self.base, group)) for group in self.param_groups]

        def checked_closure() -> Any:
            assert closure is not None
            loss = closure()
            self._check_gradients()
            return loss

        frozen = [frozen_zeros.recorded(g, param_groups.entries(g), self.state) for g in self.param_groups if g.get(FROZEN)]
        base_step: Callable[..., Any] = type(self.base).step
        # torch has wrapped the step so that hooks run around it; the bare one is called, because they run around ours
        base_step = getattr(base_step, "__wrapped__", base_step)
        # a projection of the user may raise after the step of the base, which is one for all groups
        uncertain = any(projections.may_raise(group) for group in self.param_groups)
        with projections.restoring(self.base.state, [p for g in self.param_groups if uncertain for p in g["params"]]):
            if closure is None:
                self._check_gradients()
                loss = base_step(self.base)
            else:
                loss = base_step(self.base, checked_closure)
            for group, penalty, step in work:
                if penalty is not None:
                    self._prox(group, penalty, step)
                if group.get("projection") is not None:
                    for entry in param_groups.with_gradient(group):
                        projections.apply(group, entry)
        frozen_zeros.apply([pair for pairs in frozen for pair in pairs], self.state)
        return loss

    def _prox(self, group: ParamGroup, penalty: ProxOperator, step: Step) -> None:
        """Replace all parameters of a group that have a gradient by their prox."""
        present = param_groups.with_gradient(group)
        batches: list[compiled.Batch] = []
        if _readable(step):
            batches, present = compiled.split(self, group, penalty, present)
        for batch in batches:
            batch.prox(type(self).__name__, float(step))
        for entry in present:
            _prox_entry(group, penalty, entry, step)

    def _check_gradients(self) -> None:
        """Raise where a gradient does not allow a step, and prepare the groups of a fused base."""
        ready = [self._ready(group)[1] for group in self.param_groups]
        for group, present in zip(self.param_groups, ready):
            self._check_finite(group, [p.grad for entry in present for p in entry if p.grad is not None])
            if group.get("fused"):
                self._lay_out(group, [p for entry in present for p in entry])

    def _lay_out(self, group: ParamGroup, params: list[Tensor]) -> None:
        """Give gradients and states the memory layout of their parameters, as torch's fused kernels require.

        Nothing is to be done where the strides and the states are those of the last step.
        """
        if torch.compiler.is_compiling():  # traced tensors have no memory yet
            return
        state = self.state
        values = [v for p in params for v in (state.get(p) or {}).values()]
        strides = [p.stride() for p in params]
        known = self.__dict__.setdefault("_laid_out", {}).get(id(group))
        same = known is not None and known[0] == strides and known[1] == list(map(id, values))
        if same and [p.grad.stride() for p in params if p.grad is not None] == strides:
            return
        for p in params:
            _lay_out_for_fused(self, p)
        values = [v for p in params for v in (state.get(p) or {}).values()]
        # with the values, so that no other object gets the id of one of them
        self.__dict__["_laid_out"][id(group)] = (strides, list(map(id, values)), values)

    def state_dict(self) -> dict[str, Any]:
        """The state_dict of the base, with penalties as plain data; it loads with ``weights_only=True``."""
        for group in self.param_groups:
            param_groups.normalise(group)
        return checkpoints.packed(self.base.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint. From one of the base alone the penalties keep their present values.

        Raises:
          ValueError: another number of groups or parameters, another kind of penalty or other penalty groups; the optimizer is
            left as it was.
        """
        self._load(self.base.load_state_dict, state_dict)


def _warn_of_misspelt(group: ParamGroup, known: Iterable[str]) -> None:
    """Warn of keys that resemble those of this package. Others may be for the base, which is free to use any."""
    own = ("penalty", "strength", "joint", "check_finite", "projection")
    resembling = [k for k in group if get_close_matches(k, own, n=1, cutoff=0.7)]
    unread = param_groups.unread(resembling, {*known, *GROUP_DEFAULTS})
    if unread:
        warn(unread)


def prox_step(base: Optimizer, group: ParamGroup) -> Step:
    r"""The step of the prox for which fixed points are stationary points of loss plus penalty, if the base has one.

    After k equal gradients g the momentum buffer of SGD is :math:`(1 + m + \dots + m^{k-1}) (1 - d) g` with momentum m and
    dampening d. In the long run it moves the parameter by :math:`\text{lr}\, (1 - d) / (1 - m)\, g`, with and without Nesterov's
    correction.
    """
    lr: Step = group["lr"]
    if isinstance(base, SGD) and group["momentum"] != 0:
        if not group["momentum"] < 1:
            raise ValueError(f"momentum must be < 1 for a penalty behind SGD, got {group['momentum']}")
        lr = lr * ((1 - group["dampening"]) / (1 - group["momentum"]))
    return lr


def _prox_entry(group: ParamGroup, penalty: ProxOperator, entry: Entry, step: Step) -> None:
    """Replace the parameters of one entry by their prox."""
    differentiable = group.get("differentiable", False)
    if not group["joint"] and not differentiable and kernels.plain_tensor(entry[0]) and _readable(step):
        kernels.prox_(penalty, entry[0], float(step))
        return
    new = penalty.prox(entry if group["joint"] else entry[0], step)
    for p, q in zip(entry, new if group["joint"] else [new]):
        p.copy_(q)


def _readable(step: Step) -> bool:
    """Whether a step may be read: one on a device would make the host wait, and one that is traced has no value."""
    return not (isinstance(step, Tensor) and (step.device.type != "cpu" or torch.compiler.is_compiling()))


def _lay_out_for_fused(optimizer: Proximal, p: Tensor) -> None:
    """Give the gradient and the states of a parameter its memory layout.

    torch's fused CPU kernels read all tensors as contiguous memory and ignore their strides.

    Raises ValueError for a parameter that does not fill one block of memory: they would overwrite memory next to it.
    """
    if not kernels.plain_tensor(p) or p.device.type != "cpu" or p.grad is None or type(p.grad) is not Tensor:
        return
    if not kernels.is_dense(p):
        raise ValueError(
            f"a base with fused=True must have parameters that fill one block of memory, got shape {tuple(p.shape)} and "
            f"strides {p.stride()}: torch's fused kernels would write next to it. Pass fused=False to the base"
        )
    p.grad = kernels.in_layout_of(p, p.grad)
    state = optimizer.state.get(p, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == p.shape and name != "step":
            state[name] = kernels.in_layout_of(p, value)
