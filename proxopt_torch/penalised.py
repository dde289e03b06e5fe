"""What the optimizers and ``Proximal`` share: penalties in param groups, a train and an eval mode, checks, checkpoints."""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from proxopt import ProxOperator
from proxopt_torch import checkpoints, compiled, frozen_zeros, half_precision, options, param_groups, projections, sharding
from proxopt_torch.options import EVAL, TRAIN
from proxopt_torch.param_groups import Entry, ParamGroup, State, entries


class Penalised:
    """Mixin for an ``Optimizer`` whose param groups have penalties, with a train and an eval mode."""

    param_groups: list[ParamGroup]
    state: defaultdict[Tensor, Any]

    componentwise: bool = False
    """Whether complex parameters are updated as pairs of real ones; they cannot have a penalty then."""

    metric: str | None = None
    """The metric of a penalty that leaves it open; None where the prox has the same step for all entries."""

    def penalty_of(self, group: ParamGroup) -> ProxOperator | None:
        """The penalty object of one of ``param_groups``, with its present strength; None where it has no penalty."""
        param_groups.normalise(group)
        cache = self.__dict__.setdefault("_penalties", {})
        cached, penalty = cache.get(id(group)), group["penalty"]
        if cached is not None and cached[2] is not penalty and not isinstance(penalty, (dict, type(None))):
            group["strength"] = param_groups.own_strength(penalty)  # an object that was assigned since
        key = param_groups.fingerprint(group)
        if cached is None or cached[0] != key:
            # The key holds ids: what they belong to is kept alive beside it, so that no other object can get the same id
            cached = cache[id(group)] = (key, param_groups.rebuild(group), group["penalty"], group["strength"])
        found: ProxOperator | None = cached[1]
        return found

    @property
    def _steps_of_adam(self) -> bool:
        """Whether a step moves most entries by about the learning rate."""
        return False

    # -- search point and prox point ----------------------------------------------------------

    def eval(self) -> None:
        """Put the prox point, which is exactly sparse, into the parameters: for evaluation, reports, saving and pruning.

        Calling it again changes nothing. Statistics of BatchNorm still belong to the search point: recompute them with
        ``torch.optim.swa_utils.update_bn``.
        """
        self._swap(EVAL)

    def train(self) -> None:
        """Put the search point back into the parameters, bit for bit as before ``eval()``. Calling it again changes nothing."""
        self._swap(TRAIN)

    @contextmanager
    def at_prox_point(self) -> Iterator[None]:
        """A with block in eval mode; afterwards the mode is what it was before.

        >>> import torch
        >>> from proxopt import L1
        >>> from proxopt_torch import HAPG
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
        >>> optimizer = HAPG([w], lr=0.1, penalty=L1(1.0))
        >>> w.sum().backward(); optimizer.step()
        >>> with optimizer.at_prox_point():
        ...     int((w == 0).sum())
        1
        """
        before = [g["mode"] for g in self.param_groups]
        self.eval()
        try:
            yield
        finally:
            if TRAIN in before:
                self.train()

    @torch.no_grad()
    def _swap(self, mode: str) -> None:
        for group in self.param_groups:
            if group["mode"] == mode:
                continue
            for p in group["params"]:
                self._swap_parameter(p, mode)
            group["mode"] = mode

    def _swap_parameter(self, p: Tensor, mode: str) -> None:
        """Exchange the value of a parameter; nothing to do where search point and prox point are the same."""

    # -- zeros that stay zero -----------------------------------------------------------------

    def freeze_zeros(self, frozen: bool = True) -> None:
        """Keep the zeros of all parameters with a penalty from now on, and train the other entries without penalty.

        The zeros are those of the prox point. Use it to finish a training without the bias of the penalty towards zero, before
        or after ``compact``. Strengths have no effect meanwhile. A checkpoint holds the frozen zeros. Parameters without penalty
        are not concerned, nor are param groups that are added later.

        Args:
          frozen: False ends it: the penalties apply again, and zeros may become nonzero. True again takes in new zeros.

        Raises:
          TypeError: ``frozen`` is not a bool.

        >>> import torch
        >>> from proxopt import L1
        >>> from proxopt_torch import ProxSGD
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> optimizer = ProxSGD([w], lr=0.1, penalty=L1(0.5))
        >>> optimizer.freeze_zeros()
        >>> ((w - 2) ** 2).sum().backward()
        >>> optimizer.step()
        >>> w.detach()
        tensor([1.1600, 0.0000])
        """
        if not isinstance(frozen, bool):
            raise TypeError(f"frozen must be True or False, got {frozen!r}")
        (frozen_zeros.begin if frozen else frozen_zeros.end)(self.param_groups, self.state)
        self._forget_plans()

    def _forget_plans(self) -> None:
        """Drop what was prepared for the next steps, which depends on the penalties."""

    def _step_penalty(self, group: ParamGroup) -> ProxOperator | None:
        """The penalty that a step applies: none while zeros are frozen."""
        penalty = self.penalty_of(group)
        return None if group.get(frozen_zeros.FROZEN) else penalty

    # -- checks -------------------------------------------------------------------------------

    def _adopt(self, group: ParamGroup, strength: Any = None) -> None:
        """Turn the penalty of a new group into plain data, and raise where it does not fit its parameters."""
        options.check_flags(group, ("joint", "check_finite"))
        param_groups.normalise(group)
        if group["penalty"] is not None and not isinstance(group["penalty"], dict):
            group["strength"] = param_groups.own_strength(group["penalty"])
        if strength is not None:
            group["strength"] = param_groups.plain_strength(strength)
        penalty = self.penalty_of(group)
        for p in group["params"] if penalty is not None else []:
            if not (p.is_floating_point() or p.is_complex()):
                raise TypeError(f"a parameter with a penalty must be floating point, got {p.dtype}")
            if self.componentwise and p.is_complex():
                raise TypeError(f"{type(self).__name__} has no penalty on complex parameters, got {p.dtype}")
        param_groups.check_fit(penalty, entries(group), group["joint"])
        projections.check(group.get("projection"), entries(group))
        sharding.check(self, group, penalty)
        for doubt in param_groups.doubts(group, strength, penalty):
            warn(doubt)
        if self._steps_of_adam and not self.__dict__.get("_warned_of_lost_steps"):
            lost = half_precision.lost_steps(group, partial(sharding.label, self, group))
            if lost:
                self.__dict__["_warned_of_lost_steps"] = True  # which is true of many groups alike
                warn(lost)

    def _ready(self, group: ParamGroup) -> tuple[ProxOperator | None, list[Entry]]:
        """The penalty of a group and its entries in which every parameter has a gradient; raises where no step is possible."""
        if group["mode"] == EVAL:
            raise RuntimeError("step() needs the search point: call optimizer.train() after optimizer.eval()")
        options.check_lr(group)
        with_gradient = param_groups.with_gradient(group)
        # lists in place of generators, which take three times as long for thousands of parameters
        if True in [p.grad.is_sparse for entry in with_gradient for p in entry if p.grad is not None]:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients: use a dense embedding (sparse=False)")
        projections.check(group.get("projection"), with_gradient)  # it may have been assigned since
        penalty = self._step_penalty(group)
        sharding.check_step(self, group, penalty)
        return penalty, with_gradient

    def _check_finite(self, group: ParamGroup, grads: Sequence[Tensor]) -> None:
        """Raise ValueError, naming the parameter, where a gradient of the group is not finite: on any rank, if it is sharded."""
        wanted = group["check_finite"]
        grads = [g for g in grads if wanted or (wanted is None and g.device.type == "cpu")]
        if not grads or torch.compiler.is_compiling():
            return
        sharded = bool(self.__dict__.get("_meshes"))  # then the ranks must agree on the result
        if (not sharded and compiled.known_finite(grads)) or sharding.all_finite(self, grads):
            return
        # Only now look at each gradient: the norm of all, which was not finite, may overflow where every entry is finite
        found = sharding.first_not_finite(self, [p.grad for p in group["params"]])
        if found is not None:
            place, kind = found
            name, shape = sharding.label(self, group, place), tuple(group["params"][place].shape)
            raise ValueError(f"gradient of {name} (shape {shape}) must be finite, got {kind}; nothing was updated")

    # -- checkpoints --------------------------------------------------------------------------

    def _load(self, load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
        """Call ``load(state_dict)``, torch's own, with our checks and repairs around it.

        They are hooks, registered for this one call, because of their order among the hooks of users: the checks run after
        the pre-hooks, which may convert the checkpoint, and the repairs before the post-hooks, which see the final state.
        """
        loaded: dict[str, Any] = {}
        objects = [(g["penalty"], g.get("projection")) for g in self.param_groups]

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(checkpoints.completed(self, given))
            return loaded

        def finish(_: Optimizer) -> None:
            for group, (penalty, projection) in zip(self.param_groups, objects):
                group["projection"] = projection  # of which, too, a checkpoint holds a description only
                if not (penalty is None or isinstance(penalty, dict)):
                    group["penalty"] = penalty  # the checkpoint holds its name only
            self._finish_loading(loaded)

        optimizer: Any = self
        hooks = (
            optimizer.register_load_state_dict_pre_hook(check),
            optimizer.register_load_state_dict_post_hook(finish, prepend=True),
        )
        try:
            load(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_state(self, group: ParamGroup, saved: State, p: Tensor, where: str) -> None:
        """Raise where the saved state of a parameter is that of another method, or of a parameter of another shape."""

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        """Bring everything else up to date after torch has loaded a checkpoint."""
        self.__dict__.pop("_penalties", None)
        for p in [p for group in self.param_groups for p in group["params"]]:
            mask = (self.state.get(p) or {}).get(frozen_zeros.ZEROS)
            if mask is not None:  # torch has cast it to the dtype of the parameter
                self.state[p][frozen_zeros.ZEROS] = mask.bool()


def warn(message: str) -> None:
    """Warn with the location of the innermost caller that is outside of this package and of torch."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    frame: FrameType = sys._getframe(1)
    level = 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def as_penalised(name: str, optimizer: object, alternative: str = "") -> Penalised:
    """Return ``optimizer`` if it is one of this package; raise TypeError, naming the argument, for any other, or a wrapper."""
    if isinstance(optimizer, Penalised):
        return optimizer
    raise not_penalised(name, optimizer, alternative)


def not_penalised(name: str, optimizer: object, alternative: str = "") -> TypeError:
    """The error for an optimizer that is none of this package; for a wrapper around one it says how to reach that."""
    inside = getattr(optimizer, "optimizer", None)
    hint = f", which wraps a {type(inside).__name__}: pass optimizer.optimizer" if isinstance(inside, Penalised) else ""
    return TypeError(f"{name} must be {alternative}an optimizer of proxopt_torch, got {type(optimizer).__name__}{hint}")
