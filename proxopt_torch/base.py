"""The base class of the optimizers: param groups, the step with its fused, stacked and reference paths, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from proxopt import ProxOperator
from proxopt.penalties import declared
from proxopt_torch import checkpoints, compiled, frozen_zeros, kernels, options, param_groups, projections, sharding, stacks
from proxopt_torch.device import triton_steps
from proxopt_torch.frozen_zeros import ZEROS
from proxopt_torch.options import EVAL, GROUP_DEFAULTS
from proxopt_torch.param_groups import Entry, ParamGroup, Params, State
from proxopt_torch.penalised import Penalised, warn
from proxopt_torch.projections import Projection

Tensors: TypeAlias = Tensor | list[Tensor]  # of one problem: a tensor, or in a joint group one for each parameter


class _Work(NamedTuple):
    """What a step does in one param group: entries for Triton, batches for compiled loops, stacks, and entries updated alone."""

    group: ParamGroup
    penalty: ProxOperator | None
    present: list[Entry]  # all of them
    triton: list[Entry]
    batches: list[compiled.Batch]
    stacks: list[tuple[stacks.Stack, Tensor]]
    alone: list[Entry]
    masks: list[tuple[Tensor, Tensor]]  # of the frozen zeros


class ProximalOptimizer(Penalised, Optimizer):
    r"""Base class of the proximal optimizers. Subclass it to add your own.

    A subclass passes its hyperparameters, by name, and the shared options to this constructor, and defines

    - ``update``, one step as a pure function of tensors;
    - ``state_names``, the names of its state tensors, if it has any.

    Param groups with penalties, checks, weight decay, ``maximize``, closures, checkpoints and reports are then as in the other
    optimizers. Optionally it also defines

    - ``check_hyperparameters(group)``, which raises where a hyperparameter of a param group is out of its domain;
    - ``componentwise = True``, if complex parameters are to be updated as pairs of real ones;
    - ``metric``, ``"exact"``, ``"median"`` or ``"support"``, if its prox takes one step for each entry: the metric of penalties
      that leave it open (see ``GroupL2``).

    A state tensor with the name ``"point"`` starts as a copy of the parameter and holds the prox point: ``eval()`` swaps it into
    the parameters. All others start at zero, in float32 for parameters of half precision.

    Args:
      params: parameters, named parameters, or param groups, as in ``torch.optim``. A group may have any hyperparameter or option
        of its own, and the keys ``"penalty"``, ``"strength"``, ``"joint"`` and ``"projection"``: see ``add_param_group``.
      defaults: the hyperparameters of the subclass by name, ``"lr"`` among them.
      weight_decay: a number >= 0; ``weight_decay * w`` is added to the gradient. If the subclass has the hyperparameter
        ``"decoupled_weight_decay"`` and it is True, ``update`` applies the decay instead.
      penalty: penalty of the groups that have none of their own.
      maximize: ascend the gradient; the penalty still shrinks.
      foreach: update tensors of equal shape as one stacked tensor, where there is a fused implementation. None: if they are
        small and at least four.
      capturable: keep the step count on the device of the parameter, for CUDA graphs.
      differentiable: let autograd differentiate through the step.
      check_finite: raise for NaN and inf in gradients before anything is updated. None: on a CPU only, because elsewhere the
        check waits for the device.
      projection: of the groups that have none of their own: see ``add_param_group``.

    Raises:
      TypeError: an option of the wrong type, or a penalty that is no ``ProxOperator``.
      ValueError: an argument out of its domain, or a penalty that does not fit a parameter.

    An example is Signum (Bernstein et al., "signSGD", 2018) with a prox. For the loss F and the penalty R,

    .. math::

        m_t = \beta m_{t-1} + (1 - \beta) \nabla F(w_{t-1}), \qquad
        w_t = \operatorname{prox}_{\eta R}(w_{t-1} - \eta \operatorname{sign}(m_t))

    >>> import torch
    >>> from proxopt import L1
    >>> from proxopt_torch import ProximalOptimizer
    >>> class ProxSignum(ProximalOptimizer):
    ...     state_names = ("momentum",)
    ...
    ...     def __init__(self, params, lr=1e-3, beta=0.9, **options):
    ...         super().__init__(params, {"lr": lr, "beta": beta}, **options)
    ...
    ...     def update(self, group, penalty, x, grad, state, count):
    ...         lr, beta = group["lr"], group["beta"]
    ...         momentum = self.each(lambda m, g: beta * m + (1 - beta) * g, state[0], grad)
    ...         z = self.each(lambda w, m: w - lr * m.sign(), x, momentum)
    ...         return self.prox(penalty, z, lr), (momentum,)
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.05]))
    >>> optimizer = ProxSignum([w], lr=0.1, penalty=L1(1.0))
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([0.8000, 0.0000])
    """

    state_names: tuple[str, ...] = ()

    _kernel: kernels.Kernel | None = None
    """A fused implementation of ``update``, in place and equal to it up to rounding: see ``proxopt_torch.kernels``."""

    _method: Callable[[ParamGroup], compiled.Method] | None = None
    """The same for compiled loops on a CPU: see ``proxopt_torch.compiled``."""

    _device_method: str | None = None
    """The name of ``update`` among the methods of the Triton kernels: see ``proxopt_torch.device.triton_steps``."""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
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
        shared = {
            "weight_decay": weight_decay,
            "penalty": penalty,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "check_finite": check_finite,
            "projection": projection,
        }
        defaults = {**GROUP_DEFAULTS, **defaults, **shared}
        if "lr" not in defaults:
            raise ValueError(
                f"defaults must hold the learning rate 'lr', got {sorted(set(defaults) - {*GROUP_DEFAULTS, *shared})}"
            )
        self._check_group(defaults)
        param_groups.normalise(defaults)
        super().__init__(cast(ParamsT, params), defaults)

    # -- what a subclass defines --------------------------------------------------------------

    def __init_subclass__(cls, **options: Any) -> None:
        """Do without the fused implementations of ``update`` in a subclass that overrides it."""
        super().__init_subclass__(**options)
        if "update" in cls.__dict__:
            for name in ("_kernel", "_method", "_device_method"):
                if name not in cls.__dict__:
                    setattr(cls, name, None)

    def update(
        self,
        group: ParamGroup,
        penalty: ProxOperator | None,
        x: Tensors,
        grad: Tensors,
        state: Sequence[Tensors],
        count: int | Tensor,
    ) -> tuple[Tensors, Sequence[Tensors]]:
        """Compute one step, without changing an argument.

        ``x``, ``grad`` and each member of ``state`` are tensors of the parameter's shape; in a joint group they are lists with
        one tensor for each parameter. ``each`` and ``prox`` take either.

        Args:
          group: the param group, for its hyperparameters.
          penalty: the penalty with its present strength, or None.
          x: the parameter.
          grad: its gradient, with weight decay added and negated for ``maximize``.
          state: the state tensors, in the order of ``state_names``.
          count: how many steps were taken before this one; a tensor if the group is capturable or differentiable, or the step
            is compiled.

        Returns:
          The next ``x`` and the next ``state``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update(group, penalty, x, grad, state, count)")

    def check_hyperparameters(self, group: ParamGroup) -> None:
        """Raise where a hyperparameter of the subclass is out of its domain, in the defaults or in a new param group."""

    def _state_names(self, group: ParamGroup) -> tuple[str, ...]:
        """The state tensors of a group, where its hyperparameters decide which of ``state_names`` are needed."""
        return self.state_names

    @property
    def _steps_of_adam(self) -> bool:
        return "exp_avg_sq" in self.state_names

    # -- what a subclass uses -----------------------------------------------------------------

    @staticmethod
    def each(function: Callable[..., Tensor], *arguments: Tensors) -> Tensors:
        """Call ``function`` on tensors, or on the first, the second, ... tensors of lists."""
        if isinstance(arguments[0], list):
            return [function(*tensors) for tensors in zip(*arguments)]
        return function(*arguments)

    def prox(self, penalty: ProxOperator | None, x: Tensors, step: float | Tensor | list[Tensor]) -> Tensors:
        """The prox of ``penalty`` at ``x``, and ``x`` itself without penalty. ``metric`` applies if the penalty has none."""
        if penalty is None:
            return x
        if self.metric is not None:
            penalty = declared.with_metric(penalty, self.metric)
        result: Tensors = penalty.prox(x, step)
        return result

    # -- param groups -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group: ``"params"``, any of ``"penalty"``, ``"strength"``, ``"joint"``, ``"projection"``; hyperparameters.

        With ``"joint": True`` all tensors of the group are one problem, whose groups may span them: ``"penalty"`` is then applied
        to the list of tensors. Otherwise it is applied to each tensor alone.

        ``"projection"`` is an object with a method ``project(x)``, such as ``proxopt.Sphere``, or a function of x, which returns
        a tensor of the shape of x (in a joint group x is the list of tensors, and so is the result). After each step it replaces
        every parameter that was updated, and its prox point where the optimizer has one, so that the next step extrapolates from
        projected points. It may be any map; one that maps zeros to zeros keeps those of the prox. A checkpoint holds its
        description only, and loads into an optimizer with the same projection: the same sphere, or the same name, arguments of
        ``functools.partial``, and fields of a frozen dataclass.

        Raises TypeError or ValueError, and leaves the optimizer as it was, where a value is out of its domain or the penalty does
        not fit a parameter.
        """
        given = param_group.get("strength") if isinstance(param_group, dict) else None
        unread = param_groups.unread(param_group, self.defaults) if isinstance(param_group, dict) else None
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            self._adopt(group, given)
        except Exception:
            self.param_groups.pop()
            raise
        if unread:
            warn(unread)

    def _check_group(self, group: ParamGroup) -> None:
        options.check_options(group)
        self.check_hyperparameters(group)

    # -- stepping -----------------------------------------------------------------------------

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; in a joint group, if all of them have one.

        Args:
          closure: computes the loss and its gradients, as in ``torch.optim``.

        Returns:
          The loss that the closure returned, or None.

        Raises:
          ValueError: a gradient that is not finite (see ``check_finite``), or a learning rate or strength that is negative.
          RuntimeError: the optimizer is in eval mode, or a gradient is sparse.

        An error, one of a ``"projection"`` too, leaves all parameters and states as they were (not under ``torch.compile`` or
        with ``differentiable=True``). For a projection other than ``proxopt.Sphere`` this takes a copy of its group in memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything that may raise comes before the first update, for all groups
        ready = [self._ready(group) for group in self.param_groups]
        work = [self._planned(group, penalty, present) for group, (penalty, present) in zip(self.param_groups, ready)]
        by_triton = [triton_steps.Part(part.group, part.penalty, part.triton) for part in work if part.triton]
        # but for projections of the user: their groups come first, so that no other has to be restored if one raises
        uncertain = [part for part in work if projections.may_raise(part.group)]
        changed = [entry for part in uncertain for entry in part.present]
        changed += [entry for part in by_triton if uncertain for entry in part.entries]
        with projections.restoring(self.state, [p for entry in changed for p in entry]):
            if by_triton:
                triton_steps.step(self, by_triton)
            for part in uncertain:
                self._update_group(part)
        for part in work:
            if not projections.may_raise(part.group):
                self._update_group(part)
        return loss

    def _update_group(self, part: _Work) -> None:
        """Update what Triton has not updated, and project all parameters."""
        for batch in part.batches:
            assert self._method is not None
            batch.step(self, part.group, self._method(part.group))
        for stack, grad in part.stacks:
            stacks.step(self, part.group, part.penalty, stack, grad)
        for entry in part.alone:
            self._step_entry(part.group, part.penalty, entry)
        if part.group.get("projection") is not None:
            for entry in part.present:
                projections.apply(part.group, entry, [self.state[p] for p in entry])
        frozen_zeros.apply(part.masks, self.state)

    def _planned(self, group: ParamGroup, penalty: ProxOperator | None, present: list[Entry]) -> _Work:
        """Divide the entries with gradients among Triton, batches, stacks and single ones, and check the gradients."""
        triton, rest = triton_steps.split(self, group, penalty, present)
        batches: list[compiled.Batch] = []
        if self._method is not None:
            batches, rest = self._batches(group, penalty, rest)
        stacked, alone = stacks.split(self, group, penalty, rest)
        grads = [stacks.gather(stack) for stack in stacked]
        others = [p.grad for e in triton + alone for p in e if p.grad is not None]
        self._check_finite(group, grads + [g for batch in batches for g in batch.grads] + others)
        masks = frozen_zeros.recorded(group, present, self.state)
        return _Work(group, penalty, present, triton, batches, list(zip(stacked, grads)), alone, masks)

    def _batches(
        self, group: ParamGroup, penalty: ProxOperator | None, present: list[Entry]
    ) -> tuple[list[compiled.Batch], list[Entry]]:
        """The batches of a group, and the entries that are in none."""
        found, rest = compiled.split(self, group, penalty, present)
        batches = []
        for batch in found:
            if batch.collect(self, group):
                batches.append(batch)
            else:
                rest = rest + batch.entries
        return batches, rest

    def _step_entry(self, group: ParamGroup, penalty: ProxOperator | None, entry: Entry) -> None:
        states = self._states(group, entry)
        if self._kernel is not None and kernels.fits(group, entry):
            kernels.run(self._kernel, group, penalty, entry[0], self._gradient(group, entry[0]), states[0])
        else:
            self._reference(group, penalty, entry, states)

    def _reference(self, group: ParamGroup, penalty: ProxOperator | None, entry: Entry, states: list[State]) -> None:
        """Apply ``update`` to the tensors of one entry, and store what it returns."""
        as_real = self.componentwise and any(p.is_complex() for p in entry)
        traced = group["differentiable"] or torch.compiler.is_compiling()

        def view(t: Tensor) -> Tensor:
            return torch.view_as_real(t) if as_real else t

        def bundle(tensors: Sequence[Tensor]) -> Tensors:
            return [view(t) for t in tensors] if group["joint"] else view(tensors[0])

        # Autograd saves the parameters for the backward pass, and they are overwritten below: it gets a copy
        x = bundle([p.clone() for p in entry] if group["differentiable"] else entry)
        grad = bundle([self._gradient(group, p) for p in entry])
        names = self._state_names(group)
        before = [bundle([s[n] for s in states]) for n in names]
        count = states[0]["step"]
        if not (group["capturable"] or traced):
            count = int(count.item())
        new, after = self.update(group, penalty, x, grad, before, count)
        if len(after) != len(names):
            raise ValueError(f"update of {type(self).__name__} must return the state tensors {names}, got {len(after)} of them")
        for state in states:
            state["step"] += 1
        for n, values in zip(names, after):
            for state, value in zip(states, _listed(values)):
                if traced and not as_real:
                    state[n] = value
                else:
                    view(state[n]).copy_(value)
        for p, value in zip(entry, _listed(new)):
            view(p).copy_(value)

    def _gradient(self, group: ParamGroup, p: Tensor) -> Tensor:
        assert p.grad is not None
        return self.descent(group, p, p.grad)

    def descent(self, group: ParamGroup, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient to descend at ``x``: negated for ``maximize``, with weight decay added unless it is decoupled."""
        if group["maximize"]:
            grad = -grad
        if group["weight_decay"] and not group.get("decoupled_weight_decay"):
            grad = grad.add(x, alpha=group["weight_decay"])
        return grad

    def _states(self, group: ParamGroup, entry: Entry) -> list[State]:
        """The state of each parameter of an entry, created at its first step."""
        for p in entry:
            state = self.state[p]
            if "step" not in state:
                start = _at_least_single(p if group["differentiable"] else p.detach())
                # on the CPU it can be read in every step without waiting for a device
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
                for n in self._state_names(group):
                    make = torch.clone if n == "point" else torch.zeros_like
                    state[n] = make(start, memory_format=torch.preserve_format)
        return [self.state[p] for p in entry]

    # -- search point and prox point ----------------------------------------------------------

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

    def state_dict(self) -> dict[str, Any]:
        """Plain data for ``torch.save``, in either mode; it loads with ``weights_only=True`` and resumes bit for bit."""
        for group in self.param_groups:
            param_groups.normalise(group)
        return checkpoints.packed(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, hyperparameters and strengths included; state tensors keep their saved precision.

        It may come from an optimizer with the same state: ``ProxAdam`` continues a run of ``torch.optim.Adam`` or ``AdamW``.
        Keys that a param group of the checkpoint lacks, such as the penalty then, keep their present values. Hooks registered by
        ``register_load_state_dict_pre_hook`` run before the checks.

        Raises:
          ValueError: another number of groups or parameters, other shapes, another kind of penalty or other penalty groups; the
            optimizer is left as it was.
        """
        self._load(super().load_state_dict, state_dict)

    def _check_state(self, group: ParamGroup, saved: State, p: Tensor, where: str) -> None:
        names = self._state_names(group)
        found = set(saved) - {"step", "search_point", ZEROS}
        if saved and found != set(names):
            raise ValueError(f"state_dict must hold the state {names} of {type(self).__name__}, got {sorted(found)}")
        for key in (*names, "search_point", ZEROS):
            if key in saved and getattr(saved[key], "shape", None) != p.shape:
                shape = tuple(saved[key].shape) if isinstance(saved[key], Tensor) else repr(saved[key])
                raise ValueError(f"state_dict must hold {key} of shape {tuple(p.shape)} for {where}, got {shape}")
        search = saved.get("search_point")
        if saved and "point" in names and group["mode"] == EVAL and sharding.is_sharded(p) and not sharding.is_sharded(search):
            held = "none" if search is None else "a plain tensor"
            raise ValueError(
                f"state_dict must hold a sharded search_point for {where}, since it was saved in eval mode, got {held}: "
                "torch.distributed.checkpoint restores an optimizer that was saved in train mode"
            )

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        super()._finish_loading(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, index in zip(group["params"], saved["params"]):
                self._restore(group, p, state_dict["state"].get(index, {}))
        self._forget_plans()

    def _forget_plans(self) -> None:
        for cached in ("_stacks", "_compiled", "_device_plans", "_device_splits"):
            self.__dict__.pop(cached, None)

    def _restore(self, group: ParamGroup, p: Tensor, saved: State) -> None:
        """Repair what torch did to the state of one parameter: it casts to the parameter's dtype and keeps foreign strides."""
        dense = p.detach() if kernels.plain_tensor(p) and kernels.is_dense(p) else None
        for key, value in saved.items():
            if key == "step":
                # a checkpoint may hold it on a device, and every step would wait to read it
                self.state[p][key] = self.state[p][key].to(p.device if group["capturable"] else "cpu")
            elif isinstance(value, Tensor):
                value = value.to(p.device)
                self.state[p][key] = value if dense is None else kernels.in_layout_of(dense, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle, also one of an earlier version, which lacks options and has the step count as a number."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            for p in group["params"]:
                s = self.state.get(p, {})
                if "step" in s and not torch.is_tensor(s["step"]):
                    s["step"] = torch.tensor(float(s["step"]), dtype=torch.float32)


def _listed(tensors: Tensors) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]


def _at_least_single(p: Tensor) -> Tensor:
    """Half precision as float32: in half precision the moments of small gradients would round to zero."""
    return p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
