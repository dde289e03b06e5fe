"""The search for a smaller model that runs and computes the same: slices, sizes, comparison, and units that have to stay."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from proxopt_torch.compaction import attention, counting, layers, slicing, verification
from proxopt_torch.compaction.integers import Changed, Choices, Watch
from proxopt_torch.compaction.slicing import Kept
from proxopt_torch.dependencies import Arguments, Dependencies, Removal, removable

RUNS = 40
"""Passes on the example, most of which fail early, in the search for the sizes that code reads from attributes."""


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
    """What a comparison showed. reason: how the outputs differ, or why there are none; empty where they are the same."""

    reason: str = ""
    suspects: list[nn.Module] = field(default_factory=list)
    failed: bool = False
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

    def next(self) -> Smaller | None:
        """The model without all units that can be removed, or None after units of it were found that must stay."""
        removal = removable(self.dependencies, self.original)
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
        choices = Choices(self._changed(small, gone))
        for _ in range(RUNS):
            sizes = {**norms, **choices.apply()}
            outcome = self._try(small, features)
            if not outcome.reason:
                shifts = {n: slicing.selected(s, kept.get(n, (None,))) for n, s in shifts.items()}
                return Smaller(small, removal, kept, features, sizes, outcome.multiply_adds, shifts)
            if not choices.advance(outcome.suspects):
                break
        self._give_back(small, outcome.suspects, outcome.reason, outcome.failed, gone)
        return None

    def _try(self, small: nn.Module, features: Tensor | None) -> _Outcome:
        """Compare a smaller model with the original."""
        with Watch(small) as watch:
            try:
                got, number = counting.counted(small, _narrowed(self.example, features))
                given, text = self.example, verification.difference(self.expected, got, self.tolerance)
                for probe, expected in [] if text else self._fresh():
                    got = verification.run(small, _narrowed(probe, features))
                    given, text = probe, verification.difference(expected, got, self.tolerance)
                    if text:
                        break
            except Exception as error:  # of the code of the model, which does not run with these sizes
                return _Outcome(f"{type(error).__name__}: {first_line(error)}", watch.suspects(), failed=True)
        if text:
            return _Outcome(text, self._differing(small, given, features) or watch.suspects())
        return _Outcome(multiply_adds=number)

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

    def _changed(self, small: nn.Module, gone: np.ndarray) -> list[Changed]:
        """The modules of the smaller model in whose code sizes change."""
        modules = dict(small.named_modules(remove_duplicate=False))
        found: dict[str, Changed] = {}
        for view in self.dependencies.views:
            module = modules.get(view.module)
            if module is None or (isinstance(module, torch.fx.GraphModule) and _is_attention(self.original, view.module)):
                continue
            for old, new in zip(view.sizes, view.resized(gone)):
                if old != new:
                    item = found.setdefault(view.module, Changed(view.module, module))
                    numbers = item.sizes.setdefault(old, [])
                    if new not in numbers:
                        numbers.append(new)
        return list(found.values())

    def _differing(self, small: nn.Module, given: Arguments, features: Tensor | None) -> list[nn.Module]:
        """The first module of the smaller model whose output differs, and those that contain it, innermost first."""
        modules = dict(small.named_modules())
        try:
            want, got = _outputs(self.original, given), _outputs(small, _narrowed(given, features))
        except Exception:  # of a layer of torch that behaves otherwise with hooks
            return []
        for name, outputs in got.items():
            expected = want.get(name, [])
            same = [t.shape for t in expected] == [t.shape for t in outputs]
            if same and verification.difference(expected, outputs, self.tolerance):
                parts = name.split(".") if name else []
                return [modules[".".join(parts[:n])] for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in modules]
        return []

    def _give_back(self, small: nn.Module, suspects: list[nn.Module], reason: str, failed: bool, gone: np.ndarray) -> None:
        """Keep units from now on: those whose sizes are in the code of a suspect, else those in its tensors, else all.

        failed: the model did not run, so that the code of a module with a size that changes is the likely cause.
        """
        names = {id(module): name for name, module in small.named_modules()}
        removed = set(gone.tolist())
        paths = [names[id(module)] for module in dict.fromkeys(suspects) if id(module) in names]
        for path in paths if failed else ():
            found = self._written(type(self.original.get_submodule(path)), gone)
            if found:
                self._keep(found)
                return
        for path in paths:
            inside = [a for n, arrays in self.dependencies.places.items() if n.startswith(f"{path}.".lstrip(".")) for a in arrays]
            units = {int(u) for array in inside if array is not None for u in np.unique(array)}
            units = (units | set(self._written(type(self.original.get_submodule(path)), gone))) & removed
            if units:
                self._keep(dict.fromkeys(units, f"{path or 'the model'}: {reason}"))
                return
        self._keep(dict.fromkeys(removed, reason))

    def _written(self, kind: type[nn.Module], gone: np.ndarray) -> dict[int, str]:
        """The units that a size in the code of a class depends on."""
        out: dict[int, str] = {}
        modules = dict(self.original.named_modules(remove_duplicate=False))
        for view in self.dependencies.views:
            if type(modules.get(view.module)) is not kind:
                continue
            for dimension, (old, new) in enumerate(zip(view.sizes, view.resized(gone))):
                for dimensions, units in view.blocks if old != new else ():
                    if dimension in dimensions:
                        reason = f"the size {old} is written in the code of {kind.__name__}.forward"
                        out |= dict.fromkeys(np.unique(units[np.isin(units, gone)]).tolist(), reason)
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
    """A copy in eval mode; tensors that autograd computed, which cannot be copied, become constants."""
    held = tree_leaves([list(vars(module).values()) for module in model.modules()])
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in held if isinstance(x, Tensor) and not x.is_leaf}
    return copy.deepcopy(getattr(model, "_orig_mod", model), memo).eval()
