"""``Budget``: strengths that make a network reach a given size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from torch import nn

from proxopt._arrays import is_number
from proxopt_torch.budgets import control, quantities
from proxopt_torch.budgets.quantities import Quantity
from proxopt_torch.budgets.strengths import Strengths
from proxopt_torch.groups.selection import Selection
from proxopt_torch.penalised import Penalised, as_penalised, warn
from proxopt_torch.wrappers import unwrapped

PROGRESS = {"calls": int, "frozen": bool, "warned": bool}  # keys of a state, and the types of their values
COLUMNS = ("step", "share", "wanted", "target", "strength", "reached", "frozen")


@dataclass(frozen=True)
class BudgetRecord:
    """The state of a budget after a call of ``step``.

    step: number of calls. share: the measured share. wanted: the share that the schedule asks for now. target: the share that is
    asked for in the end. strength: the largest strength of the penalties. reached: whether the share is the target, within the
    tolerance. frozen: whether the zeros are frozen. For ``sparsity=`` the shares are those of zero weights, else what remains of
    the dense model.

    >>> record = BudgetRecord(100, 0.49, 0.5, 0.5, 2e-3, reached=True, frozen=True)
    >>> record.row()["share"]
    0.49
    """

    step: int
    share: float
    wanted: float
    target: float
    strength: float
    reached: bool
    frozen: bool

    def row(self) -> dict[str, Any]:
        """The columns by name."""
        return {name: getattr(self, name) for name in COLUMNS}


class Budget:
    r"""Drive the strengths of an optimizer's penalties until the model costs a given share of what the dense one costs.

    All strengths are multiplied by one factor. If they are equal at construction, their ratios are set first: where the
    removal of a unit of a problem p (a layer, or layers that share units) saves :math:`c_p` of the dense model,

    .. math::

        \lambda_p \propto c_p \, / \, \operatorname{mean}_{u \in p} R(w_u)

    with the penalty R at strength 1 and the present parameters of the units u. So the penalty of an average unit is proportional
    to what it costs, and layers with few parameters but many multiply-adds shrink as well (compare Gordon et al., MorphNet,
    2018, where the penalties of batch norm scales are weighted by costs). Strengths that differ keep their ratios.

    The wanted share follows a schedule from 1 to the
    target; by default, with :math:`c` the target and :math:`t \in [0, 1]` the share of the steps,

    .. math::

        c^*(t) = c + (1 - c) (1 - t)^3

    (Zhu and Gupta, To prune, or not to prune, 2017, Eq. 1). The factor rises while the measured share is above it, falls while
    it is below, and is constant in a band around it. The first factor follows from the gradients of the last backward pass, if
    they exist: 1e-2 of that at which zero is a stationary point; otherwise it is 1. The share is that of the model that
    ``compact`` would return at the prox point. It is counted from one analysis of the graph and two trial cuts at
    construction; a measurement needs no pass of the model.

    Call ``step()`` once after each update, or after each epoch; ``steps`` counts these calls. When the share is within the
    tolerance of the target, ``optimizer.freeze_zeros()`` is called, so that the rest of the training is without penalty.
    Units of which all parameters are in one group (``groups.coupled``) do not become nonzero again once they are zero. The more
    often the share is measured the closer it comes to the target: 30 measurements or more for a tolerance of 0.02, in a network
    without units that cost more than this.

    Nothing else may set the strengths of this optimizer: use no ``StrengthPath`` beside it.

    Args:
      optimizer: an optimizer of proxopt_torch whose penalties have strengths > 0.
      model: the model that holds its parameters. A compiled model or one in ``DistributedDataParallel`` stands for the original.
      example_inputs: the arguments of ``model(...)``: a tensor, a tuple of arguments, or a dict of keyword arguments. It may be
        None for ``sparsity`` and ``living_groups``.
      macs, parameters: multiply-adds or parameters of the compact model, as shares in (0, 1) of those of the dense model.
      sparsity: the share of zero entries of parameters, in (0, 1).
      living_groups: the share of groups of the penalties that are not zero, in (0, 1).
      latency: time of a pass of the compact model, as a share of that of the dense model, in (0, 1). It is measured here, on the
        example, and each measurement calls ``compact``: measure once per epoch. A run with it is not repeatable bit for bit.
      modules: only these modules count, with those inside them: names (patterns such as ``"encoder.*"``) or types. None for all.
      steps: number of calls of ``step()`` until the target is due.
      every: measure at every so many calls only.
      schedule: ``"cubic"``, ``"linear"``, or a function from the share of the time to the share of the way, both in [0, 1].
      start: share of the steps in which the model trains without penalty first, in [0, 1).
      tolerance: the target is reached if the share lies in [target - tolerance, target + tolerance / 2], in (0, 1).
      freeze: freeze the zeros as soon as the target is reached. False continues to control the strengths.
      by_cost: set the ratios of the strengths by the costs of units, as above, or keep those that the optimizer has. None: set
        them for ``macs`` and ``parameters`` if all penalties have groups and the same strength.

    Attributes:
      log: one dict for each measurement, the rows of a CSV file.
      record: the last ``BudgetRecord``.
      smallest: the share if everything that the penalties can zero is zero but for one group of each problem (of each layer, or
        of layers that share units); None for latency and for sharded parameters. A warning says if the target is below it.

    Raises:
      TypeError: ``optimizer`` is none of proxopt_torch.
      ValueError: not exactly one target is given, an argument is outside its domain, a strength is 0, the model does not hold
        the penalised parameters, or it cannot be traced.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import Budget, ProxAdam, compact, groups
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    >>> x = torch.randn(256, 8)
    >>> optimizer = ProxAdam(groups.coupled(net, x, GroupL2(1e-3)), lr=0.01)
    >>> budget = Budget(optimizer, net, x, macs=0.5, steps=100)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     ((net(x) - x[:, :1] * x[:, 1:2]) ** 2).mean().backward()
    ...     optimizer.step()
    ...     record = budget.step()
    >>> optimizer.eval()
    >>> small = compact(net, x)
    """

    def __init__(
        self,
        optimizer: Penalised,
        model: nn.Module,
        example_inputs: Any,
        *,
        macs: float | None = None,
        parameters: float | None = None,
        sparsity: float | None = None,
        living_groups: float | None = None,
        latency: float | None = None,
        modules: Selection = None,
        steps: int,
        every: int = 1,
        schedule: str | Callable[[float], float] = "cubic",
        start: float = 0.0,
        tolerance: float = 0.02,
        freeze: bool = True,
        by_cost: bool | None = None,
    ) -> None:
        given = {
            "macs": macs,
            "parameters": parameters,
            "sparsity": sparsity,
            "living_groups": living_groups,
            "latency": latency,
        }
        self.kind, self.target = _one_target(given)
        steps, every = _count("steps", steps), _count("every", every)
        _check_share("tolerance", tolerance)
        if _is_not_in_unit_interval("start", start, closed=True):
            raise ValueError(f"start must lie in [0, 1), got {start}")
        if not isinstance(freeze, bool):
            raise TypeError(f"freeze must be True or False, got {freeze!r}")
        if not (by_cost is None or isinstance(by_cost, bool)):
            raise TypeError(f"by_cost must be True, False or None, got {by_cost!r}")
        if by_cost and self.kind == "latency":
            raise ValueError("by_cost must be False or None for latency, in which a single unit is no measurable difference")
        self.optimizer = as_penalised("optimizer", optimizer)
        self.steps, self.every, self.start, self.tolerance, self.freeze = steps, every, float(start), float(tolerance), freeze
        self.log: list[dict[str, Any]] = []
        self._schedule = control.schedule_of(schedule)
        control.wanted_share(self._schedule, self._remaining, 0.0)
        self._model = unwrapped(model)
        self._strengths = Strengths(self.optimizer)
        self._check_model()
        with self._strengths.kept_on_error(), self.optimizer.at_prox_point():
            self._quantity = _quantity(self.kind, self.optimizer, self._model, example_inputs, modules)
            sharded = any(hasattr(p, "full_tensor") for p in self._model.parameters())
            if by_cost and sharded:
                raise ValueError("by_cost must be False or None for sharded parameters")
            if by_cost or (
                by_cost is None and not sharded and self.kind in ("macs", "parameters") and self._strengths.leave_ratios_open()
            ):
                self._strengths.follow_costs(self._quantity.share)
            share = self._quantity.share()
            self.smallest = None if self.kind == "latency" or sharded else self._smallest()
        self._control = control.Controller(self.tolerance, max((1 - start) * steps / every, 1.0))
        self._calls, self._frozen, self._warned = 0, False, False
        self._strengths.set(0.0)
        self.record = self._recorded(share)

    def step(self) -> BudgetRecord:
        """Count a call and, at every ``every``-th, measure the share and set the strengths.

        Raises:
          RuntimeError: something else has set a strength, or has ended the freezing of the zeros by the budget.
          ValueError: a schedule of your own returns no number in [0, 1].
        """
        self._strengths.check()
        if self._frozen and not self._strengths.frozen:
            raise RuntimeError(
                "the zeros must stay frozen once the budget has frozen them, got an optimizer in which they are not: make a new "
                "budget after freeze_zeros(False), and when you resume load the states of both the optimizer and the budget"
            )
        self._calls += 1
        if self._calls % self.every == 0 or self._calls == self.steps:
            with self.optimizer.at_prox_point():
                share, value = self._quantity.share(), self._strengths.value()
            self._act(share, value)
            self.record = self._recorded(share)
            self.log.append(self.record.row())
        return self.record

    def state_dict(self) -> dict[str, Any]:
        """The progress, as plain data. A checkpoint needs the state of the optimizer too, which holds the frozen zeros."""
        return {
            "kind": self.kind,
            "calls": self._calls,
            "frozen": self._frozen,
            "warned": self._warned,
            "own": dict(self._strengths.own),
            "control": self._control.state_dict(),
            "record": self.record.row(),
            "log": [dict(row) for row in self.log],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run, bit for bit if the states of optimizer and model are loaded too, in any order.

        ``steps``, ``every``, ``tolerance`` and the other arguments are those of this budget.

        Raises:
          ValueError: this is not the state of a budget, or it belongs to one with another target or to an optimizer with other
            param groups; nothing was changed.
        """
        try:
            calls, frozen, warned = (_plain(kind, state_dict[key]) for key, kind in PROGRESS.items())
            controller, record = control.Controller(**state_dict["control"]), BudgetRecord(**state_dict["record"])
            controller = replace(controller, tolerance=self.tolerance, measurements=self._control.measurements)
            kind = state_dict.get("kind", self.kind)
            given, log = dict(state_dict["own"]), [dict(row) for row in state_dict["log"]]
            _ = controller.factor, float(record.share), float(record.target)  # numbers, or an error
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            held = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            message = f"state_dict must be what state_dict() of a Budget returned, got {held}: {type(error).__name__} {error}"
            raise ValueError(message) from error
        if (kind, record.target) != (self.kind, self.target):
            raise ValueError(f"state_dict must be of a budget with {self.kind}={self.target:g}, got {kind}={record.target}")
        own = self._strengths.checked(given)
        self._calls, self._frozen, self._warned = calls, frozen, warned
        self._control, self.record, self.log = controller, record, log
        self._strengths.own = own
        self._strengths.set(self._control.factor)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Budget cannot be pickled or copied, since it holds an analysis of the graph of the model: keep its state_dict() "
            "and load that into a new Budget of the other optimizer and model"
        )

    def __str__(self) -> str:
        r, label = self.record, "zero weights" if self.kind == "sparsity" else self._quantity.label
        state = "zeros frozen" if r.frozen else f"strength {r.strength:.3g}"
        return f"{label} {r.share:.3f}, wanted {r.wanted:.3f}, target {r.target:.3f}; {state} (step {r.step} of {self.steps})"

    # -- control ------------------------------------------------------------------------------

    def _act(self, share: float, value: float) -> None:
        """Set the strengths after a measurement, or freeze the zeros, and warn if the target is out of reach."""
        if not self._strengths.frozen:
            time = self._time()
            if self._control.log_factor is None and time > 0:
                self._control.start(self._strengths.zeroing_factor())
            self._control.update(share, control.wanted_share(self._schedule, self._remaining, time), value, time)
            self._strengths.set(self._control.factor)
        due, reached = self._calls >= self.steps, self._reached(share)
        if self.freeze and not self._strengths.frozen and (reached or (due and share < self._remaining)):
            self.optimizer.freeze_zeros()
            self._frozen = True
        if not self._warned and not reached and (due or self._control.stalled):
            self._warned = True
            warn(self._failure(share, due))

    def _failure(self, share: float, due: bool) -> str:
        when = f"after {self.steps} steps" if due else f"although the strength has grown to {self._strengths.largest():.3g}"
        remedy = "measure more often, raise the tolerance if single units are larger than it"
        if share > self._remaining:
            remedy = "penalise more parameters"
        target, got = self._shown(self._remaining), self._shown(share)
        return f"the target {self.kind}={target:g} is not reached {when}, got {got:.4g}: {remedy}, or take more steps"

    def _smallest(self) -> float:
        """The share that the penalties can reach; warns where the target lies below it."""
        with self._strengths.almost_all_zeroed():
            smallest = self._quantity.share()
        if smallest > self._remaining + self.tolerance / 2:
            warn(
                f"the target {self.kind}={self.target:g} is out of reach of the penalties: if all they act on but one group of "
                f"each problem is zero, the share is {self._shown(smallest):.4g}; penalise more parameters (see groups.coupled)"
            )
        return smallest

    def _time(self) -> float:
        """The share of the schedule that has passed, in [0, 1]."""
        return min(max((self._calls / self.steps - self.start) / (1 - self.start), 0.0), 1.0)

    @property
    def _remaining(self) -> float:
        """The target as what remains of the dense model."""
        return 1 - self.target if self.kind == "sparsity" else self.target

    def _shown(self, share: float) -> float:
        """What remains of the dense model, in the terms of the target."""
        return 1 - share if self.kind == "sparsity" else share

    def _reached(self, share: float) -> bool:
        return self._remaining - self.tolerance <= share <= self._remaining + self.tolerance / 2

    def _recorded(self, share: float) -> BudgetRecord:
        wanted = self._shown(control.wanted_share(self._schedule, self._remaining, self._time()))
        strength, frozen = self._strengths.largest(), self._strengths.frozen
        return BudgetRecord(self._calls, self._shown(share), wanted, self.target, strength, self._reached(share), frozen)

    # -- the model ----------------------------------------------------------------------------

    def _check_model(self) -> None:
        """Raise where the model holds none of the penalised parameters."""
        held = {id(p) for p in self._model.parameters()}
        if not any(id(p) in held for group, _ in self._strengths.groups() for p in group["params"]):
            raise ValueError(
                f"model must hold the parameters of the optimizer, got a {type(self._model).__name__} with none of those that "
                "have a penalty"
            )


def _one_target(given: dict[str, float | None]) -> tuple[str, float]:
    """The name and the value of the only target."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1:
        raise ValueError(f"exactly one of {', '.join(given)} must be given, got {', '.join(found) or 'none'}")
    ((name, value),) = found.items()
    _check_share(name, value)
    return name, float(value)


def _check_share(name: str, value: Any) -> None:
    if _is_not_in_unit_interval(name, value):
        raise ValueError(f"{name} must be a number in (0, 1), got {value}")


def _is_not_in_unit_interval(name: str, value: Any, closed: bool = False) -> bool:
    """Whether a number is not in (0, 1), or not in [0, 1). TypeError for anything but a number."""
    if isinstance(value, bool) or not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return not (0 <= value < 1 if closed else 0 < value < 1)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return int(value)


def _plain(kind: Any, value: Any) -> Any:
    if type(value) is not kind or (kind is int and value < 0):
        raise TypeError(f"{value!r} is no {kind.__name__}{' >= 0' if kind is int else ''}")
    return value


def _quantity(kind: str, optimizer: Penalised, model: nn.Module, example_inputs: Any, modules: Selection) -> Quantity:
    if kind == "latency":
        if modules is not None:
            raise ValueError(f"modules must be None for latency, which is that of the whole model, got {modules!r}")
        return quantities.Latency(model, example_inputs)
    if kind == "sparsity":
        return quantities.NonzeroWeights(model, modules)
    if kind == "living_groups":
        return quantities.NonzeroGroups(optimizer, model, modules)
    return quantities.Analysed(kind, model, example_inputs, modules)
