"""Time of the proximal operators beside a copy of the same array: python benchmarks/prox_speed.py

    python benchmarks/prox_speed.py --library numpy --only L1 --dtype float64
    PROXOPT_KERNELS=0 python benchmarks/prox_speed.py            # without the compiled kernels
    python benchmarks/prox_speed.py --out prox_speed.csv --picture prox_speed.png

Each operator runs in turn with a copy of its input, with the same prox written by hand in a few lines of the library, and with
that of fastprox if it is installed, round after round, in one process on one thread. The table gives CPU milliseconds (median)
and the ratio to the copy of the same round, as median and range. The allocator keeps freed memory, so that a result does not
begin with page faults, which would make the copy look several times slower in some rounds. With --device cuda: milliseconds
between two events on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxopt import L1, GroupL2, Groups, SparseGroupLasso

SIZE = 100  # entries of a group, on average
STRENGTH = 0.1
COPY = "copy"
OURS = "proxopt"


@dataclass(frozen=True)
class Case:
    """A problem: the array, the penalty, the step, and other programs that solve it.

    Args:
      x: the array, of NumPy or torch.
      penalty: of proxopt.
      step: a number, or an array of x's shape.
      others: further programs by name, as functions of nothing.
      target: the ratio to a copy, or the CPU milliseconds, that the project aims at.
    """

    x: Any
    penalty: Any
    step: Any
    others: dict[str, Callable[[], Any]]
    target: str = ""

    def programs(self) -> dict[str, Callable[[], Any]]:
        copy = self.x.copy if isinstance(self.x, np.ndarray) else self.x.clone
        return {COPY: copy, OURS: lambda: self.penalty.prox(self.x, self.step), **self.others}


# -- the same operators by hand ---------------------------------------------------------------------


def soft(xp: Any, x: Any, t: float) -> Any:
    return xp.sign(x) * xp.maximum(xp.abs(x) - t, xp.zeros_like(x[..., :1]))


def shrink_rows(xp: Any, x: Any, t: float) -> Any:
    """The group soft threshold of each row."""
    norm = xp.linalg.norm(x, axis=1, keepdims=True)
    return x * xp.maximum(1 - t / xp.maximum(norm, xp.full_like(norm, 1e-30)), xp.zeros_like(norm))


def shrink_segments(x: np.ndarray, t: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The group soft threshold of the entries with the same code."""
    norm = np.sqrt(np.bincount(codes, weights=x * x, minlength=len(t)))
    return x * np.maximum(1 - t / np.maximum(norm, 1e-30), 0).astype(x.dtype)[codes]


def shrink_segments_torch(x: Any, t: Any, codes: Any) -> Any:
    norm = x.new_zeros(len(t)).index_add_(0, codes, x * x).sqrt_()
    return x * (1 - t / norm.clamp(min=1e-30)).clamp_(min=0)[codes]


def shrink_in_metric(xp: Any, x: Any, step: Any, t: float, iterations: int = 10) -> Any:
    """The minimiser of ``sum (z - x)^2 / (2 step) + t ||z||`` for each row, by Newton's method from the left."""
    shift = step * t
    norm = xp.linalg.norm(x, axis=1, keepdims=True)
    low = xp.maximum(norm - xp.amax(shift, axis=1, keepdims=True), 1e-30 * norm)
    root = low
    for _ in range(iterations):
        below = root + shift
        square = (x / below) ** 2
        total = square.sum(axis=1, keepdims=True)
        slope = (square / below).sum(axis=1, keepdims=True)
        root = xp.minimum(xp.maximum(root + total * (xp.sqrt(total) - 1) / slope, low), norm)
    zeroed = xp.linalg.norm(x / step, axis=1, keepdims=True) <= t
    return xp.where(zeroed, xp.zeros_like(x), x * root / (root + shift))


# -- the cases --------------------------------------------------------------------------------------


def ragged_codes(rng: np.random.Generator, groups: int) -> np.ndarray:
    """Sorted codes of groups of about 1 to 2 SIZE - 1 entries, SIZE groups entries in all."""
    lengths = rng.integers(1, 2 * SIZE, groups)
    codes = np.repeat(np.arange(groups), lengths)
    codes = np.concatenate([codes, rng.integers(0, groups, max(groups * SIZE - len(codes), 0))])[: groups * SIZE]
    return np.sort(codes)


def cases(library: str, dtype: str, device: str, scale: float) -> Iterator[tuple[str, Case]]:
    """All cases by name, each made when it is its turn."""
    rng = np.random.default_rng(0)
    groups = max(int(1e4 * scale), 2)
    if library == "torch":
        import torch as xp

        beside = lambda a: xp.asarray(a, device=device)
    else:
        xp, beside = np, lambda a: a
    draw = lambda shape: beside(rng.standard_normal(shape).astype(dtype))
    by_hand = f"{library} by hand"

    x, t = draw(max(int(1e7 * scale), 1)), STRENGTH
    others = {by_hand: lambda: soft(xp, x, t), **peer(x, lambda fp: fp.Soft(t))}
    if library == "torch":
        others["torch softshrink"] = lambda: xp.nn.functional.softshrink(x, t)
    yield f"L1, {x.shape[0]:.0e} entries", Case(x, L1(t), 1.0, others, "1.7 copies")

    x, bound = draw((groups, SIZE)), STRENGTH * SIZE**0.5
    shape = f"{groups:.0e} groups of {SIZE}"
    rows = Groups.along(1)
    others = {by_hand: lambda: shrink_rows(xp, x, bound), **peer(x, lambda fp: fp.GroupL2(bound))}
    yield f"group L2, {shape}", Case(x, GroupL2(t, rows), 1.0, others, "2.5 copies")

    half = STRENGTH / 2
    others = {by_hand: lambda: shrink_rows(xp, soft(xp, x, half), bound / 2)}
    others |= peer(x, lambda fp: fp.TreeL2.sparse_group(half, bound / 2, np.zeros(SIZE, int)))
    yield f"SGL, {shape}", Case(x, SparseGroupLasso(t, groups=rows), 1.0, others, "4 copies")

    columns = beside(np.ascontiguousarray(np.asarray(x.cpu() if library == "torch" else x).T))
    others = {by_hand: lambda: shrink_rows(xp, soft(xp, columns.T, half), bound / 2).T}
    yield f"SGL, {shape} in columns", Case(columns, SparseGroupLasso(t, groups=Groups.along(0)), 1.0, others, "4 copies")

    flat = x.reshape(-1)
    yield from ragged_cases(rng, beside, flat, groups, by_hand)

    step = beside(np.exp(rng.standard_normal(x.shape) / 2).astype(dtype))
    others = {by_hand: lambda: shrink_in_metric(xp, x, step, bound)}
    yield f"exact metric, {shape}", Case(x, GroupL2(STRENGTH, rows), step, others, "12 ms")
    for metric in ("support", "median"):
        yield f"{metric} metric, {shape}", Case(x, GroupL2(STRENGTH, rows, metric=metric), step, {})

    small = draw(10)
    yield "L1, 10 entries", Case(small, L1(t), 1.0, {by_hand: lambda: soft(xp, small, t)})
    yield "group L2, 10 entries", Case(small, GroupL2(t), 1.0, {})


def ragged_cases(
    rng: np.random.Generator, beside: Callable[..., Any], x: Any, groups: int, by_hand: str
) -> Iterator[tuple[str, Case]]:
    """Groups of different sizes by labels: side by side, and in any order."""
    in_numpy = isinstance(x, np.ndarray)
    hand, xp = (shrink_segments, np) if in_numpy else (shrink_segments_torch, sys.modules["torch"])

    def case(codes: np.ndarray, l1_ratio: float) -> Case:
        weights = np.sqrt(np.bincount(codes, minlength=groups))
        t, own = beside(((1 - l1_ratio) * STRENGTH * weights).astype("float32")), beside(codes)
        t = t if in_numpy else t.to(x.dtype)
        softened = (lambda: soft(xp, x, l1_ratio * STRENGTH)) if l1_ratio else (lambda: x)
        others = {by_hand: lambda: hand(softened(), t, own)}
        if not l1_ratio:
            others |= peer(x, lambda fp: fp.GroupL2(STRENGTH, codes, weights))
        labels = Groups.labels(codes)
        penalty = SparseGroupLasso(STRENGTH, l1_ratio, labels) if l1_ratio else GroupL2(STRENGTH, labels)
        return Case(x, penalty, 1.0, others, "5 copies")

    side_by_side = ragged_codes(rng, groups)
    yield f"group L2, {groups:.0e} ragged labels in order", case(side_by_side, 0.0)
    yield f"SGL, {groups:.0e} ragged labels in order", case(side_by_side, 0.5)
    yield f"group L2, {groups:.0e} ragged labels in any order", case(rng.permutation(side_by_side), 0.0)


def peer(x: Any, operator: Callable[[Any], Any]) -> dict[str, Callable[[], Any]]:
    """The same operator of fastprox along the last axis of a NumPy array, on one thread."""
    if not isinstance(x, np.ndarray):
        return {}
    try:
        import fastprox
    except ImportError:
        return {}
    made = operator(fastprox)
    return {"fastprox": lambda: made.prox(x, 1.0, threads=1)}


# -- measurement ------------------------------------------------------------------------------------


def seconds_of(program: Callable[[], Any], device: str, repeats: int) -> float:
    """CPU seconds of a call; on a GPU the seconds from one event to another around it. The mean of `repeats` calls."""
    if device == "cpu":
        start = time.process_time()
        for _ in range(repeats):
            program()
        return (time.process_time() - start) / repeats
    import torch

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        program()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def measure(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each program of a case, in turn, after two rounds of warm-up."""
    programs = case.programs()
    repeats = max(1, 20_000 // max(np.prod(case.x.shape), 20))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 2):
        for name, program in programs.items():
            seconds = seconds_of(program, device, repeats)
            if turn >= 2:
                times[name].append(seconds)
    rows = []
    for name in programs:
        ratios = [t / base for t, base in zip(times[name], times[COPY])]
        numbers = {"ms": 1e3 * statistics.median(times[name]), "ratio": statistics.median(ratios)}
        numbers |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
        rows.append({"program": name, **numbers, "target": case.target if name == OURS else ""})
    return rows


def keep_memory() -> None:
    """Let the allocator of glibc keep freed memory, and use it for the next array."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_picture(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Bars of the ratio to a copy, a panel for each library, the range as a line."""
    import matplotlib.pyplot as plt

    libraries = list(dict.fromkeys((r["library"], r["dtype"]) for r in rows))
    names = list(dict.fromkeys(r["case"] for r in rows if "10 entries" not in r["case"]))
    kinds = {OURS: "C0", "by hand": "C7", "torch softshrink": "C2", "fastprox": "C1"}
    figure, axes = plt.subplots(1, len(libraries), figsize=(5.5 * len(libraries) + 2.5, 6), sharey=True, squeeze=False)
    for axis, (library, dtype) in zip(axes[0], libraries):
        for i, (kind, color) in enumerate(kinds.items()):
            own = {
                r["case"]: r
                for r in rows
                if (r["library"], r["dtype"]) == (library, dtype) and (r["program"] == kind or r["program"].endswith(kind))
            }
            found = [(k, own[name]) for k, name in enumerate(names) if name in own]
            if found:
                ratios = [r["ratio"] for _, r in found]
                spread = [[r["ratio"] - r["ratio_min"] for _, r in found], [r["ratio_max"] - r["ratio"] for _, r in found]]
                places = [k + 0.2 * (i - 1.5) for k, _ in found]
                axis.barh(places, ratios, 0.18, xerr=spread, color=color, label=kind, error_kw={"linewidth": 0.7})
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="time / time of a copy", title=f"{library}, {dtype}")
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.25)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", nargs="*", choices=("numpy", "torch"), default=["numpy", "torch"])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the cases to run")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the cases of torch alone")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--picture", type=Path, help="PNG file for the ratios")
    args = parser.parse_args(argv)
    libraries = ["torch"] if args.device == "cuda" else args.library
    if "torch" in libraries:
        import torch

        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("device must be cpu where torch finds no CUDA device, got cuda")
        torch.set_num_threads(1)
    keep_memory()
    from gpu import machine, versions

    name = torch.cuda.get_device_name() if args.device == "cuda" else f"one of {machine('cpu')}"
    where = ", ".join([name, *(f"{k} {v}" for k, v in versions().items())])
    print(where)
    rows: list[dict[str, Any]] = []
    for library in libraries:
        print(f"\n{library}, {args.dtype}\n{'case':42} {'program':18} {'ms':>9} {'/ copy':>7}   {'range':16} target")
        for case_name, case in cases(library, args.dtype, args.device, args.scale):
            if args.only and not any(o in case_name for o in args.only):
                continue
            for row in measure(case, args.device, args.rounds):
                rows.append({"library": library, "dtype": args.dtype, "case": case_name, **row, "machine": where})
                spread = f"{row['ratio_min']:.2f} - {row['ratio_max']:.2f}"
                numbers = f"{row['ms']:9.4f} {row['ratio']:7.2f}   {spread:16} {row['target']}"
                print(f"{case_name:42} {row['program']:18} {numbers}", flush=True)
    if not rows:
        sys.exit(f"only must be part of the name of a case, got {args.only}")
    if args.out:
        write_table(args.out, rows)
    if args.picture:
        draw_picture(args.picture, rows, where)


if __name__ == "__main__":
    main()
