"""Models inside the wrappers of ``torch.compile`` and of data parallel training, and the names that the wrappers give."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

COMPILED = "_orig_mod"
"""The name under which a compiled module, or a compiled part of one, holds the original."""

PARALLEL = "module"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile`` and of data parallel training."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def holds(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether one of the wrappers around a model is of this type."""
    while not isinstance(model, kind):
        inside = _inside(model)
        if inside is None:
            return False
        model = inside
    return True


def renamed(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """The names of tensors or attributes, with or without those of wrappers, and what each of them is called in ``model``.

    model: a model that is in no wrapper itself; parts of it may be compiled.
    """
    # of a compiled part and its original the original comes last
    own = {_bare(path): (path, module) for path, module in model.named_modules(remove_duplicate=False)}
    options = [{name: _bare(name) for name in names}]
    while options[-1] and all(name.startswith(f"{PARALLEL}.") for name in options[-1].values()):
        options.append({name: found.removeprefix(f"{PARALLEL}.") for name, found in options[-1].items()})

    def placed(name: str) -> tuple[str, bool]:
        parts = name.split(".")
        length = next(n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in own)
        path, module = own[".".join(parts[:length])]
        known = parts[length] in {*vars(module), *module._parameters, *module._buffers}
        return ".".join([path, *parts[length:]]).lstrip("."), known

    # a model may itself have a part with the name "module"
    best = max(options, key=lambda option: sum(placed(found)[1] for found in option.values()))
    return {name: placed(found)[0] for name, found in best.items()}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _inside(model: nn.Module) -> nn.Module | None:
    inside = getattr(model, COMPILED, None)
    if inside is None and isinstance(model, (DataParallel, DistributedDataParallel)):
        inside = model.module
    return inside if isinstance(inside, nn.Module) else None
