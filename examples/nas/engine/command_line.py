"""Command lines: options that choose which settings there are, and several seeds in one call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any


def option(argv: list[str], name: str, known: Collection[str], default: str) -> str:
    """Take `--name VALUE` or `--name=VALUE` out of the command line; SystemExit unless the value is known."""
    value = default
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            value = argv[i + 1]
            del argv[i : i + 2]
            break
        if word.startswith(name + "="):
            value = word.partition("=")[2]
            del argv[i]
            break
    if value not in known:
        raise SystemExit(f"error: {name} must be one of {', '.join(known)}, got {value!r}")
    return value


def flag(argv: list[str], name: str) -> bool:
    """Take `--name` out of the command line; whether it was there."""
    there = name in argv
    if there:
        argv.remove(name)
    return there


def each_seed(settings: Any, work: Callable[[int, Path], dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `work(seed, folder)` for every seed; what goes wrong in a foreseen way ends the program with one sentence."""
    rows = []
    if not settings.seeds:
        raise SystemExit("error: --seeds must name at least one seed, got none")
    for seed in settings.seeds:
        out = settings.out if len(settings.seeds) == 1 else settings.out / f"seed-{seed}"
        try:
            rows.append({"seed": seed, **work(seed, out)})
        except (ValueError, FileExistsError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from None
    return rows


def compare(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A table of all seeds, their mean and spread."""
    lines = ["seed      " + "".join(f"{c:>22}" for c in columns)]
    lines += [f"{row['seed']:<10}" + "".join(f"{row[c]:>22.4g}" for c in columns) for row in rows]
    for name, function in (("mean", statistics.mean), ("spread", statistics.stdev)):
        lines.append(f"{name:<10}" + "".join(f"{function([float(r[c]) for r in rows]):>22.4g}" for c in columns))
    return "\n".join(lines)
