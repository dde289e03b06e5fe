"""The search for a smaller model that runs and computes the same: slices, sizes, comparison, and units that have to stay."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from proxopt_torch.compaction import attention, counting, integers, layers, slicing, verification
from proxopt_torch.compaction.integers import Changed, Choices, Progress, Watch
from proxopt_torch.compaction.slicing import Kept
from proxopt_torch.dependencies import Arguments, Dependencies, Removal, removable
from proxopt_torch.dependencies.trace import remove_autocast

RUNS = 40
"""Passes on the example, most of which fail early, in the search for the sizes that code reads from attributes."""

ATTEMPTS = 12
"""Sets of units that are tried before the model stays as it is."""

ROUNDING = 100
"""A difference of up to this many times the tolerance may be rounding: it is looked at in double precision."""


@dataclass
class Smaller:
    """A smaller model that computes the same, and how it was made."""

    model: nn.Module
    removal: Removal
    kept: dict[str, Kept]
    inputs: Tensor | None
    sizes: dict[str, int]
    multiply_adds: int | None
    shifts: dict[str, Tensor]


@dataclass
class _Outcome:
    """What a comparison showed.

    reason: how the outputs differ, or why there are none; empty where they are the same. suspects: the modules that may be the
    cause, most likely first. running: those that had not finished when the model failed. progress: see ``Choices.advance``.
    """

    reason: str = ""
    suspects: list[nn.Module] = field(default_factory=list)
    failed: bool = False
    running: list[nn.Module] = field(default_factory=list)
    progress: Progress = (0, 0)
    multiply_adds: int | None = None


@dataclass
class Attempts:
    """The model, what is known of it, and the inputs on which it is compared with smaller ones."""

    original: nn.Module
    example: Arguments
    dependencies: Dependencies
    expected: list[Tensor]
    tolerance: float
    with_inputs: bool
    given_back: dict[int, str] = field(default_factory=dict)
    _probes: list[tuple[Arguments, list[Tensor]]] | None = None
    _blamed: set[type[nn.Module]] = field(default_factory=set)
    _double: nn.Module | None = None

    def search(self) -> Smaller | None:
        """The first model that is found, or None after a number of attempts; the units that must stay are in ``given_back``."""
        return next((small for _ in range(ATTEMPTS) if (small := self.next()) is not None), None)

    def next(self) -> Smaller | None:
        """The model without all units that can be removed, or None after units of it were found that must stay."""
        removal = removable(self.dependencies)
        gone = np.asarray(sorted(removal.units), dtype=np.int64)
        kept = _kept(self.dependencies, gone)
        features = self._features(gone)
        small = copied(self.original)
        shifts = {_bias(small, name): shift for name, shift in removal.shifts.items()}
        for name, shift in removal.shifts.items():
            slicing.add_to_bias(small, name, shift)
        kept |= _rows_of_new_biases(small, set(shifts) - set(kept), kept)
        slicing.cut(small, kept)
        small = layers.refresh(small)
        norms = self._resize_norms(small, gone)
        choices = Choices(self._changed(small, gone, kept))
        best: _Outcome | None = None
        for _ in range(RUNS):
            sizes = {**norms, **choices.apply()}
            outcome = self._try(small, features)
            if not outcome.reason:
                shifts = {n: slicing.selected(s, kept.get(n, (None,))) for n, s in shifts.items()}
                return Smaller(small, removal, kept, features, sizes, outcome.multiply_adds, shifts)
            best = outcome if best is None or outcome.progress > best.progress else best
            if not choices.advance(outcome.suspects, outcome.progress):
                break
        self._give_back(small, best or outcome, gone)
        return None

    def _try(self, small: nn.Module, features: Tensor | None) -> _Outcome:
        """Compare a smaller model with the original."""
        stage = 0
        with Watch(small) as watch:
            try:
                got, number = counting.counted(small, _narrowed(self.example, features))
                stage = 1
                if differing := self._compared(small, self.example, self.expected, got, features):
                    return self._difference(small, watch, stage, *differing)
                stage = 2
                for probe, expected in self._fresh():
                    got = verification.run(small, _narrowed(probe, features))
                    if differing := self._compared(small, probe, expected, got, features):
                        return self._difference(small, watch, stage, *differing)
            except Exception as error:  # of the code of the model, which does not run with these sizes
                reason = f"{type(error).__name__}: {first_line(error)}"
                return _Outcome(reason, watch.suspects(), True, watch.running, (stage, len(watch.finished)))
        return _Outcome(multiply_adds=number)

    def _difference(self, small: nn.Module, watch: Watch, stage: int, reason: str, given: tuple[Any, ...]) -> _Outcome:
        """The outcome for a model that runs and computes something else; ``given`` are the arguments of ``_differing``."""
        agree, paths = self._differing(*given)
        modules = dict(small.named_modules())
        return _Outcome(reason, [modules[p] for p in paths if p in modules] or watch.suspects(), progress=(stage, agree))

    def _compared(
        self, small: nn.Module, given: Arguments, expected: list[Tensor], got: list[Tensor], features: Tensor | None
    ) -> tuple[str, tuple[Any, ...]] | None:
        """How outputs differ, with the models and inputs that show it, or None where they differ by rounding at most.

        Outputs of an ill-conditioned model may differ by more than the tolerance although the functions are equal. A difference
        that is small enough for this is looked at again in double precision.
        """
        text = verification.difference(expected, got, self.tolerance)
        if not text:
            return None
        as_given = (self.original, small, given, features)
        if verification.difference(expected, got, ROUNDING * self.tolerance):
            return text, as_given
        try:
            if self._double is None:
                self._double = copied(self.original).double()
            precise, wide = copied(small).double(), verification.double(given)
            want, have = verification.run(self._double, wide), verification.run(precise, _narrowed(wide, features))
            if verification.difference(expected, [t.to(e) for t, e in zip(want, expected)], ROUNDING * self.tolerance):
                return text, as_given  # in double precision it is another function
            text = verification.difference(want, have, self.tolerance)
            return (text, (self._double, precise, wide, features)) if text else None
        except Exception:  # of a model that only runs in its own precision
            return text, as_given

    def _fresh(self) -> list[tuple[Arguments, list[Tensor]]]:
        """Inputs that differ from the example, and the outputs of the original for them, where it runs."""
        if self._probes is None:
            self._probes = []
            generator = torch.Generator().manual_seed(verification.SEED)
            for more in verification.FRESH_BATCHES:
                for extra in (more, 0):
                    try:
                        probe = verification.fresh(self.example, extra, generator)
                        self._probes.append((probe, verification.run(self.original, probe)))
                        break
                    except Exception:  # of a model that takes no such inputs
                        continue
        return self._probes

    def _features(self, gone: np.ndarray) -> Tensor | None:
        if not self.with_inputs or self.dependencies.inputs is None:
            return None
        return torch.from_numpy(np.flatnonzero(~np.isin(self.dependencies.inputs, gone)))

    def _resize_norms(self, small: nn.Module, gone: np.ndarray) -> dict[str, int]:
        """Set the sizes of GroupNorms without weight, which no tensor determines."""
        out: dict[str, int] = {}
        modules = dict(small.named_modules(remove_duplicate=False))
        for view in self.dependencies.views:
            module = modules.get(view.module)
            if isinstance(module, nn.GroupNorm) and module.weight is None:
                new = view.resized(gone)[1]
                if new != module.num_channels:
                    module.num_groups = layers.groups_left(new, module.num_channels, module.num_groups)
                    module.num_channels = new
                    out |= {f"{view.module}.{key}".lstrip("."): getattr(module, key) for key in ("num_groups", "num_channels")}
        return out

    def _changed(self, small: nn.Module, gone: np.ndarray, kept: dict[str, Kept]) -> list[Changed]:
        """The modules of the smaller model in whose code sizes change."""
        modules = dict(small.named_modules(remove_duplicate=False))
        found: dict[str, Changed] = {}
        parts: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for view in self.dependencies.views:
            module = modules.get(view.module)
            if module is None or (isinstance(module, torch.fx.GraphModule) and _is_attention(self.original, view.module)):
                continue
            new = view.resized(gone)
            if view.operator == "split_with_sizes":
                parts.setdefault(view.module, []).append((view.sizes, new))
            for old_size, new_size in zip(view.sizes, new) if new != view.sizes else ():
                found.setdefault(view.module, Changed(view.module, module)).add(old_size, new_size)
        for path in found.keys() & parts.keys():
            for before, after in zip(*(zip(*(sizes[k] for sizes in parts[path])) for k in (0, 1))):
                found[path].add(before, after)
        for name, indices in kept.items():  # of tensors whose sizes the code of their module may hold a second time
            path = name.rpartition(".")[0]
            module = modules.get(path)
            if module is not None and not layers.is_known(module) and not isinstance(module, torch.fx.GraphModule):
                places = self.dependencies.places[name]
                for units, left in zip(places, indices):
                    if units is not None and left is not None:
                        found.setdefault(path, Changed(path, module)).add(len(units), len(left))
        return list(found.values())

    def _differing(
        self, original: nn.Module, small: nn.Module, given: Arguments, features: Tensor | None
    ) -> tuple[int, list[str]]:
        """The first module whose output differs, and those that contain it, innermost first; before, how many agree."""
        try:
            want, got = _outputs(original, given), _outputs(small, _narrowed(given, features))
        except Exception:  # of a layer of torch that behaves otherwise with hooks
            return 0, []
        for index, (name, outputs) in enumerate(got.items()):
            expected = want.get(name, [])
            same = [t.shape for t in expected] == [t.shape for t in outputs]
            if same and verification.difference(expected, outputs, self.tolerance):
                parts = name.split(".") if name else []
                return index, [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
        return len(got), []

    def _give_back(self, small: nn.Module, outcome: _Outcome, gone: np.ndarray) -> None:
        """Keep units from now on: those whose sizes are in the code of a suspect, else those in its tensors, else all."""
        names = {id(module): name for name, module in small.named_modules()}
        removed = set(gone.tolist())
        paths = [names[id(module)] for module in dict.fromkeys(outcome.suspects) if id(module) in names]
        if outcome.failed:
            running = {names[id(module)] for module in outcome.running if id(module) in names}
            found = self._in_code(paths, running, gone)
            if found:
                self._keep(found)
                return
        for path in paths:
            inside = [a for n, arrays in self.dependencies.places.items() if n.startswith(f"{path}.".lstrip(".")) for a in arrays]
            units = {int(u) for array in inside if array is not None for u in np.unique(array)}
            units = (units | set(self._written(path, gone))) & removed
            if units:
                self._keep(dict.fromkeys(units, f"{path or 'the model'}: {outcome.reason}"))
                return
        self._keep(dict.fromkeys(removed, outcome.reason))

    def _in_code(self, paths: list[str], running: set[str], gone: np.ndarray) -> dict[int, str]:
        """The units whose sizes are in the code of the most likely of some modules.

        That is one with such a number in its code, then one that had not finished, then one that holds such a number. The code of
        others takes all sizes from its inputs.
        """
        sizes = {path: numbers for path in paths if (numbers := self._sizes(path, gone))}
        modules = {path: self.original.get_submodule(path) for path in sizes}
        for path, module in modules.items():
            written = sizes[path] & integers.literals(type(module))
            if written and (found := self._written(path, gone, written, everywhere=True)):
                return found
        held = {path: sizes[path] & {number for _, number in integers.integers(module)} for path, module in modules.items()}
        for path in [*(p for p in sizes if p in running), *(p for p in sizes if held[p])]:
            if found := self._written(path, gone, sizes[path]):
                return found
        return {}

    def _sizes(self, path: str, gone: np.ndarray) -> set[int]:
        """The sizes in the code of a module that change."""
        views = [view for view in self.dependencies.views if view.module == path]
        return {old for view in views for old, new in zip(view.sizes, view.resized(gone)) if old != new}

    def _written(self, path: str, gone: np.ndarray, sizes: set[int] | None = None, everywhere: bool = False) -> dict[int, str]:
        """The units that sizes in the code of a module depend on.

        everywhere: also in the other modules of its class, as for a class that is found a second time.
        """
        out: dict[int, str] = {}
        modules = dict(self.original.named_modules(remove_duplicate=False))
        kind = type(modules[path])
        everywhere = everywhere or kind in self._blamed
        for view in self.dependencies.views:
            if view.module != path and not (everywhere and type(modules.get(view.module)) is kind):
                continue
            for dimension, (old, new) in enumerate(zip(view.sizes, view.resized(gone))):
                if old == new or (sizes is not None and view.module == path and old not in sizes):
                    continue
                for dimensions, units in view.blocks:
                    if dimension in dimensions:
                        reason = f"the size {old} is written in the code of {kind.__name__}.forward"
                        out |= dict.fromkeys(np.unique(units[np.isin(units, gone)]).tolist(), reason)
        if out:
            self._blamed.add(kind)
        return out

    def _keep(self, units: dict[int, str]) -> None:
        self.given_back |= units
        self.dependencies.kept.update(units)


def _outputs(model: nn.Module, given: Arguments) -> dict[str, list[Tensor]]:
    """The outputs of all modules of a model, in the order in which they finish."""
    found: dict[str, list[Tensor]] = {}

    def look(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(name, [t.detach().clone() for t in verification.tensors(output)])

        return record

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        verification.run(model, given)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _kept(dependencies: Dependencies, gone: np.ndarray) -> dict[str, Kept]:
    """The remaining indices of all tensors that are cut."""
    out: dict[str, Kept] = {}
    for name, places in dependencies.places.items():
        masks = [None if units is None else ~np.isin(units, gone) for units in places]
        kept = tuple(None if mask is None or mask.all() else torch.from_numpy(np.flatnonzero(mask)) for mask in masks)
        if any(indices is not None for indices in kept):
            out[name] = kept
    return out


def _rows_of_new_biases(model: nn.Module, names: set[str], kept: dict[str, Kept]) -> dict[str, Kept]:
    """The remaining indices of biases of layers that had none: those of the outputs of the weight."""
    out: dict[str, Kept] = {}
    for name in names:
        path = name.rpartition(".")[0]
        rows = kept.get(f"{path}.weight".lstrip("."))
        if rows is not None:
            out[name] = (rows[1 if isinstance(model.get_submodule(path), layers.TRANSPOSED) else 0],)
    return out


def _bias(model: nn.Module, name: str) -> str:
    """The name of the bias that a constant is added to: ``name`` itself, or that of a layer without one."""
    return name if name in slicing.first_names(model) else f"{name}.bias"


def _narrowed(given: Arguments, features: Tensor | None) -> Arguments:
    """The arguments of the smaller model: the first without the features that were removed."""
    if features is None:
        return given
    args, kwargs = given
    if args:
        return (args[0].flatten(1)[:, features.to(args[0].device)], *args[1:]), kwargs
    key = next(iter(kwargs))
    return args, {**kwargs, key: kwargs[key].flatten(1)[:, features.to(kwargs[key].device)]}


def _is_attention(model: nn.Module, path: str) -> bool:
    return attention.is_plain(model.get_submodule(path))


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def copied(model: nn.Module) -> Any:
    """A copy in eval mode, without autocast; tensors that autograd computed, which cannot be copied, become constants."""
    held = tree_leaves([list(vars(module).values()) for module in model.modules()])
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in held if isinstance(x, Tensor) and not x.is_leaf}
    found = copy.deepcopy(getattr(model, "_orig_mod", model), memo).eval()
    remove_autocast(found)
    return found
