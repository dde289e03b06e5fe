"""A prox behind any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from proxopt_torch import kernels
from proxopt_torch import param_groups as plain
from proxopt_torch.base import GROUP_DEFAULTS, Penalised, entries, packed, warn

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Proximal(Penalised, Optimizer):
    """The step of any torch optimizer, then w <- prox(w, step) with a scalar step: exact zeros.

    It wraps `base` and shares its param groups, state and hooks, so schedulers, GradScaler and checkpoints see one
    optimizer. Behind `torch.optim.SGD` it converges to the stationary points of f + penalty, with momentum too:

        step = lr (1 - dampening) / (1 - momentum)        behind SGD
        step = lr                                         behind every other base

    Behind a base that rescales the gradient (Adam, RMSprop, Muon, ...) the strength is measured against the rescaled steps, and
    the limit is not a stationary point of f + penalty: `ProxAdam` is exact there. For f(w) = (w - 3)^2 / 2 and the penalty
    strength |w|, from w = 5 and w = 1 (`benchmarks/proximal_bases.py` prints more bases):

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
      base: any torch optimizer whose param groups have an lr. Its groups may carry "penalty", "strength" and "joint".
      penalty: penalty of the groups that name none.
      check_finite: refuse NaN and inf in gradients before anything is updated. None: on CPU yes, elsewhere no. Where
        parameters are sharded (DTensor) the ranks agree on it, by one reduction of a number per param group.

    Raises:
      TypeError: base is no torch optimizer, or a penalty is none.
      ValueError: groups that do not fit a parameter, a base without learning rate, a penalty that is not supported on a
        sharded parameter (`proxopt_torch.sharding` says which are); in `step`, a fused base with parameters that do not fill
        one block of memory, or SGD with a momentum of 1.

    >>> import torch
    >>> from proxopt import L1
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    >>> optimizer = Proximal(torch.optim.RMSprop([w], lr=0.01), penalty=L1(10.0))
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([0.8000, 0.0000])
    """

    def __init__(self, base: Optimizer, penalty: Any = None, *, check_finite: bool | None = None) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch optimizer, got {type(base).__name__}")
        if isinstance(base, Penalised) or isinstance(getattr(base, "optimizer", None), Penalised):
            raise TypeError(f"base must be an optimizer without a prox of its own, got {type(base).__name__}")
        if any("lr" not in group for group in base.param_groups):
            raise ValueError(f"base must have a learning rate, got {type(base).__name__} without lr")
        defaults = {**GROUP_DEFAULTS, "penalty": penalty, "check_finite": check_finite}
        plain.normalise(defaults)
        self.base = base
        adopted = []
        for group in base.param_groups:
            _warn_of_misspelt(group, base.defaults)
            trial = {**defaults, **group}
            self._adopt(trial, group.get("strength"))
            adopted.append(trial)
        for key in GROUP_DEFAULTS:
            base.defaults.setdefault(key, defaults[key])
        base.defaults.setdefault("differentiable", False)  # asked for by the decorator of `step`; Muon has none
        for group, trial in zip(base.param_groups, adopted):
            group.update(trial)
        self.__dict__.pop("_penalties", None)
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict:  # type: ignore[override]
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        if name in _HOOKS:  # shared, so that hooks registered on either run once, after the prox
            return getattr(self.base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"Proximal({self.base!r})"

    def __getstate__(self) -> dict:
        return {"base": self.base}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._patch_step_function()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """Add a param group to the base; raises ValueError where its penalty does not fit, and leaves all as it was."""
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
        """The step of the base, then the prox of every parameter that has a gradient."""
        work = [(group, self.penalty_of(group), prox_step(self.base, group)) for group in self.param_groups]

        def check() -> None:
            for group, (_, live) in zip(self.param_groups, [self._ready(g) for g in self.param_groups]):
                self._check_finite(group, [p.grad for e in live for p in e])  # type: ignore[misc]
                if group.get("fused"):
                    _lay_out_for_fused(self, group, live)

        def checked_closure() -> Any:
            assert closure is not None
            loss = closure()
            check()
            return loss

        base_step = type(self.base).step
        base_step = getattr(base_step, "__wrapped__", base_step)  # the bare step: hooks run once, in ours
        if closure is None:
            check()
            loss = base_step(self.base)
        else:
            loss = base_step(self.base, checked_closure)
        for group, penalty, step in work:
            if penalty is not None:
                for entry in entries(group):
                    if all(p.grad is not None for p in entry):
                        _shrink(group, penalty, entry, step)
        return loss

    def state_dict(self) -> dict:
        """The base's, with penalties as plain data; loads with `weights_only=True`."""
        for group in self.param_groups:
            plain.normalise(group)
        return packed(self.base.state_dict())

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a checkpoint, also from one of the base alone; its penalties then stay as they are here.

        Raises ValueError, with everything left as it was, for other penalties or groups.
        """
        self._load(self.base.load_state_dict, state_dict)


def _warn_of_misspelt(group: dict, known: dict) -> None:
    """Warn of keys that look like ours; whether others are read is the base's affair."""
    own = ("penalty", "strength", "joint", "check_finite")
    unread = plain.unread([k for k in group if get_close_matches(k, own, n=1, cutoff=0.7)], {**known, **GROUP_DEFAULTS})
    if unread:
        warn(unread)


def prox_step(base: Optimizer, group: dict) -> Any:
    """The step of the prox with which the fixed points are the stationary points of f + penalty, where there is one.

    After k equal gradients g the momentum buffer of SGD is (1 + m + ... + m^(k-1)) (1 - dampening) g, so that it moves the
    parameter by lr (1 - dampening) / (1 - m) g in the long run, with and without Nesterov's correction.
    """
    if isinstance(base, SGD) and group["momentum"] != 0:
        if not group["momentum"] < 1:
            raise ValueError(f"momentum must be < 1 for a penalty behind SGD, got {group['momentum']}")
        return group["lr"] * ((1 - group["dampening"]) / (1 - group["momentum"]))
    return group["lr"]


def _shrink(group: dict, penalty: Any, entry: list[Tensor], step: Any) -> None:
    plain_numbers = not (isinstance(step, Tensor) and (step.device.type != "cpu" or torch.compiler.is_compiling()))
    differentiable = group.get("differentiable", False)
    if not group["joint"] and not differentiable and kernels.plain_tensor(entry[0]) and plain_numbers:
        kernels.prox_(penalty, entry[0], float(step))
        return
    new = penalty.prox(entry if group["joint"] else entry[0], step)
    for p, q in zip(entry, new if group["joint"] else [new]):
        p.copy_(q)


def _lay_out_for_fused(optimizer: Proximal, group: dict, live: list[list[Tensor]]) -> None:
    """Give gradients and states the layout of their parameters, which torch's fused CPU kernels take for granted.

    Raises ValueError for a parameter that does not fill one block of memory: they would write next to it.
    """
    for p in (p for entry in live for p in entry):
        if not kernels.plain_tensor(p) or p.device.type != "cpu" or type(p.grad) is not Tensor:
            continue
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
