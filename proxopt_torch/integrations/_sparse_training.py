"""What the callbacks do, whatever the trainer: the sparse point in checkpoints, a budget, reports, and compaction at the end."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from proxopt_torch import checkpoints, compaction, sharding
from proxopt_torch.budgets import Budget
from proxopt_torch.compaction import Compacted
from proxopt_torch.penalised import Penalised, as_penalised
from proxopt_torch.report import SparsityReport, sparsity_report
from proxopt_torch.strength_path import StrengthPath
from proxopt_torch.wrappers import unwrapped

MEASUREMENTS = 200
"""How often a budget measures in a training, unless ``every`` is given."""

Driver: TypeAlias = Budget | StrengthPath
MakeDriver: TypeAlias = Callable[[Penalised, nn.Module, Any, int | None], Driver]

COUNTED = ("macs", "parameters", "latency")
"""The targets of a budget that need example inputs."""


class SparseTraining:
    """Base class of the callbacks. A subclass calls the methods with an underscore at the events of its trainer."""

    _example_hint = "pass example_inputs"

    def __init__(
        self,
        budget: Mapping[str, Any] | MakeDriver | None = None,
        *,
        network: str = "",
        example_inputs: Any = None,
        compact: bool | Mapping[str, Any] = False,
        save_compact: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if not (budget is None or isinstance(budget, Mapping) or callable(budget)):
            raise TypeError(f"budget must be a dict of arguments of Budget, a function that makes one, or None, got {budget!r}")
        if isinstance(budget, Mapping):
            _check_keywords("budget", budget, Budget, ("optimizer", "model", "example_inputs"))
        if not isinstance(network, str):
            raise TypeError(f"network must be the name of a submodule, or '' for the whole model, got {network!r}")
        if not isinstance(compact, (bool, Mapping)):
            raise TypeError(f"compact must be True, False or a dict of arguments of compact, got {compact!r}")
        if isinstance(compact, Mapping):
            _check_keywords("compact", compact, compaction.compact, ("model", "example_inputs"))
        if save_compact is not None and compact is False:
            raise ValueError(f"save_compact must be None where compact is False, got {str(save_compact)!r}")
        if not (save_compact is None or isinstance(save_compact, (str, PathLike))):
            raise TypeError(f"save_compact must be the path of a file or None, got {save_compact!r}")
        if save_compact is not None and Path(save_compact).is_dir():
            raise ValueError(f"save_compact must be the path of a file, got the folder {str(save_compact)!r}")
        self.optimizer: Penalised | None = None
        self.budget: Driver | None = None
        self.report: SparsityReport | None = None
        self.compacted: Compacted | None = None
        self._make_budget, self._network, self._given_example = budget, network, example_inputs
        self._compact, self._save_compact = compact, save_compact
        self._saved: dict[str, Any] = {}
        self._running = False
        self._hooks: list[RemovableHandle] = []

    # -- a training ---------------------------------------------------------------------------

    def _begin(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        example_inputs: Any,
        steps: float,
        convert: Callable[[Any], Any] = lambda x: x,
    ) -> None:
        """Check everything, make the budget, and let ``state_dict()`` of model and optimizer be those of the prox point.

        Args:
          example_inputs: the default of the trainer; None if there is none.
          convert: what the trainer does to the inputs, e.g. to a model in half precision.
          steps: the number of updates; inf, or not positive, if the trainer does not know it.
        """
        model = unwrapped(model)
        optimizer = proximal_optimizer(optimizers)
        network = self._submodule(model)
        sharded = next((name for name, p in model.named_parameters() if sharding.is_sharded(p)), None)
        if self._compact is not False and sharded is not None:
            raise ValueError(
                f"compact must be False where parameters are sharded, as {sharded} is: gather them into a whole model and call "
                "compact with that"
            )
        if self._save_compact is not None:  # an error now, rather than after the training
            Path(self._save_compact).parent.mkdir(parents=True, exist_ok=True)
        example = _on_device_of(network, convert(self._chosen_example(example_inputs)))
        budget = self._made_budget(optimizer, network, example, steps)
        self.optimizer, self.budget, self.report, self.compacted = optimizer, budget, None, None
        self._example, self._running = example, True
        self._remove_hooks()
        if sharded is None:  # torch.distributed.checkpoint cannot load a search point beside the prox point
            self._hooks = _hooked(model, optimizer)
        self._restore(self._saved)

    def _update(self) -> None:
        """After an update of the parameters."""
        if self.budget is not None:
            self.budget.step()

    def _end(self, model: nn.Module, *, write: bool) -> None:
        """Leave the model at the prox point, and compact it. ``write``: whether this process writes files."""
        assert self.optimizer is not None
        self.optimizer.eval()
        self._forget()
        self.report = sparsity_report(self.optimizer)
        if self._compact is not False:
            options = self._compact if isinstance(self._compact, Mapping) else {}
            self.compacted = compaction.compact(self._submodule(unwrapped(model)), self._example, **options)
            if self._save_compact is not None and write:
                torch.save(self.compacted.model.state_dict(), self._save_compact)

    def _forget(self) -> None:
        """After a training, or before another."""
        self._remove_hooks()
        self._saved, self._running = {}, False

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- numbers for a log --------------------------------------------------------------------

    def _budget_metrics(self) -> dict[str, float]:
        """Of the last measurement."""
        if not isinstance(self.budget, Budget):
            return {}
        record = self.budget.record
        return {"budget_share": record.share, "budget_wanted": record.wanted, "budget_strength": record.strength}

    def _report_metrics(self) -> dict[str, float]:
        """Of a new report. With sharded parameters every rank must call this."""
        assert self.optimizer is not None
        self.report = sparsity_report(self.optimizer)
        groups, living = (sum(getattr(row, name) or 0 for row in self.report.rows) for name in ("groups", "living"))
        return {"zero_share": self.report.share} | ({"living_groups": living / groups} if groups else {})

    # -- checkpoints --------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the states of model and optimizer."""
        return {} if self.budget is None else {"budget": self.budget.state_dict()}

    def _restore(self, saved: dict[str, Any]) -> None:
        """Continue from such a state; one that arrives before the training begins is kept until then."""
        self._saved = saved
        if self._running and self.budget is not None and saved:
            self.budget.load_state_dict(saved["budget"])
            self._saved = {}

    # -- parts --------------------------------------------------------------------------------

    def _submodule(self, model: nn.Module) -> nn.Module:
        try:
            return unwrapped(model.get_submodule(self._network))
        except AttributeError as error:
            names = [name for name, _ in model.named_children()]
            raise ValueError(f"network must name a submodule of {type(model).__name__}, e.g. of {names}, got {error}") from error

    def _chosen_example(self, default: Any) -> Any:
        example = default if self._given_example is None else self._given_example
        targets = self._make_budget if isinstance(self._make_budget, Mapping) else {}
        needs = [name for name in COUNTED if targets.get(name) is not None] + ["compact"] * (self._compact is not False)
        if needs and example is None:
            raise ValueError(f"example_inputs must be given for {' and '.join(needs)}, got None: {self._example_hint}")
        return example

    def _made_budget(self, optimizer: Penalised, network: nn.Module, example: Any, steps: float) -> Driver | None:
        make = self._make_budget
        if make is None:
            if self._saved:
                raise ValueError("budget must be given to resume a training with one, got None: pass that of the first training")
            return None
        known = int(steps) if 0 < steps < math.inf else None
        if isinstance(make, Mapping):
            updates = make.get("steps", known)
            if updates is None:
                raise ValueError(f"budget must hold 'steps', since the trainer does not know the number of updates, got {make!r}")
            every = max(1, int(updates) // MEASUREMENTS) if isinstance(updates, Integral) else 1
            self._reset_strengths(optimizer)
            return Budget(optimizer, network, example, **{"steps": updates, "every": every, **make})
        self._reset_strengths(optimizer)
        found = make(optimizer, network, example, known)
        if not isinstance(found, (Budget, StrengthPath)):
            raise TypeError(f"the function budget must return a Budget or a StrengthPath, got {type(found).__name__}")
        return found

    def _reset_strengths(self, optimizer: Penalised) -> None:
        """Give the optimizer the strengths that an earlier budget has multiplied, which may have made them zero."""
        earlier = self.budget.state_dict() if self.budget is not None and self.budget.optimizer is optimizer else {}
        own = self._saved.get("budget", earlier).get("own", {})
        for number, group in enumerate(optimizer.param_groups):
            if number in own:
                group["strength"] = own[number]


def _hooked(model: Any, optimizer: Any) -> list[RemovableHandle]:
    """Let ``state_dict()`` of both be that of the prox point, until the hooks are removed."""
    of_optimizer = lambda _, saved: checkpoints.of_eval_mode(optimizer, saved)
    hooks = (model, _ProxPointWeights(optimizer)), (optimizer, of_optimizer)
    return [part.register_state_dict_post_hook(hook) for part, hook in hooks]


class _ProxPointWeights:
    """A hook that puts the prox points of an optimizer into a state_dict of the model.

    Copies of the model have other parameters: in them, and after unpickling, the hook does nothing.
    """

    def __init__(self, optimizer: Penalised | None = None) -> None:
        self._optimizer = optimizer

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        points = {} if self._optimizer is None else checkpoints.prox_points(self._optimizer)
        for name, p in module.named_parameters(remove_duplicate=False):
            if id(p) in points and prefix + name in state_dict:
                # a copy, for the points of several parameters may share memory, which safetensors refuses
                state_dict[prefix + name] = points[id(p)].detach().to(p.dtype, copy=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def proximal_optimizer(optimizers: Iterable[Optimizer]) -> Penalised:
    """The only optimizer of proxopt_torch among those of a trainer, taken out of its wrappers.

    Raises:
      TypeError: there is none.
      ValueError: there are several, or none of its param groups has a penalty.
    """
    bare = [_unwrapped_optimizer(optimizer) for optimizer in optimizers]
    found = [optimizer for optimizer in bare if isinstance(optimizer, Penalised)]
    if len(found) > 1:
        raise ValueError(f"the trainer must have one optimizer of proxopt_torch, got {[type(o).__name__ for o in found]}")
    if not found:
        if not bare:
            raise ValueError("the trainer must have an optimizer of proxopt_torch, got none")
        return as_penalised("the optimizer of the trainer", bare[0])
    if all(group["penalty"] is None for group in found[0].param_groups):
        raise ValueError(f"a param group of the optimizer must have a penalty, got {type(found[0]).__name__} without any")
    return found[0]


def _unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate and Lightning."""
    while not isinstance(optimizer, Penalised) and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _on_device_of(network: nn.Module, example_inputs: Any) -> Any:
    p = next(network.parameters(), None)
    return tree_map(lambda x: x.to(p.device) if isinstance(x, Tensor) and p is not None else x, example_inputs)


def _check_keywords(name: str, given: Mapping[str, Any], function: Callable[..., Any], positional: tuple[str, ...]) -> None:
    known = [key for key in inspect.signature(function).parameters if key not in positional]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"{name} must hold arguments of {function.__name__}, which are {', '.join(known)}, got {unknown}")
