"""Sizes that the code of a model reads from attributes: found by value, and set where the smaller model needs other ones.

A forward pass such as ``x.view(n, self.heads, -1)`` depends on an integer that no tensor determines. The analysis records which
sizes of views change and in the code of which module. Integers of that module with the old value are candidates. Modules of one
class share their code, so that the same attributes are set in all of them. Sets of candidates are tried by running the model on
the example; how far it gets decides which of them are changed further.
"""

from __future__ import annotations

import copy
import heapq
import inspect
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

State: TypeAlias = dict[type | str, tuple[Option, ...]]

Progress: TypeAlias = tuple[int, int]
"""How far a model got: the stage of the comparison, and the number of modules that finished, or that agree, in it."""

Number: TypeAlias = int | tuple[int, ...]
"""A size, or those of all parts of a tensor that is split."""

MOST_SETS = 64
"""Of attributes that are tried for one class."""

OWN = set(nn.Module().__dict__) | {"training"}


@dataclass
class Changed:
    """A module in whose code sizes change. sizes: the old sizes and the new ones of each."""

    path: str
    module: nn.Module
    sizes: dict[Number, list[Number]] = field(default_factory=dict)

    def add(self, old: Number, new: Number) -> None:
        if old != new and new not in self.sizes.setdefault(old, []):
            self.sizes[old].append(new)


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


def numbers(holder: Any) -> dict[Path, Number]:
    """The integers of an object with their places, and its tuples of integers."""
    found: dict[Path, Number] = dict(integers(holder))
    members: dict[Path, list[tuple[Any, int]]] = {}
    for path, number in integers(holder):
        if len(path) > 1 and isinstance(path[-1], int):
            members.setdefault(path[:-1], []).append((path[-1], number))
    for path, entries in members.items():
        if [index for index, _ in entries] == list(range(len(entries))):
            found[path] = tuple(number for _, number in entries)
    return found


def literals(kind: type) -> set[int]:
    """The integers that are written in the methods of a class and of those it inherits from, but for ``nn.Module``."""
    methods = [inspect.unwrap(f) for c in kind.__mro__ if c not in (nn.Module, object) for f in vars(c).values() if callable(f)]
    left: list[Any] = [f.__code__ for f in methods if inspect.isfunction(f)]
    found: set[int] = set()
    while left:
        value = left.pop()
        if isinstance(value, (tuple, frozenset)):
            left += value
        elif inspect.iscode(value):
            left += value.co_consts
        elif isinstance(value, int):
            found.add(int(value))
    return found


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
    """The search for attributes to set in the classes of modules whose sizes change.

    A state is one set of attributes for each class, and other ones for single modules, by their paths. Where a state fails, those
    that differ from it in the set of one class or module are queued. The next state is the one whose predecessor got furthest;
    among these, small sets and the likely classes come first.
    """

    def __init__(self, changed: list[Changed]) -> None:
        self.members: dict[type, list[Changed]] = {}
        for item in changed:
            self.members.setdefault(type(item.module), []).append(item)
        self._sets = {kind: list(_subsets(items)) for kind, items in self.members.items()}
        self._paths = {id(item.module): item.path for item in changed}
        self.chosen: State = dict.fromkeys(self._sets, ())
        self._cost = 0
        self._queue: list[tuple[Progress, int, int, State]] = []
        self._seen = {frozenset(self.chosen.items())}
        self._count = itertools.count()
        self._held: list[tuple[nn.Module, str, Any]] = []  # what was there before

    def apply(self) -> dict[str, int]:
        """Set the chosen attributes, and return the new values by the path of the module and the attribute."""
        for module, name, value in reversed(self._held):
            module.__dict__[name] = value
        self._held = []
        out: dict[str, int] = {}
        for kind, items in self.members.items():
            for item in items:
                held = numbers(item.module)
                for path, index in self.chosen.get(item.path, self.chosen[kind]):
                    new = item.sizes.get(held.get(path, 0), [])
                    if not new:  # of other modules of the class
                        continue
                    value = new[min(index, len(new) - 1)]
                    self._held.append((item.module, path[0], item.module.__dict__[path[0]]))
                    for place, number in _members(path, value):
                        assign(item.module, place, number)
                        out[".".join(map(str, (*([item.path] if item.path else []), *place)))] = number
        return out

    def advance(self, modules: list[nn.Module], progress: Progress = (0, 0)) -> bool:
        """Take the next state after the present one failed; False if none is left.

        modules: whose code may be the cause, most likely first. progress: how far the model got.
        """
        first: dict[type, nn.Module] = {}
        for module in modules:
            if len(self._sets.get(type(module), ())) > 1 and id(module) in self._paths:
                first.setdefault(type(module), module)
        before = (-progress[0], -progress[1])
        for rank, (kind, module) in enumerate(first.items()):
            single = len(self.members[kind]) == 1
            keys: list[tuple[type | str, int]] = [(kind, 0)] if single else [(kind, 0), (self._paths[id(module)], 1)]
            for (key, more), chosen in itertools.product(keys, self._sets[kind]):
                state = {**self.chosen, key: chosen}
                if frozenset(state.items()) not in self._seen:
                    heapq.heappush(self._queue, (before, self._cost + len(chosen) + rank + more, next(self._count), state))
        while self._queue:
            _, self._cost, _, self.chosen = heapq.heappop(self._queue)
            if frozenset(self.chosen.items()) not in self._seen:
                self._seen.add(frozenset(self.chosen.items()))
                return True
        return False


def _members(path: Path, value: Number) -> list[tuple[Path, int]]:
    """The integers to set for the value at a path."""
    return [((*path, i), n) for i, n in enumerate(value)] if isinstance(value, tuple) else [(path, value)]


def _subsets(items: list[Changed]) -> Iterator[tuple[Option, ...]]:
    """Sets of attributes that hold an old size whose new one differs: small sets, and attributes of many modules, first."""
    modules: dict[Path, int] = {}
    variants: dict[Path, int] = {}
    for item in items:
        for path, number in numbers(item.module).items():
            if number in item.sizes:
                modules[path] = modules.get(path, 0) + 1
                variants[path] = max(variants.get(path, 1), len(item.sizes[number]))
    order = sorted(modules, key=lambda path: (-modules[path], str(path)))
    options = [(path, index) for path in order for index in range(variants[path])]
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
