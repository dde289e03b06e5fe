"""What all proximal optimizers share: param groups with penalties, the two points, checks, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from proxopt._checks import in_range
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
            for entry in entries(group):
                self._swap_entry(entry, mode)
            group["mode"] = mode

    def _swap_entry(self, entry: list[Tensor], mode: str) -> None:
        """Exchange what the parameters hold; nothing where they are the prox point anyway."""

    def _ready(self) -> list[tuple[dict, Any, list[list[Tensor]]]]:
        """Each group with its penalty and the entries that have gradients; raises before anything is changed."""
        work = []
        for number, group in enumerate(self.param_groups):
            if group["mode"] == EVAL:
                raise RuntimeError("step() needs the search point: call optimizer.train() after optimizer.eval()")
            if not isinstance(group["lr"], Tensor):
                in_range("lr", group["lr"])
            penalty = self.penalty_of(group)
            live = [e for e in entries(group) if all(p.grad is not None for p in e)]
            for entry in live:
                for p in entry:
                    self._check_gradient(group, number, p)
            work.append((group, penalty, live))
        return work

    def _check_gradient(self, group: dict, number: int, p: Tensor) -> None:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients: use a dense embedding (sparse=False)")
        on = group["check_finite"] if group["check_finite"] is not None else grad.device.type == "cpu"
        if on and not torch.compiler.is_compiling() and not finite(grad):
            where = next(i for i, q in enumerate(group["params"]) if q is p)
            label = group["param_names"][where] if "param_names" in group else f"param_groups[{number}]['params'][{where}]"
            kind = "NaN" if bool(grad.isnan().any()) else "inf"
            raise ValueError(f"gradient of {label} (shape {tuple(p.shape)}) must be finite, got {kind}; nothing was updated")

    def _check_state_dict(self, state_dict: dict) -> None:
        """Raise where a checkpoint is not one of this optimizer over parameters of these shapes."""
        for key in ("state", "param_groups"):
            if not isinstance(state_dict, dict) or key not in state_dict:
                raise ValueError(f"state_dict must hold the key {key!r}, got {sorted(state_dict) if isinstance(state_dict, dict) else type(state_dict)}")
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, not {len(self.param_groups)}"
            )
        for number, (saved, group) in enumerate(zip(saved_groups, self.param_groups)):
            plain.normalise(group)
            where = f"param_groups[{number}]"
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                    f"{len(saved['params'])}, not {len(group['params'])} parameters in {where}"
                )
            plain.check_same(saved.get("penalty"), group["penalty"], where)
            if bool(saved.get("joint", False)) != group["joint"]:
                raise ValueError(f"state_dict must hold joint={group['joint']} in {where}, got {saved.get('joint')}")
            for place, (index, p) in enumerate(zip(saved["params"], group["params"])):
                for key, value in state_dict["state"].get(index, {}).items():
                    shapes = [tuple(v.shape) for v in value] if isinstance(value, (list, tuple)) else [tuple(getattr(value, "shape", ()))]
                    wanted = [tuple(q.shape) for q in group["params"]] if group["joint"] else [tuple(p.shape)]
                    if key in self.tensors_like_params and shapes != wanted:
                        raise ValueError(f"state_dict must hold {key} of shape {wanted} for {where}['params'][{place}], got {shapes}")

    tensors_like_params: tuple[str, ...] = ()


class ProximalOptimizer(Penalised, Optimizer):
    """Base of the optimizers: subclasses state their tensors, one reference update, and a faster twin."""

    componentwise = False  # complex parameters are treated as pairs of real ones

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
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            plain.normalise(group)
            if given is not None:
                group["strength"] = plain.plain_strength(given)
            penalty = self.penalty_of(group)
            for p in group["params"]:
                if penalty is not None and self.componentwise and p.is_complex():
                    raise TypeError(f"{type(self).__name__} has no penalty on complex parameters, got {p.dtype}")
            plain.check_fit(penalty, entries(group), group["joint"])
        except Exception:
            self.param_groups.pop()
            raise

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
        for group, penalty, live in self._ready():
            self._step_group(group, penalty, live)
        return loss

    def _step_group(self, group: dict, penalty: Any, live: list[list[Tensor]]) -> None:
        for entry in live:
            state = self._state_of(group, entry)
            if not self._fast(group, penalty, entry, state):
                self._reference(group, penalty, entry, state)

    def _reference(self, group: dict, penalty: Any, entry: list[Tensor], state: dict) -> None:
        """The pure function of `proxopt.updates` on the tensors of one entry."""
        names = self._tensors(group)
        one = not group["joint"]
        as_real = self.componentwise and any(p.is_complex() for p in entry)
        view: Callable[[Tensor], Tensor] = torch.view_as_real if as_real else lambda t: t

        def bundle(tensors: Any) -> Any:
            return view(tensors) if one else [view(t) for t in tensors]

        x = bundle(entry[0] if one else entry)
        grad = [self._gradient(group, p) for p in entry]
        values = [bundle(state[n]) for n in names]
        in_place = not (group["differentiable"] or torch.compiler.is_compiling() or as_real)
        count = state["step"]
        if not (group["capturable"] or torch.compiler.is_compiling() or group["differentiable"]):
            count = int(count.item())
        new, results = self._update(group, penalty, x, bundle(grad[0] if one else grad), values, count)
        state["step"] += 1
        for n, old, result in zip(names, values, results):
            if in_place or as_real:
                for o, r in zip([old] if one else old, [result] if one else result):
                    o.copy_(r)
            else:
                state[n] = result
        for p, r in zip([x] if one else x, [new] if one else new):
            p.copy_(r)

    def _gradient(self, group: dict, p: Tensor) -> Tensor:
        """The gradient to descend, with coupled weight decay."""
        grad = p.grad
        assert grad is not None
        if group["maximize"]:
            grad = -grad
        if group["weight_decay"] and not group.get("decoupled_weight_decay"):
            grad = grad.add(p, alpha=group["weight_decay"])
        return grad

    def _tensors(self, group: dict) -> tuple[str, ...]:
        """Names of the state tensors; "point" starts as the parameter, the others at zero."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def _update(self, group: dict, penalty: Any, x: Any, grad: Any, values: list, count: Any) -> tuple[Any, tuple]:
        """The update in `proxopt.updates`: next x, and the next state, whose first fields are `_tensors`."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def _fast(self, group: dict, penalty: Any, entry: list[Tensor], state: dict) -> bool:
        """Do the step in place, equal to the reference; False where only the reference can."""
        return False

    def _state_of(self, group: dict, entry: list[Tensor]) -> dict:
        state = self.state[entry[0]]
        if "step" not in state:
            device = entry[0].device if group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for n in self._tensors(group):
                make = torch.clone if n == "point" else torch.zeros_like
                tensors = [make(_wide(p.detach()), memory_format=torch.preserve_format) for p in entry]
                state[n] = tensors if group["joint"] else tensors[0]
        return state

    # -- the two points -----------------------------------------------------------------------

    def _swap_entry(self, entry: list[Tensor], mode: str) -> None:
        state = self.state.get(entry[0], {})
        if "point" not in state:
            return
        if mode == EVAL:
            state["search_point"] = _like_state(state["point"], [p.detach().clone() for p in entry])
            source = state["point"]
        else:
            source = state.pop("search_point")
        for p, q in zip(entry, source if isinstance(source, list) else [source]):
            p.copy_(q)

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Plain data for `torch.save`; loads with `weights_only=True` and resumes bit for bit, from either mode."""
        for group in self.param_groups:
            plain.normalise(group)
        saved = super().state_dict()
        return {**saved, "param_groups": [plain.packed(g) for g in saved["param_groups"]]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a checkpoint, hyperparameters and strengths included; tensors keep their saved precision.

        Raises ValueError, with the optimizer left as it was, for another number of groups or parameters, other shapes,
        another kind of penalty or other penalty groups.
        """
        self._check_state_dict(state_dict)
        live = [g["penalty"] for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, penalty, saved in zip(self.param_groups, live, state_dict["param_groups"]):
            if isinstance(group["penalty"], dict) and group["penalty"].get("kind") == plain.FOREIGN:
                group["penalty"] = penalty
            for p, index in zip(group["params"], saved["params"]):
                for key, value in state_dict["state"].get(index, {}).items():
                    if key != "step":  # torch has cast the state to the parameter's dtype
                        self.state[p][key] = _to(value, p.device)
        self.__dict__.pop("_penalties", None)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            for p in group["params"]:
                s = self.state.get(p, {})
                if "step" in s and not torch.is_tensor(s["step"]):
                    s["step"] = torch.tensor(float(s["step"]), dtype=torch.float32)


def entries(group: dict) -> list[list[Tensor]]:
    """The problems of a group: all its parameters as one when joint, else each alone."""
    return [group["params"]] if group["joint"] else [[p] for p in group["params"]]


def finite(grad: Tensor) -> bool:
    """Whether all entries are finite; one pass without a temporary unless the sum itself overflows."""
    total = torch.view_as_real(grad).sum() if grad.is_complex() else grad.sum()
    return bool(torch.isfinite(total)) or bool(torch.isfinite(grad).all())


def _wide(p: Tensor) -> Tensor:
    return p.float() if p.dtype in (torch.float16, torch.bfloat16) else p


def _like_state(template: Any, tensors: list[Tensor]) -> Any:
    return tensors if isinstance(template, list) else tensors[0]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    return [_to(v, device) for v in value] if isinstance(value, list) else value
