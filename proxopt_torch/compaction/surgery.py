"""``compact``: the loop of analysis, surgery and verification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from proxopt_torch.compaction import counting, loading, reasons, result
from proxopt_torch.compaction.attempts import Attempts, Smaller, copied, first_line
from proxopt_torch.compaction.result import Compacted
from proxopt_torch.dependencies import Arguments, Dependencies, Family, NotTraceable, analyse, arguments, preserved
from proxopt_torch.groups.selection import Selection, matching


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
    ``torch.export`` cannot trace is returned unchanged. An ``nn.TransformerEncoder`` that lost heads uses no nested tensors for
    masks of padding, which only changes the outputs of padded positions; with such a mask in the example it loses no heads.

    Args:
      model: a network with sparse weights (after ``optimizer.eval()``); it is not changed.
      example_inputs: the arguments of ``model(...)``: a tensor, a tuple of arguments, or a dict of keyword arguments.
      inputs: also remove input features that no first Linear layer reads. ``Compacted.inputs`` holds the indices of the others;
        the result takes ``x.flatten(1)[:, inputs]``.
      tolerance: largest difference of the outputs that counts as rounding, relative to the largest output.
      exclude: layers that are not cut, by name (patterns such as ``"encoder.*"``) or type.

    Raises:
      TypeError: ``model`` is no ``nn.Module``.
      ValueError: the model cannot be copied, does not run with ``example_inputs``, or is on the meta device; ``inputs=True`` and
        something other than a Linear layer reads the input; a part of ``exclude`` matches no layer; ``tolerance`` is no number
        >= 0.

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
    _check(model, tolerance)
    modules = dict(model.named_modules())
    excluded = matching(modules, exclude, "exclude", modules)
    with preserved(model):  # hooks of a copy may hold the model itself
        return _compacted(model, example_inputs, inputs, tolerance, excluded)


def _compacted(model: nn.Module, example_inputs: Any, inputs: bool, tolerance: float, excluded: set[str]) -> Compacted:
    given = arguments(example_inputs)
    try:
        original = copied(model)
    except Exception as error:
        raise ValueError(f"model must be one that copy.deepcopy can copy: {type(error).__name__}: {first_line(error)}") from error
    try:
        expected, before = counting.counted(original, given)
    except Exception as error:
        raise not_runnable(example_inputs, error) from error
    try:
        dependencies = analyse(original, *given, inputs=inputs)
    except Exception as error:  # also one that the analysis does not foresee: the model runs, so that there is a result
        reason = str(error) if isinstance(error, NotTraceable) else f"{type(error).__name__}: {first_line(error)}"
        return _unchanged(model, original, given, before, inputs, {"": reason})
    if inputs:
        _check_inputs(dependencies, original, given)
    for unit, reason in _pinned(dependencies, excluded).items():
        dependencies.kept.setdefault(unit, reason)
    attempts = Attempts(original, given, dependencies, expected, tolerance, inputs)
    small = attempts.search()
    if small is not None:
        return _result(model, attempts, small, before)
    return _unchanged(model, original, given, before, inputs, {"": "no smaller model was found that computes the same"})


def _check(model: Any, tolerance: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    without = next((name for name, tensor in tensors if tensor.is_meta), None)
    if without is not None:
        raise ValueError(f"model must hold numbers, got {without} on the meta device")
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"tolerance must be a number >= 0, got {tolerance!r}")


def _pinned(dependencies: Dependencies, excluded: set[str]) -> dict[int, str]:
    """The units that have a part in an excluded module, with the reason."""
    out: dict[int, str] = {}
    for name, places in dependencies.places.items():
        module = min((m for m in excluded if not m or name.startswith(f"{m}.")), default=None)  # the outermost
        for units in places if module is not None else ():
            if units is not None:
                out |= dict.fromkeys(np.unique(units).tolist(), f"{module or 'the model'} is excluded")
    return out


def _check_inputs(dependencies: Dependencies, model: nn.Module, given: Arguments) -> None:
    """Raise where single features of the flattened input cannot be left out."""
    args, kwargs = given
    example, units = args[0] if args else next(iter(kwargs.values()), None), dependencies.inputs
    if not isinstance(example, Tensor) or example.ndim < 2 or units is None:
        raise ValueError(f"inputs=True needs a model whose first input is a batch of features, got {described(example)}")
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


def not_runnable(example_inputs: Any, error: Exception) -> ValueError:
    """The error for an example with which a model does not run."""
    return ValueError(
        "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments with which the model runs, got "
        f"{described(example_inputs)}: {type(error).__name__}: {first_line(error)}"
    )


def described(value: Any) -> str:
    """The shape of a tensor, or the type of anything else."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _result(model: nn.Module, attempts: Attempts, small: Smaller, before: int | None) -> Compacted:
    removed: dict[str, int] = {}
    kept: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    gone = np.asarray(sorted(small.removal.units), dtype=np.int64)
    zeroed = reasons.of_zeroed_units(attempts.dependencies, attempts.original, gone)
    stay = {**zeroed, **small.removal.kept, **attempts.given_back}
    for family in attempts.dependencies.families:
        units = np.unique(family.units)
        count = _count(attempts.dependencies, family, gone)
        if count and family.kind != "input features":
            removed[family.name] = removed.get(family.name, 0) + count
            kinds[family.name] = family.kind
        for unit in units.tolist():
            if unit in stay:
                kept.setdefault(family.name, []).append(stay[unit])
                kinds.setdefault(family.name, family.kind)
    sizes = {**loading.sizes_of(attempts.original.state_dict()), **small.sizes}  # with those of an earlier ``compact``
    loading.remember_sizes(small.model, sizes)
    return Compacted(
        small.model,
        small.inputs,
        removed,
        {name: reasons.joined(texts) for name, texts in kept.items()},
        (counting.parameters(attempts.original), counting.parameters(small.model)),
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
