"""What all proximal optimizers share: param groups with penalties, the two points, checks, checkpoints."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from proxopt._checks import in_range
from proxopt_torch import kernels, sharding, stacks
from proxopt_torch import param_groups as plain

TRAIN, EVAL = "train", "eval"
GROUP_DEFAULTS = {"penalty": None, "strength": None, "joint": False, "mode": TRAIN, "check_finite": None}


class Penalised:
    """Mixed into an `Optimizer`: its param groups carry penalties, and it has a train and an eval mode."""

    param_groups: list[dict]
    state: Any

    def penalty_of(self, group: dict) -> Any:
        """The penalty object of one of `param_groups`, at its present strength; None without penalty."""
        plain.normalise(group)
        cache = self.__dict__.setdefault("_penalties", {})
        key = plain.fingerprint(group)
        known = cache.get(id(group))
        if known is None or known[0] != key:
            # the group's dict is kept beside the key: its ids stay taken
            known = cache[id(group)] = (key, plain.rebuild(group), group["penalty"], group["strength"])
        return known[1]

    def eval(self) -> None:
        """Let the parameters hold the prox point: exactly sparse. To evaluate, report, save, prune. Idempotent."""
        self._swap(EVAL)

    def train(self) -> None:
        """Let the parameters hold the search point again, bit for bit as before `eval()`. Idempotent."""
        self._swap(TRAIN)

    @contextmanager
    def at_prox_point(self) -> Iterator[None]:
        """`eval()` inside a with block, then back to the mode before.

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
        """Exchange what the parameter holds; nothing where it is the prox point anyway."""

    def _ready(self, group: dict) -> tuple[Any, list[list[Tensor]]]:
        """The penalty of a group and its entries that have gradients; raises before anything is changed."""
        if group["mode"] == EVAL:
            raise RuntimeError("step() needs the search point: call optimizer.train() after optimizer.eval()")
        if not isinstance(group["lr"], Tensor):
            in_range("lr", group["lr"])
        live = [e for e in entries(group) if all(p.grad is not None for p in e)]
        if any(p.grad is not None and p.grad.is_sparse for e in live for p in e):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients: use a dense embedding (sparse=False)")
        penalty = self.penalty_of(group)
        sharding.check_step(self, group, penalty)
        return penalty, live

    def _check_finite(self, group: dict, grads: list[Tensor]) -> None:
        """Raise ValueError, naming the parameter, where a gradient of the group is not finite: on any rank, if it is sharded."""
        on = group["check_finite"]
        grads = [g for g in grads if on or (on is None and g.device.type == "cpu")]
        if not grads or torch.compiler.is_compiling() or sharding.all_finite(self, grads):
            return
        found = sharding.first_not_finite(self, [p.grad for p in group["params"]])
        if found is not None:  # the norm may overflow where no entry does
            place, kind = found
            name, shape = sharding.label(self, group, place), tuple(group["params"][place].shape)
            raise ValueError(f"gradient of {name} (shape {shape}) must be finite, got {kind}; nothing was updated")

    def _load(self, load: Callable[[dict], None], state_dict: dict) -> None:
        """`load(state_dict)`, which is torch's, with the checks behind the user's pre-hooks and repairs before the post-hooks."""
        loaded: dict = {}
        objects = [g["penalty"] for g in self.param_groups]

        def check(_: Any, given: dict) -> dict:
            loaded.update(self._completed(given))
            return loaded

        def finish(_: Any) -> None:
            for group, penalty in zip(self.param_groups, objects):
                if not (penalty is None or isinstance(penalty, dict)):
                    group["penalty"] = penalty  # a checkpoint has only its name
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

    def _completed(self, state_dict: dict) -> dict:
        """A checkpoint with what it leaves open filled in; raises where it is not one for this optimizer and its parameters."""
        found = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
        for key in ("state", "param_groups"):
            if key not in found:
                raise ValueError(f"state_dict must hold the key {key!r}, got {found}")
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, not {len(self.param_groups)}"
            )
        # copies: torch would step on in the checkpoint's own memory
        state = {index: {k: _copied(v) for k, v in held.items()} for index, held in state_dict["state"].items()}
        groups = []
        for number, (saved, group) in enumerate(zip(saved_groups, self.param_groups)):
            plain.normalise(group)
            where = f"param_groups[{number}]"
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                    f"{len(saved['params'])}, not {len(group['params'])} parameters in {where}"
                )
            saved = {**{k: v for k, v in group.items() if k != "params"}, "mode": TRAIN, **saved}
            plain.check_same(saved["penalty"], group["penalty"], where)
            if bool(saved["joint"]) != group["joint"]:
                raise ValueError(f"state_dict must hold joint={group['joint']} in {where}, got {saved['joint']}")
            if group["joint"]:
                _split_joint(state, saved["params"])
            for place, (index, p) in enumerate(zip(saved["params"], group["params"])):
                self._check_state({**group, **saved}, state.get(index, {}), p, f"{where}['params'][{place}]")
            groups.append(saved)
        return {**state_dict, "state": state, "param_groups": groups}

    def _check_state(self, group: dict, held: dict, p: Tensor, where: str) -> None:
        """Raise where the saved state of a parameter is that of another method or of another shape."""
        self._check_names(group, held)
        for key in self.tensors_like_params:
            if key in held and getattr(held[key], "shape", None) != p.shape:
                found = tuple(held[key].shape) if isinstance(held[key], Tensor) else repr(held[key])
                raise ValueError(f"state_dict must hold {key} of shape {tuple(p.shape)} for {where}, got {found}")

    def _check_names(self, group: dict, held: dict) -> None:
        """Raise where the saved state of a parameter is that of another method."""

    def _finish_loading(self, state_dict: dict) -> None:
        """What is left to do after torch's own loading."""
        self.__dict__.pop("_penalties", None)

    def _adopt(self, group: dict, strength: Any = None) -> None:
        """Turn the penalty of a new group into plain data, and raise where it does not fit."""
        plain.normalise(group)
        if strength is not None:
            group["strength"] = plain.plain_strength(strength)
        penalty = self.penalty_of(group)
        for p in group["params"]:
            if penalty is not None and not (p.is_floating_point() or p.is_complex()):
                raise TypeError(f"a parameter with a penalty must be floating point, got {p.dtype}")
            if penalty is not None and self.componentwise and p.is_complex():
                raise TypeError(f"{type(self).__name__} has no penalty on complex parameters, got {p.dtype}")
        plain.check_fit(penalty, entries(group), group["joint"])
        sharding.check(self, group, penalty)
        for doubt in plain.doubts(group, strength, penalty):
            warn(doubt)

    tensors_like_params: tuple[str, ...] = ()  # state tensors that must have their parameter's shape
    componentwise = False  # complex parameters are treated as pairs of real ones
    metric: str | None = None  # of a penalty that leaves it open; None where the prox has one step for all entries


class ProximalOptimizer(Penalised, Optimizer):
    """Base of the optimizers. A subclass states its state tensors and its update, and may have a fused implementation of it."""

    def __init__(self, params: Any, defaults: dict) -> None:
        defaults = {**GROUP_DEFAULTS, **defaults}
        plain.normalise(defaults)
        lr = defaults["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
            if defaults["foreach"] and not defaults["capturable"]:
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        else:
            in_range("lr", lr)
        in_range("weight_decay", defaults["weight_decay"])
        super().__init__(params, defaults)

    # -- param groups -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """Add a param group: any of {"params", "lr", "penalty", "strength", "joint", ...}.

        With "joint": True the penalty sees all tensors of the group as one problem, so that its groups may span them. Raises
        ValueError where the penalty's groups do not fit a parameter, and leaves the optimizer as it was.
        """
        given = param_group.get("strength") if isinstance(param_group, dict) else None
        unread = plain.unread(param_group, self.defaults) if isinstance(param_group, dict) else None
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._adopt(group, given)
        except Exception:
            self.param_groups.pop()
            raise
        if unread:
            warn(unread)

    # -- stepping -----------------------------------------------------------------------------

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. A parameter (or joint entry) without gradient is not touched.

        Raises ValueError for a gradient that is not finite (named parameter; see `check_finite`) and RuntimeError in eval
        mode; in both cases nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group, (penalty, live) in zip(self.param_groups, [self._ready(g) for g in self.param_groups]):
            stacked, alone = stacks.split(self, group, penalty, live)
            grads = [stacks.gather(s) for s in stacked]
            self._check_finite(group, grads + [p.grad for e in alone for p in e])  # type: ignore[misc]
            work.append((group, penalty, list(zip(stacked, grads)), alone))
        for group, penalty, stacked_grads, alone in work:
            for stack, grad in stacked_grads:
                stacks.step(self, group, penalty, stack, grad)
            for entry in alone:
                states = self._states(group, entry)
                if self._kernel is not None and kernels.fits(group, entry):
                    kernels.run(self._kernel, group, penalty, entry[0], self._gradient(group, entry[0]), states[0])
                else:
                    self._reference(group, penalty, entry, states)
        return loss

    def _reference(self, group: dict, penalty: Any, entry: list[Tensor], states: list[dict]) -> None:
        """The pure function of `proxopt.updates` on the tensors of one entry."""
        names = self._tensors(group)
        one = not group["joint"]
        as_real = self.componentwise and any(p.is_complex() for p in entry)
        view: Callable[[Tensor], Tensor] = torch.view_as_real if as_real else lambda t: t

        def bundle(tensors: list[Tensor]) -> Any:
            return view(tensors[0]) if one else [view(t) for t in tensors]

        # autograd keeps what it saw of the parameters, which are written at the end
        x = bundle([p.clone() for p in entry] if group["differentiable"] else entry)
        grad = bundle([self._gradient(group, p) for p in entry])
        values = [bundle([s[n] for s in states]) for n in names]
        count = states[0]["step"]
        if not (group["capturable"] or torch.compiler.is_compiling() or group["differentiable"]):
            count = int(count.item())
        new, results = self._update(group, penalty, x, grad, values, count)
        in_place = as_real or not (group["differentiable"] or torch.compiler.is_compiling())
        for state in states:
            state["step"] += 1
        for n, result in zip(names, results):
            for state, r in zip(states, [result] if one else result):
                if in_place:
                    view(state[n]).copy_(r)
                else:
                    state[n] = r
        for p, r in zip(entry, [new] if one else new):
            view(p).copy_(r)

    def _gradient(self, group: dict, p: Tensor) -> Tensor:
        assert p.grad is not None
        return self.descent(group, p, p.grad)

    def descent(self, group: dict, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient to descend at x: its sign for `maximize`, and coupled weight decay."""
        if group["maximize"]:
            grad = -grad
        if group["weight_decay"] and not group.get("decoupled_weight_decay"):
            grad = grad.add(x, alpha=group["weight_decay"])
        return grad

    def _tensors(self, group: dict) -> tuple[str, ...]:
        """Names of the state tensors; "point" starts as the parameter, the others at zero."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def _update(self, group: dict, penalty: Any, x: Any, grad: Any, values: list, count: Any) -> tuple[Any, tuple]:
        """The update in `proxopt.updates`: next x, and the next state, whose first fields are `_tensors`."""
        raise TypeError(f"{type(self).__name__} is abstract")

    _kernel: Callable[..., None] | None = None  # a fused implementation of the same step, in place

    def _states(self, group: dict, entry: list[Tensor]) -> list[dict]:
        """The state of each parameter of an entry, made where there is none."""
        for p in entry:
            state = self.state[p]
            if "step" not in state:
                start = _wide(p if group["differentiable"] else p.detach())
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
                for n in self._tensors(group):
                    make = torch.clone if n == "point" else torch.zeros_like
                    state[n] = make(start, memory_format=torch.preserve_format)
        return [self.state[p] for p in entry]

    # -- the two points -----------------------------------------------------------------------

    def _swap_parameter(self, p: Tensor, mode: str) -> None:
        state = self.state.get(p, {})
        if "point" not in state:
            return
        if mode == EVAL:
            state["search_point"] = p.detach().clone()
            p.copy_(state["point"])
        else:
            p.copy_(state.pop("search_point"))

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Plain data for `torch.save`; loads with `weights_only=True` and resumes bit for bit, from either mode."""
        for group in self.param_groups:
            plain.normalise(group)
        return packed(super().state_dict())

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a checkpoint, hyperparameters and strengths included; tensors keep their saved precision.

        It may come from an optimizer with the same state: `ProxAdam` continues a run of `torch.optim.Adam` or AdamW. What a
        param group of the checkpoint does not mention, such as the penalty then, stays as it is here. Hooks registered by
        `register_load_state_dict_pre_hook` run before any check.

        Raises ValueError, with the optimizer left as it was, for another number of groups or parameters, other shapes,
        another kind of penalty or other penalty groups.
        """
        self._load(super().load_state_dict, state_dict)

    def _finish_loading(self, state_dict: dict) -> None:
        super()._finish_loading(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, index in zip(group["params"], saved["params"]):
                dense = p.detach() if kernels.plain_tensor(p) and kernels.is_dense(p) else None
                for key, value in state_dict["state"].get(index, {}).items():
                    if key == "step":  # on a device, where the checkpoint may be, every step would wait for it
                        self.state[p][key] = self.state[p][key].to(p.device if group["capturable"] else "cpu")
                    elif isinstance(value, Tensor):  # torch has cast the state to the parameter's dtype
                        state = value.to(p.device)
                        self.state[p][key] = state if dense is None else kernels.in_layout_of(dense, state)
        self.__dict__.pop("_stacks", None)

    def _check_names(self, group: dict, held: dict) -> None:
        tensors = set(held) - {"step", "search_point"}
        if held and tensors != set(self._tensors(group)):
            own = f"{self._tensors(group)} of {type(self).__name__}"
            raise ValueError(f"state_dict must hold the state {own}, got {sorted(tensors)}")

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            for p in group["params"]:
                s = self.state.get(p, {})
                if "step" in s and not torch.is_tensor(s["step"]):
                    s["step"] = torch.tensor(float(s["step"]), dtype=torch.float32)


def warn(message: str) -> None:
    """Warn at the line, outside of this package and of torch, that led here."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    frame: Any = sys._getframe(1)
    level = 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_optimizer(name: str, optimizer: Any, alternative: str = "") -> None:
    """Raise TypeError, naming the argument, unless it is one of these optimizers itself and no wrapper around it."""
    if isinstance(optimizer, Penalised):
        return
    inside = getattr(optimizer, "optimizer", None)
    hint = f", which wraps a {type(inside).__name__}: pass optimizer.optimizer" if isinstance(inside, Penalised) else ""
    raise TypeError(f"{name} must be {alternative}an optimizer of proxopt_torch, got {type(optimizer).__name__}{hint}")


def packed(state_dict: dict) -> dict:
    """A state_dict in which foreign penalties are names."""
    return {**state_dict, "param_groups": [plain.packed(g) for g in state_dict["param_groups"]]}


def entries(group: dict) -> list[list[Tensor]]:
    """The problems of a group: all its parameters as one when joint, else each alone."""
    return [group["params"]] if group["joint"] else [[p] for p in group["params"]]


def _wide(p: Tensor) -> Tensor:
    return p.float() if p.dtype in (torch.float16, torch.bfloat16) else p


def _split_joint(state: dict, indices: list) -> None:
    """Give each parameter of a joint entry its own state: version 0.1.0 kept lists of tensors at the first one."""
    first = state.get(indices[0], {})
    if any(isinstance(value, list) for value in first.values()):
        for place, index in enumerate(indices):
            state[index] = {k: v[place] if isinstance(v, list) else _copied(v) for k, v in first.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return value.detach().clone() if isinstance(value, Tensor) else value
