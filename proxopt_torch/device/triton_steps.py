"""Steps of the optimizers by Triton kernels: one launch for all groups of a kind, without a synchronisation of host and device.

**Not yet measured.** The kernels were tested in Triton's interpreter on a CPU, and compiled for compute capability 9.0, but they
have not run on a device. They are therefore off until they are switched on, by the environment variable ``PROXOPT_TRITON=1`` or

>>> from proxopt_torch.device import triton_steps
>>> with triton_steps.enabled():
...     pass  # optimizer.step()

They take dense CUDA parameters in float32, bfloat16 or float16 (with states in float32) whose penalty is None or declares a
``Shrinkage`` with strengths that are numbers or tensors without axes, with any groups and metric, in joint groups too. Groups of
more than ``layout.MOST_ENTRIES`` entries or ``layout.MOST_PIECES`` pieces, and everything else, take the step that they take
without the kernels.

With ``capturable=True`` the step may be captured in a CUDA graph. As with ``torch.optim``, a graph repeats the numbers at its
capture; a learning rate or strength that is a tensor on the device is read at each replay. The first step, which compiles and
creates the tables, must be an eager one.

With the environment variable ``TRITON_INTERPRET=1`` parameters on the CPU are taken too.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from proxopt import ProxOperator, Shrinkage
from proxopt._arrays import is_number
from proxopt.penalties import declared
from proxopt_torch import param_groups
from proxopt_torch.device import tables
from proxopt_torch.device.layout import CHUNK, Layout, Pieces, layout
from proxopt_torch.param_groups import Entry, ParamGroup, State

if TYPE_CHECKING:
    from proxopt_torch.base import ProximalOptimizer

calls: Counter[str] = Counter()
"""The number of launches by method: it shows whether the kernels ran."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 128, 256, 512, 1024, 2048, 4096, 8192)  # entries of a group that stay in registers
PASS = 4096  # entries that a program reads at once of a larger group
SIDE_BY_SIDE = 8  # strided groups of one program: 8 neighbours fill the 32 bytes that a device reads at once
ENTRIES = 8  # of a thread
REGISTERS = {"contiguous": 64, "strided": 128, "strided runs": 128}  # of a thread: the most that spill next to nothing
ALIGN = 16  # bytes: Triton compiles another kernel for an address that is not a multiple of 16

_switch = os.environ.get("PROXOPT_TRITON", "0") not in ("", "0")


@contextmanager
def enabled(on: bool = True) -> Iterator[None]:
    """A with block in which the kernels are on, or with ``enabled(False)`` off."""
    global _switch
    before, _switch = _switch, on
    try:
        yield
    finally:
        _switch = before


@cache
def _available() -> bool:
    """Whether Triton is installed, as it is with the CUDA builds of torch."""
    return importlib.util.find_spec("triton") is not None


class Part(NamedTuple):
    """What a step does in one param group: its penalty, and the entries that the kernels update."""

    group: ParamGroup
    penalty: ProxOperator | None
    entries: list[Entry]


class Planned(NamedTuple):
    """The same, with the form of the penalty when it was planned and the layout of each entry."""

    group: ParamGroup
    form: Shrinkage | None
    entries: list[Entry]
    layouts: list[Layout]


Kind: TypeAlias = tuple[str, str, str, torch.dtype, int]  # method, metric, layout, dtype, BLOCK or 0 for several passes


def split(
    optimizer: ProximalOptimizer, group: ParamGroup, penalty: ProxOperator | None, present: list[Entry]
) -> tuple[list[Entry], list[Entry]]:
    """Divide the entries of a group that have gradients into those that the kernels update and the others."""
    kernel = optimizer._device_method
    if not _switch or kernel is None or not _available() or group["differentiable"] or torch.compiler.is_compiling():
        return [], present
    if not present or not tables.numeric(kernel, group) or not _one_number(group["lr"]):
        return [], present
    form = _form(optimizer, penalty)
    if penalty is not None and (form is None or not (_one_number(form.l1) and _one_number(form.l2))):
        return [], present
    cached = optimizer.__dict__.setdefault("_device_splits", {})
    key = (
        *_structure(group),
        form is None or form.l2 is None,
        [(id(p), p.dtype, p.device, p.stride(), type(p.grad), _dtype(p.grad)) for entry in present for p in entry],
    )
    found = cached.get(id(group))
    if found is None or found[0] != key:
        layouts = [layout(form, entry) if _fits(entry) else None for entry in present]
        taken = [entry for entry, own in zip(present, layouts) if own is not None]
        rest = [entry for entry, own in zip(present, layouts) if own is None]
        # parameters and penalty are kept, because the key holds ids
        found = cached[id(group)] = (key, taken, rest, [own for own in layouts if own is not None], present, group["penalty"])
    return found[1], found[2]


def step(optimizer: ProximalOptimizer, parts: Sequence[Part]) -> None:
    """Update all parameters of these param groups."""
    known, plans = optimizer.__dict__.get("_device_plans", ([], []))
    # `split` returns the same list of entries as long as nothing but numbers has changed
    if len(known) != len(parts) or any(a.group is not b.group or a.entries is not b.entries for a, b in zip(known, parts)):
        plans = [Plan(optimizer, own, *place) for place, own in _by_place(optimizer, parts).items()]
        optimizer.__dict__["_device_plans"] = (list(parts), plans)
    penalties = {id(group): penalty for group, penalty, _ in parts}
    for plan in plans:
        plan.step(penalties)


def _by_place(optimizer: ProximalOptimizer, parts: Sequence[Part]) -> dict[tuple[torch.device, bool], list[Planned]]:
    """Entries with their layouts, by the device of the parameters and by where the step count is."""
    places: dict[tuple[torch.device, bool], list[Planned]] = {}
    for group, penalty, entries in parts:
        layouts = optimizer.__dict__["_device_splits"][id(group)][3]
        for device in dict.fromkeys(entry[0].device for entry in entries):
            own = [(entry, found) for entry, found in zip(entries, layouts) if entry[0].device == device]
            place = places.setdefault((device, group["capturable"]), [])
            place.append(Planned(group, _form(optimizer, penalty), [entry for entry, _ in own], [found for _, found in own]))
    return places


def _form(optimizer: ProximalOptimizer, penalty: ProxOperator | None) -> Shrinkage | None:
    if penalty is None:
        return None
    return declared.shrinkage(declared.with_metric(penalty, optimizer.metric or "exact"))


def _dtype(grad: Tensor | None) -> torch.dtype | None:
    return None if grad is None else grad.dtype


def _one_number(value: Any) -> bool:
    return value is None or is_number(value) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())


def _fits(entry: Entry) -> bool:
    """Whether all parameters of an entry are dense tensors of one dtype on one device that the kernels run on."""
    from proxopt_torch.kernels import is_dense

    first = entry[0]
    if first.dtype not in DTYPES or not (first.is_cuda or (first.device.type == "cpu" and _interpreted())):
        return False
    for p in entry:
        if type(p) not in (Tensor, torch.nn.Parameter) or p.dtype != first.dtype or p.device != first.device:
            return False
        if type(p.grad) is not Tensor or p.grad.dtype != p.dtype or p.layout != torch.strided or p.numel() == 0:
            return False
        if not is_dense(p):
            return False
    return True


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _structure(group: ParamGroup) -> tuple[Any, ...]:
    """A key that changes with the groups, weights and metric of the penalty, but not with its strength."""
    return (*param_groups.fingerprint(group)[:-1], group["joint"], group["capturable"], group.get("tau") is None)


@dataclass
class Launch:
    """The groups of one kind, as arguments of the kernel."""

    kind: Kind
    groups: int
    tables: list[Tensor]


class Plan:
    """The launches of a step for the parameters on one device, and the tables that they read."""

    def __init__(self, optimizer: ProximalOptimizer, parts: list[Planned], device: torch.device, capturable: bool) -> None:
        self.optimizer, self.parts, self.device, self.capturable = optimizer, parts, device, capturable
        self.entries = [entry for part in parts for entry in part.entries]
        self.params = [p for entry in self.entries for p in entry]
        self.checked: dict[str, list[Tensor | None]] = {}
        self.launches = self._launches()
        sizes = [
            8 * len(self.params) * len(tables.ADDRESSES),
            4 * len(self.parts) * len(tables.PLAIN),
            4 * len(self.entries) * len(tables.COUNTED),
        ]
        self.ends = np.cumsum([-(-size // ALIGN) * ALIGN for size in sizes]).tolist()
        self.host = np.zeros(self.ends[-1], dtype=np.uint8)
        self.table = torch.empty(self.ends[-1], dtype=torch.uint8, device=device)
        self.spare = self._pinned() if capturable else None
        self.captured: list[Any] = []

    # -- tables that stay ---------------------------------------------------------------------

    def _launches(self) -> list[Launch]:
        """Sort the groups of all problems by kind."""
        kinds: dict[Kind, list[tuple[Pieces, dict[str, np.ndarray]]]] = {}
        problem = tensor = 0
        for row, part in enumerate(self.parts):
            method, metric = tables.method(str(self.optimizer._device_method), part.group), self._metric(part.form)
            for entry, found in zip(part.entries, part.layouts):
                for block, order, pieces, numbers in _by_kind(found, CHUNK if metric == "none" else 0):
                    numbers["row"] = np.full_like(numbers["size"], row)
                    numbers["problem"] = np.full_like(numbers["size"], problem)
                    pieces.tensor = pieces.tensor + tensor
                    kinds.setdefault((method, metric, order, entry[0].dtype, block), []).append((pieces, numbers))
                problem += 1
                tensor += len(entry)
        return [self._launch(kind, members) for kind, members in sorted(kinds.items(), key=str)]

    def _metric(self, form: Shrinkage | None) -> str:
        if form is None or form.l2 is None:
            return "none"
        return "one_step" if self.optimizer.metric is None else form.metric or "exact"

    def _launch(self, kind: Kind, members: list[tuple[Pieces, dict[str, np.ndarray]]]) -> Launch:
        numbers = {name: np.concatenate([own[name] for _, own in members]) for name in members[0][1]}
        pieces = Pieces.joined([pieces for pieces, _ in members])
        first = np.concatenate([[0], np.cumsum(numbers["pieces"])])
        small = [first, *(numbers[name] for name in ("size", "row", "problem"))]
        arrays = [a.astype(np.int32) for a in small] + [numbers["weight"].astype(np.float32)]
        arrays += [pieces.tensor.astype(np.int32), pieces.base.astype(np.int64)]
        arrays += [a.astype(np.int32) for a in (pieces.length, pieces.inner, pieces.outer, pieces.stride)]
        return Launch(kind, len(numbers["size"]), [self._uploaded(torch.from_numpy(a)) for a in arrays])

    def _uploaded(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _pinned(self) -> Tensor | None:
        """Memory of the host from which a device copies without making the host wait."""
        return torch.empty(len(self.host), dtype=torch.uint8, pin_memory=True) if self.device.type == "cuda" else None

    # -- a step -------------------------------------------------------------------------------

    def step(self, penalties: dict[int, ProxOperator | None]) -> None:
        """Bring the tables up to date, and launch. penalties: of each param group by its id, with their present strengths."""
        states = self._states()
        grads = self._gradients()
        self._write(0, self._addresses(grads, states), np.int64)
        method = str(self.optimizer._device_method)
        forms = [_form(self.optimizer, penalties[id(part.group)]) for part in self.parts]
        plain = [tables.plain(method, part.group, form) for part, form in zip(self.parts, forms)]
        on_device = [
            (row, column, value)
            for row, values in enumerate(plain)
            for column, value in enumerate(values)
            if isinstance(value, Tensor) and value.device.type != "cpu"
        ]
        for row, column, _ in on_device:
            plain[row][column] = 0.0
        self._write(1, np.array([[float(v) for v in values] for values in plain]), np.float32)
        steps = [state["step"] for state in states]
        first = np.cumsum([0] + [len(entry) for entry in self.entries])[:-1].tolist()
        counts = [steps[i] for i in first]
        if not self.capturable:
            self._write(2, self._counted(np.array([float(c) for c in counts]) + 1, np), np.float32)
        table = self._upload()
        addresses, rows, counted = (table[a:b] for a, b in zip([0, *self.ends], self.ends))
        rows, counted = rows.view(torch.float32), counted.view(torch.float32)
        for row, column, value in on_device:
            rows[row * len(tables.PLAIN) + column].copy_(value)
        if self.capturable:
            found = self._counted(torch.stack(counts).double() + 1, torch)
            counted[: found.numel()].copy_(found.reshape(-1))
        for launch in self.launches:
            _launch(launch, addresses.view(torch.int64), rows, counted, self.device)
        torch._foreach_add_(steps, 1)

    def _states(self) -> list[State]:
        states = [self.optimizer.state[p] for p in self.params]
        if all("step" in state for state in states):
            return states
        return [s for part in self.parts for entry in part.entries for s in self.optimizer._states(part.group, entry)]

    def _gradients(self) -> list[Tensor]:
        from proxopt_torch.kernels import in_layout_of

        grads = []
        for p in self.params:
            assert p.grad is not None
            grads.append(in_layout_of(p.detach(), p.grad))
        return grads

    def _addresses(self, grads: list[Tensor], states: list[State]) -> np.ndarray:
        """The addresses of all tensors; a state that was replaced is brought into the layout and precision of the kernels."""
        from proxopt_torch.kernels import in_layout_of

        out = np.zeros((len(self.params), len(tables.ADDRESSES)), dtype=np.int64)
        out[:, tables.ADDRESSES.index("x")] = [p.data_ptr() for p in self.params]
        out[:, tables.ADDRESSES.index("grad")] = [grad.data_ptr() for grad in grads]
        for name, column in tables.STATES.items():
            values = [state.get(name) for state in states]
            known = self.checked.get(name, [None] * len(values))
            for i, value in enumerate(values):
                if value is not None and value is not known[i]:
                    p = self.params[i].detach()
                    states[i][name] = values[i] = in_layout_of(p, value.to(p.device, torch.float32))
            self.checked[name] = values
            places = [0 if value is None else value.data_ptr() for value in values]
            out[:, tables.ADDRESSES.index(column)] += np.array(places, dtype=np.int64)
        return out

    def _counted(self, counts: Any, xp: Any) -> Any:
        """The columns of ``tables.COUNTED``, a row for each problem."""
        out, start = [], 0
        for part in self.parts:
            out.append(xp.stack(tables.counted(part.group, counts[start : start + len(part.entries)]), -1))
            start += len(part.entries)
        return xp.concatenate(out)

    def _write(self, section: int, values: np.ndarray, dtype: Any) -> None:
        start = self.ends[section - 1] if section else 0
        data = np.ascontiguousarray(values, dtype=dtype).view(np.uint8).reshape(-1)
        self.host[start : start + len(data)] = data

    def _upload(self) -> Tensor:
        """The tables on the device.

        A graph copies from the same memory of the host at each replay. A step that is captured therefore has tables of its own,
        which no later step changes and which live as long as the plan, and the plan as long as the optimizer.
        """
        if self.device.type == "cpu":
            return torch.from_numpy(self.host)
        table = self.table
        if torch.cuda.is_current_stream_capturing():
            pinned, self.spare = self.spare, None
            pinned = self._pinned() if pinned is None else pinned
            table = torch.empty_like(table)
            self.captured.append((pinned, table))
            kept = self.optimizer.__dict__.setdefault("_captured_plans", [])
            if all(plan is not self for plan in kept):
                kept.append(self)
        else:
            pinned = self._pinned()  # torch reuses it only after the copy has ended
            if self.capturable and self.spare is None:
                self.spare = self._pinned()
        assert pinned is not None
        pinned.numpy()[:] = self.host
        return table.copy_(pinned, non_blocking=True)


def _by_kind(found: Layout, least: int) -> Iterator[tuple[int, str, Pieces, dict[str, np.ndarray]]]:
    """The groups of one problem by block (not below ``least``) and layout, with their pieces renumbered and their numbers."""
    pieces, count = found.pieces, len(found.weights)
    sizes = np.bincount(pieces.group, weights=pieces.length, minlength=count).astype(np.int64)
    blocks = np.array([*BLOCKS, 0])[np.searchsorted(BLOCKS, np.maximum(sizes, least))]
    runs = np.bincount(pieces.group, weights=~pieces.contiguous(), minlength=count) == 0
    strided = np.bincount(pieces.group, weights=pieces.inner != 1, minlength=count) == 0
    orders = np.where(runs, 0, np.where(strided, 1, 2))
    for block, order in sorted(set(zip(blocks.tolist(), orders.tolist()))):
        chosen = (blocks == block) & (orders == order)
        number = np.cumsum(chosen) - 1
        own = pieces.selected(np.flatnonzero(chosen[pieces.group]))
        own.group = number[own.group]
        per_group = np.bincount(own.group, minlength=int(chosen.sum()))
        yield (
            block,
            tables.LAYOUTS[order],
            own,
            {"size": sizes[chosen], "pieces": per_group, "weight": found.weights[chosen]},
        )


def options(kind: Kind) -> dict[str, Any]:
    """The constants of the kernel for a kind of groups, and how it is compiled."""
    from proxopt_torch.device.triton_kernels import DTYPES

    method, metric, order, dtype, block = kind
    passes = block == 0
    block = block or PASS
    groups = 1 if passes or order != "strided" else max(1, min(SIDE_BY_SIDE, PASS // block))
    warps = max(1, block * groups // ENTRIES // 32)
    return {
        "METHOD": tables.METHODS.index(method),
        "METRIC": tables.METRICS.index(metric),
        "LAYOUT": tables.LAYOUTS.index(order),
        "DTYPE": DTYPES[dtype],
        "BLOCK": block,
        "GROUPS": groups,
        "PASSES": passes,
        "num_warps": warps,
        "maxnreg": min(REGISTERS[order], 65536 // (32 * warps)),  # a processor has 65536
    }


def _launch(launch: Launch, addresses: Tensor, rows: Tensor, counted: Tensor, device: torch.device) -> None:
    from proxopt_torch.device.triton_kernels import step_kernel

    chosen = options(launch.kind)
    grid = (-(-launch.groups // chosen["GROUPS"]),)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        step_kernel[grid](addresses, rows, counted, *launch.tables, launch.groups, **chosen)
    calls[launch.kind[0]] += 1
