"""``compact``: the loop of analysis, surgery and verification."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from proxopt_torch.compaction import attention, counting, layers, loading, result, slicing, verification
from proxopt_torch.compaction.integers import Changed, Choices, Watch
from proxopt_torch.compaction.result import Compacted
from proxopt_torch.compaction.slicing import Kept
from proxopt_torch.compaction.verification import Arguments
from proxopt_torch.dependencies import Dependencies, Family, NotTraceable, Removal, analyse, removable

Selection: TypeAlias = str | type[nn.Module] | Iterable[str | type[nn.Module]]

ATTEMPTS = 12
"""Sets of units that are tried before the model is returned unchanged."""

RUNS = 40
"""Passes on the example, most of which fail early, in the search for the sizes that code reads from attributes."""


def compact(
    model: nn.Module,
    example_inputs: Any,
    *,
    inputs: bool = False,
    tolerance: float = 1e-4,
    exclude: Selection = (),
) -> Compacted:
    r"""Remove zeroed channels, attention heads and hidden units from a copy of ``model``, which computes the same in eval mode.

    A *unit* is everything that can only be removed together: the rows and columns of all layers that share a channel (residual
    connections, depthwise convolutions, flattened feature maps), with norms and biases; the query, key, value and output
    projections of an attention head, with all queries of its group where these share keys; both sides of a hidden unit. It is
    removed if

    - nothing reads it: all weights that have it as input are exactly zero; or
    - nothing computes it: all weights that have it as output are exactly zero, so that it is a constant :math:`c`. The layers
      that read it get the constant as bias, :math:`b \leftarrow b + c\, w` for its column w. Where this is impossible (a
      convolution with zero padding that reads a nonzero constant) the unit stays.

    This is repeated until nothing changes. Each layer keeps at least one channel, head or unit. What a unit is follows from the
    graph of operators of ``torch.export``; operators without a rule keep what they read. The result consists of the classes of
    ``model`` with smaller tensors, but for ``nn.MultiheadAttention``, which becomes a ``torch.fx.GraphModule`` with the same
    parameters. It loads without this package, by pickle or by ``load_compact``.

    The outputs of the two models are compared on the example and on random inputs of the same ranges with other batch sizes.
    Units whose removal would change them, or let the model fail, stay: ``Compacted.kept`` has the reasons. A model that
    ``torch.export`` cannot trace is returned unchanged.

    Args:
      model: a network with sparse weights (after ``optimizer.eval()``); it is not changed.
      example_inputs: the arguments of ``model(...)``: a tensor, a tuple of arguments, or a dict of keyword arguments.
      inputs: also remove input features that no first Linear layer reads. ``Compacted.inputs`` holds the indices of the others;
        the result takes ``x.flatten(1)[:, inputs]``.
      tolerance: largest difference of the outputs that counts as rounding, relative to the largest output.
      exclude: layers that are not cut, by name (patterns such as ``"encoder.*"``) or type.

    Raises:
      ValueError: ``inputs=True`` and something other than a Linear layer reads the input; a part of ``exclude`` that matches no
        module; ``tolerance`` is no number >= 0.

    >>> import torch
    >>> from proxopt_torch import compact
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight[2:].zero_(), net[0].weight[:, 1].zero_()
    >>> small = compact(net, torch.randn(3, 4), inputs=True)
    >>> small.model[0], small.inputs.tolist()
    (Linear(in_features=3, out_features=2, bias=True), [0, 2, 3])
    >>> print(small)
    name  kind          removed  kept because
    0     hidden units  6
    parameters: 58 -> 14 (75.9 % fewer)
    multiply-adds: 144 -> 30 (79.2 % fewer)
    inputs: 3 features are read
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number >= 0, got {tolerance!r}")
    excluded = _excluded(model, exclude)
    given = verification.arguments(example_inputs)
    original = _copy(model)
    expected, before = counting.counted(original, given)
    try:
        dependencies = analyse(original, *given, inputs=inputs)
    except Exception as error:  # also one that the analysis does not foresee: the model runs, so that there is a result
        reason = str(error) if isinstance(error, NotTraceable) else f"{type(error).__name__}: {_first_line(error)}"
        return _unchanged(model, original, given, before, inputs, {"": reason})
    if inputs:
        _check_inputs(dependencies, original, given)
    for unit, reason in _pinned(dependencies, excluded).items():
        dependencies.kept.setdefault(unit, reason)
    surgery = _Surgery(original, given, dependencies, expected, tolerance, inputs)
    for _ in range(ATTEMPTS):
        small = surgery.attempt()
        if small is not None:
            return _result(model, surgery, small, before)
    return _unchanged(model, original, given, before, inputs, {"": "no smaller model was found that computes the same"})


@dataclass
class _Small:
    """A smaller model that computes the same, and how it was made."""

    model: nn.Module
    removal: Removal
    kept: dict[str, Kept]
    inputs: Tensor | None
    sizes: dict[str, int]
    multiply_adds: int | None
    shifts: dict[str, Tensor]


@dataclass
class _Surgery:
    """The model, what is known of it, and the inputs on which it is compared with smaller ones."""

    original: nn.Module
    example: Arguments
    dependencies: Dependencies
    expected: list[Tensor]
    tolerance: float
    with_inputs: bool
    given_back: dict[int, str] = field(default_factory=dict)
    _probes: list[tuple[Arguments, list[Tensor]]] | None = None

    def attempt(self) -> _Small | None:
        """The model without all units that can be removed, or None after units of it were found that must stay."""
        removal = removable(self.dependencies, self.original)
        gone = np.asarray(sorted(removal.units), dtype=np.int64)
        kept = _kept(self.dependencies, gone)
        features = self._features(gone)
        small = _copy(self.original)
        shifts = {_bias(small, name): shift for name, shift in removal.shifts.items()}
        for name, shift in removal.shifts.items():
            slicing.add_to_bias(small, name, shift)
        # a bias that is new has the rows of its layer
        rows = {b: (kept[f"{n}.weight"][0],) for n, b in zip(removal.shifts, shifts) if b not in kept and f"{n}.weight" in kept}
        slicing.cut(small, {**kept, **rows})
        small = layers.refresh(small)
        norms = self._resize_norms(small, gone)
        choices = Choices(self._changed(small, gone))
        for _ in range(RUNS):
            sizes = {**norms, **choices.apply()}
            suspects, reason, number = self._try(small, features)
            if not reason:
                shifts = {n: slicing.selected(s, {**kept, **rows}.get(n, (None,))) for n, s in shifts.items()}
                return _Small(small, removal, kept, features, sizes, number, shifts)
            if not choices.advance(suspects):
                break
        self._give_back(small, suspects, reason, gone)
        return None

    def _try(self, small: nn.Module, features: Tensor | None) -> tuple[list[nn.Module], str, int | None]:
        """Compare a smaller model with the original: modules that may be the cause of a difference, and which it is."""
        number: int | None = None
        with Watch(small) as watch:
            try:
                got, number = counting.counted(small, _narrowed(self.example, features))
                text = verification.difference(self.expected, got, self.tolerance)
                failing = self.example
                for probe, expected in [] if text else self._fresh():
                    text = verification.difference(expected, verification.run(small, _narrowed(probe, features)), self.tolerance)
                    failing = probe
                    if text:
                        break
            except Exception as error:  # of the code of the model, which does not run with these sizes
                return watch.suspects(), f"{type(error).__name__}: {_first_line(error)}", None
        if text:
            return self._differing(small, failing, features) or watch.suspects(), text, None
        return [], "", number

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
        want = _outputs(self.original, given)
        modules = dict(small.named_modules())
        for name, outputs in _outputs(small, _narrowed(given, features)).items():
            expected = want.get(name, [])
            same = [t.shape for t in expected] == [t.shape for t in outputs]
            if same and verification.difference(expected, outputs, self.tolerance):
                parts = name.split(".") if name else []
                return [modules[".".join(parts[:n])] for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in modules]
        return []

    def _give_back(self, small: nn.Module, suspects: list[nn.Module], reason: str, gone: np.ndarray) -> None:
        """Keep units from now on: those whose sizes are in the code of a suspect, else those in its tensors, else all."""
        names = {id(module): name for name, module in small.named_modules()}
        removed = set(gone.tolist())
        for module in dict.fromkeys(suspects):
            kind = type(self.original.get_submodule(names.get(id(module), "")))
            found = self._written(kind, small, gone)
            if found:
                self._keep(found)
                return
        for module in dict.fromkeys(suspects):
            name = names.get(id(module), "")
            prefix = f"{name}." if name else ""
            inside = [units for n, places in self.dependencies.places.items() if n.startswith(prefix) for units in places]
            units = {int(u) for array in inside if array is not None for u in np.unique(array)} & removed
            if units:
                self._keep(dict.fromkeys(units, f"{name or 'the model'}: {reason}"))
                return
        self._keep(dict.fromkeys(removed, reason))

    def _written(self, kind: type[nn.Module], small: nn.Module, gone: np.ndarray) -> dict[int, str]:
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def _copy(model: nn.Module) -> Any:
    """A copy in eval mode; tensors that autograd computed, which cannot be copied, become constants."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(getattr(model, "_orig_mod", model), memo).eval()


def _excluded(model: nn.Module, exclude: Selection) -> dict[str, str]:
    """The names of the modules that are not cut, with everything inside them."""
    items = [exclude] if isinstance(exclude, (str, type)) else list(exclude)
    modules = dict(model.named_modules())
    out: dict[str, str] = {}
    for item in items:
        if not isinstance(item, (str, type)):
            raise ValueError(f"exclude must hold names and types of modules, got {item!r}")
        found = [n for n, m in modules.items() if (fnmatch(n, item) if isinstance(item, str) else isinstance(m, item))]
        if not found:
            close = get_close_matches(item, modules, n=3, cutoff=0.4) if isinstance(item, str) else []
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"exclude must name modules of the model, got {item!r}{hint}")
        out |= {name: f"{name or 'the model'} is excluded" for name in found}
    return out


def _pinned(dependencies: Dependencies, excluded: dict[str, str]) -> dict[int, str]:
    """The units that have a part in an excluded module."""
    out: dict[int, str] = {}
    for name, places in dependencies.places.items():
        reason = next((r for module, r in excluded.items() if not module or name.startswith(f"{module}.")), None)
        for units in places if reason is not None else ():
            if units is not None:
                out |= dict.fromkeys(np.unique(units).tolist(), reason or "")
    return out


def _check_inputs(dependencies: Dependencies, model: nn.Module, given: Arguments) -> None:
    """Raise where single features of the flattened input cannot be left out."""
    args, kwargs = given
    example, units = args[0] if args else next(iter(kwargs.values()), None), dependencies.inputs
    if not isinstance(example, Tensor) or example.ndim < 2 or units is None:
        raise ValueError(f"inputs=True needs a model whose first input is a batch of features, got {_described(example)}")
    ids = np.unique(units)
    if example.ndim == 2 or (len(ids) == len(units) and not any(int(u) in dependencies.kept for u in ids)):
        return
    readers = {
        type(model.get_submodule(name.rpartition(".")[0])).__name__: None
        for name, places in dependencies.places.items()
        for place in places
        if place is not None and np.isin(place, ids).any()
    }
    reasons = {dependencies.kept[int(u)]: None for u in ids if int(u) in dependencies.kept}
    raise ValueError(f"inputs=True needs a model whose input goes to Linear layers only, got {list(readers or reasons)}")


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _result(model: nn.Module, surgery: _Surgery, small: _Small, before: int | None) -> Compacted:
    removed: dict[str, int] = {}
    kept: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    gone = np.asarray(sorted(small.removal.units), dtype=np.int64)
    stay = {**small.removal.kept, **surgery.given_back}
    for family in surgery.dependencies.families:
        units = np.unique(family.units)
        count = _count(surgery.dependencies, family, gone)
        if count and family.kind != "input features":
            removed[family.name] = removed.get(family.name, 0) + count
            kinds[family.name] = family.kind
        for unit in units.tolist():
            if unit in stay:
                kept.setdefault(family.name, []).append(stay[unit])
                kinds.setdefault(family.name, family.kind)
    sizes = {**loading.sizes_of(surgery.original.state_dict()), **small.sizes}  # with those of an earlier ``compact``
    loading.remember_sizes(small.model, sizes)
    return Compacted(
        small.model,
        small.inputs,
        removed,
        {name: _reasons(reasons) for name, reasons in kept.items()},
        (counting.parameters(surgery.original), counting.parameters(small.model)),
        (before, small.multiply_adds) if before is not None and small.multiply_adds is not None else None,
        sizes,
        small.kept,
        small.shifts,
        kinds,
        result.reference(getattr(model, "_orig_mod", model)),
    )


def _count(dependencies: Dependencies, family: Family, gone: np.ndarray) -> int:
    """How many channels, heads or units were removed. The channels of one norm group, which go together, count each."""
    units = family.units[np.isin(family.units, gone)]
    if family.kind != "channels" or not len(units):
        return len(units)
    places = [dependencies.places[name][dimension] for name, dimension in family.places]
    return min(int(np.isin(place, units).sum()) for place in places if place is not None)


def _reasons(reasons: list[str]) -> str:
    """Each reason once, with the number of units where there are several."""
    counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    return "; ".join(f"{reason} ({count} of them)" if count > 1 else reason for reason, count in counts.items())


def _unchanged(
    model: nn.Module, copied: nn.Module, given: Arguments, number: int | None, inputs: bool, kept: dict[str, str]
) -> Compacted:
    """The result where nothing could be removed."""
    count = counting.parameters(copied)
    features = None
    if inputs:
        first = given[0][0] if given[0] else next(iter(given[1].values()))
        features = torch.arange(first[0].numel())
    same = (number, number) if number is not None else None
    return Compacted(
        copied, features, {}, kept, (count, count), same, _original=result.reference(getattr(model, "_orig_mod", model))
    )
