"""How much of what a network without its zeroed units saves does `compact` remove: python benchmarks/compaction.py

    python benchmarks/compaction.py --only ResNet Llama --out runs/compaction.csv
    python benchmarks/compaction.py --again            # rows that --out holds already are measured anew

In each of twenty architectures a listed half of the coupled units is set to zero: rows, biases, scales and shifts of channels and
hidden units, columns that read attention heads. `share` is what `compact` removes over the number of parameters that belong to
these units. This number is counted from the list; where the same architecture can be built narrower (`reference`), the narrower
model must have exactly as many parameters less. `gap` is the largest difference of outputs, over the largest output, on random
inputs of batch sizes (and lengths of texts) that `compact` has not seen. `seconds` is CPU time, `passes` the number of calls of
the model's forward method, those of tracing among them. A row is written to --out as soon as it is known. Needs the extra `zoo`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, Architecture, gap, size
from torch import nn

from proxopt_torch import compact

EXAMPLE = 2  # batch size of the example
UNSEEN = (1, 3, 5)
ENOUGH = 0.9  # share of the parameters
SAME = 1e-4  # gap
FIELDS = ["architecture", "units", "parameters", "reference", "removable", "removed", "share", "gap", "seconds", "passes", "note"]


@contextmanager
def counted_passes(model: nn.Module) -> Iterator[list[int]]:
    """Count the calls of the forward method of the class of a model, also of copies, but not of modules of this class within."""
    kind = type(model)
    original, calls, running = kind.forward, [0], [False]

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if running[0]:
            return original(self, *args, **kwargs)
        calls[0] += 1
        running[0] = True
        try:
            return original(self, *args, **kwargs)
        finally:
            running[0] = False

    kind.forward = forward
    try:
        yield calls
    finally:
        kind.forward = original


def measure(case: Architecture) -> dict[str, Any]:
    """A row of the table. An error of `compact` is a result too."""
    model, removable = case.pruned()
    if case.narrower and size(model) - size(case.narrower()) != removable:
        raise ValueError(
            f"{case.name}: the narrower model saves {size(model) - size(case.narrower())}, the cuts list {removable}"
        )
    row: dict[str, Any] = {"architecture": case.name, "units": case.units, "parameters": size(model), "removable": removable}
    row["reference"] = "narrower model" if case.narrower else "count"
    with counted_passes(model) as passes:
        start = time.process_time()
        try:
            small = compact(model, case.inputs(EXAMPLE))
        except Exception as error:
            return row | {"share": 0.0, "note": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        seconds = time.process_time() - start
    removed = size(model) - size(small.model)
    torch.manual_seed(1)
    row |= {"removed": removed, "share": round(removed / removable, 4), "seconds": round(seconds, 2), "passes": passes[0]}
    row["gap"] = float(f"{max(gap(model, small.model, case.inputs(n)) for n in UNSEEN):.1e}")
    reasons = dict.fromkeys(getattr(small, "kept", {}).values())
    return row | {"note": "; ".join(reasons)[:200] if row["share"] < 1 else ""}


def passed(row: dict[str, Any]) -> bool:
    return row["gap"] not in (None, "") and float(row["share"]) >= ENOUGH and float(row["gap"]) <= SAME


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """The rows by architecture."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["architecture"]: row for row in csv.DictReader(file)}


def write_table(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS)
        writer.writeheader()
        writer.writerows(rows[case.name] for case in ARCHITECTURES if case.name in rows)


def line(row: dict[str, Any]) -> str:
    number = lambda name, form: format(float(row[name]), form) if row.get(name) not in (None, "") else "-"
    shown = f"{row['architecture']:20} {row['units']:33} {number('parameters', ',.0f'):>11} {number('removable', ',.0f'):>11}"
    shown += f" {row['reference']:15} {100 * float(row['share']):6.1f} {number('gap', '.0e'):>7}"
    return f"{shown} {number('seconds', '.1f'):>7} {number('passes', '.0f'):>6}  {row['note'][:60]}".rstrip()


def draw_picture(path: Path, rows: list[dict[str, Any]]) -> None:
    """The shares as bars, with gap and seconds beside them."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.32 * len(rows) + 1.2), layout="constrained")
    shares = [100 * float(row["share"]) for row in rows]
    axis.barh(range(len(rows)), shares, color=["C0" if passed(row) else "C1" for row in rows])
    axis.set_yticks(range(len(rows)), [row["architecture"] for row in rows])
    axis.axvline(100 * ENOUGH, color="black", linewidth=0.8, linestyle="--")
    for place, row in enumerate(rows):
        text = f"gap {float(row['gap']):.0e}, {float(row['seconds']):.1f} s" if row["gap"] not in (None, "") else "error"
        axis.text(102, place, text, va="center", fontsize=8)
    axis.set(xlim=(0, 130), xlabel="removed parameters, % of those of the zeroed units")
    axis.set_xticks(range(0, 101, 20))
    axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the architectures to measure")
    parser.add_argument("--again", action="store_true", help="measure also what --out holds")
    parser.add_argument("--out", type=Path, default=results / "compaction.csv", help="CSV file; the picture has the same name")
    args = parser.parse_args(argv)
    chosen = [c for c in ARCHITECTURES if not args.only or any(o.lower() in c.name.lower() for o in args.only)]
    if not chosen:
        sys.exit(f"only must be part of the name of an architecture, got {args.only}")
    torch.set_num_threads(1)
    rows = read_table(args.out)
    header = f"{'architecture':20} {'zeroed units (every second)':33} {'parameters':>11} {'of units':>11} {'reference':15}"
    print(f"{header} {'% gone':>6} {'gap':>7} {'CPU s':>7} {'passes':>6}")
    for case in chosen:
        if args.again or case.name not in rows:
            rows[case.name] = dict.fromkeys(FIELDS, "") | measure(case)
            write_table(args.out, rows)
        print(line(rows[case.name]), flush=True)
    shown = [rows[case.name] for case in chosen]
    good = sum(map(passed, shown))
    print(f"{good} of {len(shown)}: at least {100 * ENOUGH:.0f} % removed, gap at most {SAME:.0e}")
    draw_picture(args.out.with_suffix(".png"), [rows[c.name] for c in ARCHITECTURES if c.name in rows])


if __name__ == "__main__":
    main()
