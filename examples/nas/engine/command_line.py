"""Command lines of the scripts: options that select the settings, the settings themselves, and one run for each seed."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

from .signals import file_error, stops_in_one_line


class CommandLine:
    """The words of a command line. `option` and `flag` remove what they find; `settings` parses the rest.

    argv: without the name of the program; None takes ``sys.argv``.
    """

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        self.words = list(sys.argv[1:] if argv is None else argv)

    def option(self, name: str, known: Collection[str], default: str) -> str:
        """Remove ``--name VALUE`` or ``--name=VALUE`` and return the value; SystemExit unless it is known."""
        value = self.value(name)
        if value is not None and value not in known:
            raise SystemExit(f"error: {name} must be one of {', '.join(known)}, got {value!r}")
        return default if value is None else value

    def value(self, name: str) -> str | None:
        """Remove ``--name VALUE`` or ``--name=VALUE`` and return the value, or None."""
        for i, word in enumerate(self.words):
            if word == name and i + 1 < len(self.words):
                value = self.words[i + 1]
                del self.words[i : i + 2]
                return value
            if word.startswith(name + "="):
                del self.words[i]
                return word.partition("=")[2]
        return None

    def flag(self, name: str) -> bool:
        """Remove ``--name`` and return whether it was there."""
        found = name in self.words
        if found:
            self.words.remove(name)
        return found

    def settings(self, presets: Mapping[str, Any], description: str | None) -> Any:
        """The settings of the preset that ``--preset`` names ("paper" by default), changed by the options that are left."""
        preset = presets[self.option("--preset", presets, "paper")]
        with errors_in_one_line():
            return tyro.cli(type(preset), args=self.words, default=preset, description=description)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line, without a traceback, for the errors that a user can correct."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"error: {file_error(error)}") from None
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def first_process() -> bool:
    """Whether this process prints: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def run_each_seed(
    settings: Any,
    run: Callable[[int, Path], dict[str, Any]],
    columns: Sequence[str] = (),
    first: Callable[[], bool] = first_process,
) -> list[dict[str, Any]]:
    """Return ``run(seed, folder)`` for every seed of the settings; with several, print a table of these columns.

    first: whether this process prints.
    """
    if not settings.seeds:
        raise SystemExit("error: --seeds must name at least one seed, got none")
    rows = []
    for seed in settings.seeds:
        out = settings.out if len(settings.seeds) == 1 else settings.out / f"seed-{seed}"
        with errors_in_one_line(), stops_in_one_line(settings.out, first):
            rows.append({"seed": seed, **run(seed, out)})
    if columns and len(rows) > 1 and first():
        print("\n" + table(rows, columns))
    return rows


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The columns of all seeds as text, with mean and sample standard deviation ("spread")."""
    lines = ["seed      " + "".join(f"{c:>22}" for c in columns)]
    lines += [f"{row['seed']:<10}" + "".join(f"{row[c]:>22.4g}" for c in columns) for row in rows]
    for name, function in (("mean", statistics.mean), ("spread", statistics.stdev)):
        lines.append(f"{name:<10}" + "".join(f"{function([float(r[c]) for r in rows]):>22.4g}" for c in columns))
    return "\n".join(lines)
