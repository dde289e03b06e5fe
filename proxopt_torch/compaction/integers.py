"""Sizes that the code of a model reads from attributes: found by value, and set where the smaller model needs other ones.

A forward pass such as ``x.view(n, self.heads, -1)`` depends on an integer that no tensor determines. The analysis records which
sizes of views change and in the code of which module. Integers of that module with the old value are candidates. Modules of one
class share their code, so that the same attributes are set in all of them. The sets of candidates are tried in the order of their
size, by running the model on the example.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Path: TypeAlias = tuple[Any, ...]
"""Where a module holds an integer: the name of an attribute, then members of tuples, dicts and configuration objects."""

Option: TypeAlias = tuple[Path, int]
"""A path, and which of the new sizes of the value it takes, if several dimensions of this size became different ones."""

MOST_SETS = 64
"""Of attributes that are tried for one class."""

OWN = set(nn.Module().__dict__) | {"training"}


@dataclass
class Changed:
    """A module in whose code sizes change. sizes: the old sizes and the new ones of each."""

    path: str
    module: nn.Module
    sizes: dict[int, list[int]] = field(default_factory=dict)


def integers(holder: Any, depth: int = 3) -> Iterator[tuple[Path, int]]:
    """The integers of an object, with their places."""
    if isinstance(holder, (nn.Module, Tensor, type, torch.dtype, torch.device)) and depth < 3:
        return
    if isinstance(holder, dict):
        members = list(holder.items())
    elif isinstance(holder, (tuple, list)):
        members = list(enumerate(holder))
    elif (hasattr(holder, "__dict__") and not callable(holder)) or isinstance(holder, nn.Module):
        members = [(k, v) for k, v in vars(holder).items() if not (isinstance(holder, nn.Module) and k in OWN)]
    else:
        return
    for key, value in members:
        if isinstance(value, int) and not isinstance(value, bool):
            yield (key,), value
        elif depth and not isinstance(value, (str, bytes)):
            yield from (((key, *path), number) for path, number in integers(value, depth - 1))


def changed_copy(holder: Any, path: Path, number: int) -> Any:
    """A copy of a container or configuration with another integer; what it shares with others is not changed."""
    if not path:
        return number
    key, rest = path[0], path[1:]
    if isinstance(holder, dict):
        new = copy.copy(holder)
        new[key] = changed_copy(holder[key], rest, number)
        return new
    if isinstance(holder, (tuple, list)):
        members = list(holder)
        members[key] = changed_copy(members[key], rest, number)
        if hasattr(holder, "_fields"):
            return type(holder)(*members)
        return type(holder)(members)
    other = copy.copy(holder)
    object.__setattr__(other, key, changed_copy(getattr(holder, key), rest, number))  # works for frozen dataclasses too
    return other


def assign(module: nn.Module, path: Path, number: int) -> None:
    """Set an integer of a module, in copies of the objects that hold it."""
    module.__dict__[path[0]] = changed_copy(module.__dict__[path[0]], path[1:], number)


def located(model: nn.Module, sizes: dict[str, int]) -> list[tuple[nn.Module, Path, int]]:
    """Where a model holds integers that are given by the path of a module and the attribute, as ``Choices.apply`` returns them.

    Raises:
      ValueError: the model has no such integer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    out: list[tuple[nn.Module, Path, int]] = []
    for name, number in sizes.items():
        parts = name.split(".")
        length = next(n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in modules)
        module = modules[".".join(parts[:length])]
        path = next((path for path, _ in integers(module) if list(map(str, path)) == parts[length:]), None)
        if path is None:
            raise ValueError(f"sizes must name integers that modules of the model hold, got {name!r}")
        out.append((module, path, number))
    return out


class Choices:
    """Which attributes to set in each class of modules, and the sets that were not tried yet."""

    def __init__(self, changed: list[Changed]) -> None:
        self.members: dict[type, list[Changed]] = {}
        for item in changed:
            self.members.setdefault(type(item.module), []).append(item)
        self._left = {kind: _subsets(items) for kind, items in self.members.items()}
        self.chosen: dict[type, tuple[Option, ...]] = {kind: next(sets) for kind, sets in self._left.items()}
        self._held: list[tuple[nn.Module, str, Any]] = []  # what was there before

    def apply(self) -> dict[str, int]:
        """Set the chosen attributes, and return the new values by the path of the module and the attribute."""
        for module, name, value in reversed(self._held):
            module.__dict__[name] = value
        self._held = []
        out: dict[str, int] = {}
        for kind, items in self.members.items():
            for item in items:
                held = dict(integers(item.module))
                for path, index in self.chosen[kind]:
                    new = item.sizes[held[path]]
                    number = new[min(index, len(new) - 1)]
                    self._held.append((item.module, path[0], item.module.__dict__[path[0]]))
                    assign(item.module, path, number)
                    out[".".join(map(str, (*([item.path] if item.path else []), *path)))] = number
        return out

    def advance(self, modules: list[nn.Module]) -> bool:
        """Take the next set of attributes for the first of these modules in whose code sizes change; False if none is left."""
        kind = next((type(module) for module in modules if type(module) in self._left), None)
        following = next(self._left[kind], None) if kind is not None else None
        if kind is None or following is None:
            return False
        self.chosen[kind] = following
        return True


def _subsets(items: list[Changed]) -> Iterator[tuple[Option, ...]]:
    """Sets of attributes that hold, in all modules of a class, an old size whose new one differs: small sets first."""
    common: set[Path] | None = None
    variants: dict[Path, int] = {}
    for item in items:
        own = {path: len(item.sizes[number]) for path, number in integers(item.module) if number in item.sizes}
        common = set(own) if common is None else common & set(own)
        for path, count in own.items():
            variants[path] = max(variants.get(path, 1), count)
    options = [(path, index) for path in sorted(common or (), key=str) for index in range(variants[path])]
    sets = (
        chosen
        for size in range(len(options) + 1)
        for chosen in itertools.combinations(options, size)
        if len({path for path, _ in chosen}) == size
    )
    return itertools.islice(sets, MOST_SETS)


class Watch:
    """Hooks that record which modules were running when a forward pass failed, and which had finished before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.running: list[nn.Module] = []
        self.finished: list[nn.Module] = []

    def __enter__(self) -> Watch:
        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self.running:
                self.running.pop()
            self.finished.append(module)

        self._hooks = [
            h for m in self.model.modules() for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
        ]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def suspects(self) -> list[nn.Module]:
        """The modules whose code may be the cause, most likely first.

        That is the innermost that was running, then for each module around it what finished last inside of it, and itself.
        """
        order = dict.fromkeys(self.running[-1:])
        for module in reversed(self.running[:-1]):
            inside = set(module.modules())
            order |= dict.fromkeys(m for m in reversed(self.finished) if m in inside)
            order |= {module: None}
        return list(order | dict.fromkeys(reversed(self.finished)))
