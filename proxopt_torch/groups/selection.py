"""Which modules of a model a pattern or a type selects, and which of their tensors are parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Selection: TypeAlias = str | type[nn.Module] | Iterable[str | type[nn.Module]] | None

PRUNED = "masked by pruning"
SHOWN = 12  # so many names of modules are listed in an error message


def select(model: nn.Module, kinds: tuple[type[nn.Module], ...], include: Selection, exclude: Selection) -> dict[str, Any]:
    """The modules of the given classes that are included and not excluded, by name, in the order of the model."""
    everything = dict(model.named_modules())
    found = {name: m for name, m in everything.items() if isinstance(m, kinds) and (name or kinds != (nn.Module,))}
    chosen: dict[str, Any] = {}
    if found:
        wanted = matching(found, include, "include", everything) if include is not None else set(found)
        unwanted = matching(found, exclude, "exclude", everything) if exclude is not None else set()
        chosen = {name: m for name, m in found.items() if name in wanted - unwanted}
    if not chosen:
        names = "submodule" if kinds == (nn.Module,) else " or ".join(k.__name__ for k in kinds)
        quantized = any("quantized" in type(m).__module__ for m in everything.values())
        hint = "; a quantized layer holds no parameters, build the groups before the model is quantized" if quantized else ""
        raise ValueError(f"model must hold a {names} to penalise, got none in {type(model).__name__}{hint}")
    return chosen


def matching(found: Mapping[str, Any], selection: Selection, argument: str, everything: Mapping[str, nn.Module]) -> set[str]:
    """Names in ``found`` that a selection matches; raises, with suggestions, for a part of it that matches none."""
    chosen: set[str] = set()
    for item in items(selection, argument):
        matches = {n for n, m in found.items() if (fnmatch(n, item) if isinstance(item, str) else isinstance(m, item))}
        if not matches:
            close = get_close_matches(item, found, n=3, cutoff=0.4) if isinstance(item, str) else []
            present = ", ".join(map(repr, list(found)[:SHOWN])) + (
                f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            )
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else f"; there are {present}"
            if isinstance(item, str) and item in everything:
                kind = type(everything[item])
                hint = f", a {kind.__module__}.{kind.__qualname__}; there are {present}"
            raise ValueError(f"{argument} must name layers of the model, got {item!r}{hint}")
        chosen |= matches
    return chosen


def items(selection: Selection, argument: str) -> list[str | type[nn.Module]]:
    """The patterns and types of a selection."""
    if selection is None:
        return []
    several = isinstance(selection, Iterable) and not isinstance(selection, (str, type, nn.Module))
    found: list[Any] = list(selection) if several else [selection]  # type: ignore[arg-type]
    wrong = next((item for item in found if not isinstance(item, (str, type))), None)
    if wrong is not None:
        raise TypeError(f"{argument} must be names and types of layers, got {wrong!r}")
    return found


def parameter(model: nn.Module, module: nn.Module, key: str) -> str:
    """The full name of a parameter of one module of the model; raises where it is no parameter, or has no shape yet."""
    place = next(name for name, m in model.named_modules() if m is module)
    full, p = f"{place}.{key}".lstrip("."), module._parameters.get(key)
    if isinstance(p, nn.UninitializedParameter):
        raise ValueError(f"{full} must have a shape, but is of a lazy layer: run one forward pass of the model first")
    if p is not None:
        return name(model, p)
    if key in computed(module):
        reason, remedy = computed(module)[key]
        raise ValueError(f"{full} must be a parameter, but is {reason}: leave this layer out, or call {remedy} first")
    kind = "a buffer" if key in module._buffers else "a plain tensor" if getattr(module, key, None) is not None else "missing"
    raise ValueError(f"{full} must be a parameter, but is {kind}: leave this layer out, or assign an nn.Parameter")


def computed(module: nn.Module) -> dict[str, tuple[str, str]]:
    """The tensors that a module computes in its forward pass: the reason, and the function that makes them parameters again."""
    out = {}
    if parametrize.is_parametrized(module):
        remedy = "torch.nn.utils.parametrize.remove_parametrizations"
        for key, chain in dict(module.parametrizations).items():  # type: ignore[arg-type]
            out[key] = (f"computed by a parametrization ({', '.join(type(f).__name__ for f in chain)})", remedy)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            out[hook.name] = ("computed by weight_norm", "torch.nn.utils.remove_weight_norm")
        elif isinstance(hook, SpectralNorm):
            out[hook.name] = ("computed by spectral_norm", "torch.nn.utils.remove_spectral_norm")
        elif isinstance(hook, BasePruningMethod):
            out[hook._tensor_name] = (PRUNED, "torch.nn.utils.prune.remove")
    return out


def name(model: nn.Module, p: Tensor) -> str:
    """The first name of a parameter."""
    return next(name for name, q in model.named_parameters(remove_duplicate=False) if q is p)
