"""A prox behind any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from proxopt_torch import kernels
from proxopt_torch import param_groups as plain
from proxopt_torch.base import GROUP_DEFAULTS, Penalised, entries, packed

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Proximal(Penalised, Optimizer):
    """The step of any torch optimizer, then w <- prox(w, lr) with the group's learning rate: exact zeros.

    It wraps `base` and shares its param groups, state and hooks, so schedulers, GradScaler and checkpoints see one
    optimizer. The prox has the scalar step lr. Behind SGD that is proximal SGD; behind one with a step for each entry (Adam,
    Muon, Lion) the rest points are not those of f + penalty where these steps differ: for Adam, `ProxAdam` is exact.

    Args:
      base: any torch optimizer whose param groups have an lr. Its groups may carry "penalty", "strength" and "joint".
      penalty: penalty of the groups that name none.
      check_finite: refuse NaN and inf in gradients before anything is updated. None: on CPU yes, elsewhere no. Where
        parameters are sharded (DTensor) the ranks agree on it, by one reduction of a number per param group.

    Raises:
      TypeError: base is no torch optimizer, or a penalty is none.
      ValueError: groups that do not fit a parameter, a base without learning rate, a penalty that is not supported on a
        sharded parameter (`proxopt_torch.sharding` says which are).

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
        if isinstance(base, Penalised):
            raise TypeError(f"base must be an optimizer without a prox of its own, got {type(base).__name__}")
        if any("lr" not in group for group in base.param_groups):
            raise ValueError(f"base must have a learning rate, got {type(base).__name__} without lr")
        defaults = {**GROUP_DEFAULTS, "penalty": penalty, "check_finite": check_finite}
        plain.normalise(defaults)
        self.base = base
        adopted = []
        for group in base.param_groups:
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
        self.base.add_param_group(param_group)
        try:
            self._adopt(self.param_groups[-1], given)
        except Exception:
            self.param_groups.pop()
            raise

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The step of the base, then the prox of every parameter that has a gradient."""
        work = [(group, self.penalty_of(group)) for group in self.param_groups]

        def check() -> None:
            for group, (_, live) in zip(self.param_groups, [self._ready(g) for g in self.param_groups]):
                self._check_finite(group, [p.grad for e in live for p in e])  # type: ignore[misc]

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
        for group, penalty in work:
            if penalty is not None:
                for entry in entries(group):
                    if all(p.grad is not None for p in entry):
                        _shrink(group, penalty, entry)
        return loss

    def state_dict(self) -> dict:
        """The base's, with penalties as plain data; loads with `weights_only=True`."""
        for group in self.param_groups:
            plain.normalise(group)
        return packed(self.base.state_dict())

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a checkpoint; raises ValueError for other penalties or groups, and leaves all as it was."""
        self._check_state_dict(state_dict)
        live = [g["penalty"] for g in self.param_groups]
        self.base.load_state_dict(state_dict)
        self._keep_foreign(live)


def _shrink(group: dict, penalty: Any, entry: list[Tensor]) -> None:
    lr = group["lr"]
    plain_numbers = not (isinstance(lr, Tensor) and (lr.device.type != "cpu" or torch.compiler.is_compiling()))
    differentiable = group.get("differentiable", False)
    if not group["joint"] and not differentiable and kernels.plain_tensor(entry[0]) and plain_numbers:
        kernels.prox_(penalty, entry[0], float(lr))
        return
    new = penalty.prox(entry if group["joint"] else entry[0], lr)
    for p, q in zip(entry, new if group["joint"] else [new]):
        p.copy_(q)
