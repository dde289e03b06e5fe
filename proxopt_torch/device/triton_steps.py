"""Steps of the optimizers by Triton kernels: one launch for all groups of a kind, without a synchronisation of host and device.

**Not yet measured.** The kernels were tested in Triton's interpreter on a CPU, and compiled for compute capability 9.0, but they
have not run on a device. They are therefore off until they are switched on, by the environment variable ``PROXOPT_TRITON=1`` or

>>> from proxopt_torch.device import triton_steps
>>> with triton_steps.enabled():
...     pass  # optimizer.step()

They take dense CUDA parameters in float32, bfloat16 or float16 (with states in float32) whose penalty is None or declares a
``Shrinkage`` with strengths that are numbers or tensors without axes: ``L1``, ``GroupL2`` and ``SparseGroupLasso`` with any
groups and metric, in joint groups too. Groups of more than ``layout.MOST_ENTRIES`` entries or ``layout.MOST_PIECES`` pieces, and
everything else, take the step that they take without the kernels.

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
from proxopt_torch.device.layout import Layout, Pieces, layout
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
    form = None
    if penalty is not None:
        form = declared.shrinkage(declared.with_metric(penalty, optimizer.metric or "exact"))
        if form is None or not (_one_number(form.l1) and _one_number(form.l2)):
            return [], present
    taken: list[Entry] = []
    rest: list[Entry] = []
    for entry in present:
        fits = _fits(entry) and _layout(optimizer, group, form, entry) is not None
        (taken if fits else rest).append(entry)
    return taken, rest


def step(optimizer: ProximalOptimizer, parts: Sequence[Part]) -> None:
    """Update all parameters of these param groups."""
    places: dict[tuple[torch.device, bool], list[Part]] = {}
    for group, penalty, entries in parts:
        for device in dict.fromkeys(entry[0].device for entry in entries):
            own = [entry for entry in entries if entry[0].device == device]
            places.setdefault((device, group["capturable"]), []).append(Part(group, penalty, own))
    plans = optimizer.__dict__.setdefault("_device_plans", {})
    for place, own_parts in places.items():
        key = [
            (id(part.group), *_structure(part.group), *(id(p) for entry in part.entries for p in entry), optimizer._device_method)
            for part in own_parts
        ]
        found = plans.get(place)
        if found is None or found.key != key:
            found = plans[place] = Plan(optimizer, key, own_parts, *place)
        found.step(own_parts)


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
    return (*param_groups.fingerprint(group)[:-1], group["joint"], group.get("tau") is None)


def _layout(optimizer: ProximalOptimizer, group: ParamGroup, form: Shrinkage | None, entry: Entry) -> Layout | None:
    """The layout of an entry, kept from step to step."""
    kept = optimizer.__dict__.setdefault("_device_layouts", {})
    key = (*_structure(group), form is None or form.l2 is None, *(p.shape for p in entry), *(p.stride() for p in entry))
    found = kept.get(id(entry[0]))
    if found is None or found[0] != key:
        # the penalty is kept beside its layout: the key holds the ids of its parts
        found = kept[id(entry[0])] = (key, layout(form, entry), entry[0], group["penalty"])
    result: Layout | None = found[1]
    return result


@dataclass
class Launch:
    """The groups of one kind, as arguments of the kernel."""

    kind: Kind
    groups: int
    tables: list[Tensor]


class Plan:
    """The launches of a step for the parameters on one device, and the tables that they read."""

    def __init__(
        self, optimizer: ProximalOptimizer, key: list[Any], parts: Sequence[Part], device: torch.device, capturable: bool
    ) -> None:
        self.optimizer, self.key, self.device, self.capturable = optimizer, key, device, capturable
        self.objects = [part.group["penalty"] for part in parts]  # the key holds the ids of their parts
        self.entries = [entry for part in parts for entry in part.entries]
        self.params = [p for entry in self.entries for p in entry]
        self.checked: list[Any] = [None] * len(tables.ADDRESSES) * len(self.params)
        self.launches = self._launches(parts)
        sizes = [
            8 * len(self.params) * len(tables.ADDRESSES),
            4 * len(parts) * len(tables.PLAIN),
            4 * len(self.entries) * len(tables.COUNTED),
        ]
        self.ends = np.cumsum([-(-size // ALIGN) * ALIGN for size in sizes]).tolist()
        self.host = np.zeros(self.ends[-1], dtype=np.uint8)
        self.table = torch.empty(self.ends[-1], dtype=torch.uint8, device=device)
        self.spare = self._pinned() if capturable else None
        self.captured: list[Any] = []

    # -- tables that stay ---------------------------------------------------------------------

    def _launches(self, parts: Sequence[Part]) -> list[Launch]:
        """Sort the groups of all problems by kind."""
        kinds: dict[Kind, list[tuple[Pieces, dict[str, np.ndarray]]]] = {}
        problem = tensor = 0
        for row, (group, penalty, entries) in enumerate(parts):
            form = self._form(penalty)
            method = tables.method(str(self.optimizer._device_method), group)
            metric = self._metric(form)
            for entry in entries:
                found = _layout(self.optimizer, group, form, entry)
                assert found is not None
                for block, order, pieces, numbers in _by_kind(found):
                    numbers["row"] = np.full_like(numbers["size"], row)
                    numbers["problem"] = np.full_like(numbers["size"], problem)
                    pieces.tensor = pieces.tensor + tensor
                    kinds.setdefault((method, metric, order, entry[0].dtype, block), []).append((pieces, numbers))
                problem += 1
                tensor += len(entry)
        return [self._launch(kind, members) for kind, members in sorted(kinds.items(), key=str)]

    def _form(self, penalty: ProxOperator | None) -> Shrinkage | None:
        if penalty is None:
            return None
        return declared.shrinkage(declared.with_metric(penalty, self.optimizer.metric or "exact"))

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

    def step(self, parts: Sequence[Part]) -> None:
        """Bring the tables up to date, and launch."""
        states = [s for group, _, entries in parts for entry in entries for s in self.optimizer._states(group, entry)]
        grads = self._gradients()
        self._write(0, self._addresses(grads, states), np.int64)
        plain = [tables.plain(str(self.optimizer._device_method), group, self._form(penalty)) for group, penalty, _ in parts]
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
            self._write(2, self._counted(parts, np.array([float(c) for c in counts]) + 1, np), np.float32)
        table = self._upload()
        addresses, rows, counted = (table[a:b] for a, b in zip([0, *self.ends], self.ends))
        rows, counted = rows.view(torch.float32), counted.view(torch.float32)
        for row, column, value in on_device:
            rows[row * len(tables.PLAIN) + column].copy_(value)
        if self.capturable:
            found = self._counted(parts, torch.stack(counts).double() + 1, torch)
            counted[: found.numel()].copy_(found.reshape(-1))
        for launch in self.launches:
            _launch(launch, addresses.view(torch.int64), rows, counted, self.device)
        torch._foreach_add_(steps, 1)

    def _gradients(self) -> list[Tensor]:
        from proxopt_torch.kernels import in_layout_of

        grads = []
        for p in self.params:
            assert p.grad is not None
            grads.append(p.grad if p.grad.stride() == p.stride() else in_layout_of(p.detach(), p.grad))
        return grads

    def _addresses(self, grads: list[Tensor], states: list[State]) -> np.ndarray:
        """The addresses of all tensors; a state that was replaced is brought into the layout and precision of the kernels."""
        from proxopt_torch.kernels import in_layout_of

        rows, place = [], 0
        for p, grad, state in zip(self.params, grads, states):
            row = dict.fromkeys(tables.ADDRESSES, 0)
            row["x"], row["grad"] = p.data_ptr(), grad.data_ptr()
            for name, value in state.items():
                if name not in tables.STATES:
                    continue
                if value is not self.checked[place]:
                    state[name] = value = in_layout_of(p.detach(), value.to(p.device, torch.float32))
                    self.checked[place] = value
                row[tables.STATES[name]] = value.data_ptr()
                place += 1
            rows.append(list(row.values()))
        return np.array(rows, dtype=np.int64)

    def _counted(self, parts: Sequence[Part], counts: Any, xp: Any) -> Any:
        """The columns of ``tables.COUNTED``, a row for each problem."""
        out, start = [], 0
        for group, _, entries in parts:
            out.append(xp.stack(tables.counted(group, counts[start : start + len(entries)]), -1))
            start += len(entries)
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


def _by_kind(found: Layout) -> Iterator[tuple[int, str, Pieces, dict[str, np.ndarray]]]:
    """The groups of one problem by block and layout, with their pieces renumbered and their numbers."""
    pieces, count = found.pieces, len(found.weights)
    sizes = np.bincount(pieces.group, weights=pieces.length, minlength=count).astype(np.int64)
    blocks = np.array([*BLOCKS, 0])[np.searchsorted(BLOCKS, sizes)]
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
