"""Command lines of the scripts: options that select the settings, the settings themselves, and one run for each seed."""

from __future__ import annotations

import ast
import inspect
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ..space.genotype import similar
from .log import write_csv
from .signals import file_error, stops_in_one_line

SEEDS = "seeds.csv"  # the table of all seeds
CONFIG = "Settings.json of another run, whose settings this one starts with; options of the command line win."


@dataclass(frozen=True)
class Choice:
    """An option that selects the settings, for the list of options in ``--help``."""

    name: str
    kind: Any
    default: Any
    help: str
    metavar: str | None = None

    def field(self) -> tuple[str, Any, Any]:
        """The option as a field of a dataclass, from which tyro makes a line of help."""
        shown = option_help(self.help, self.default, metavar=self.metavar)
        marks = (shown, tyro.conf.FlagCreatePairsOff) if self.kind is bool else (shown,)
        return self.name.lstrip("-").replace("-", "_"), Annotated[(self.kind, *marks)], field(default=self.default)


class CommandLine:
    """The words of a command line. `option`, `value` and `flag` remove what they find; `settings` parses the rest.

    All of them are listed by ``--help``, together with the settings.

    argv: without the name of the program; None takes ``sys.argv``.
    chosen: by the name of the option, what `option` returned. given: the value on the command line, None or False without one.
    """

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        self.words = list(sys.argv[1:] if argv is None else argv)
        self.choices = [Choice("--config", str | None, None, CONFIG, "FILE")]  # `resume.expand` replaces it by what is in it
        self.chosen: dict[str, str] = {}
        self.given: dict[str, Any] = {}

    @property
    def help_requested(self) -> bool:
        """Whether the command line only requests the list of options."""
        return "--help" in self.words or "-h" in self.words

    def option(self, name: str, known: Collection[str], default: str, help: str = "") -> str:
        """Remove ``--name VALUE`` or ``--name=VALUE`` and return the value; SystemExit unless it is known."""
        value = self._remove(name)
        self.choices.append(Choice(name, Literal[tuple(known)], default, help))
        if value is not None and value not in known:
            raise SystemExit(f"error: {not_among(name, value, known)}")
        self.given[name] = value
        self.chosen[name] = default if value is None else value
        return self.chosen[name]

    def value(self, name: str, help: str = "", metavar: str = "VALUE") -> str | None:
        """Remove ``--name VALUE`` or ``--name=VALUE`` and return the value, or None."""
        self.choices.append(Choice(name, str | None, None, help, metavar))
        self.given[name] = self._remove(name)
        return self.given[name]

    def count(self, name: str, help: str = "", metavar: str = "N") -> int:
        """Remove ``--name NUMBER`` and return the number, or 0; SystemExit unless it is a whole number >= 1."""
        value = self.value(name, help, metavar)
        if value is not None and (not value.isdigit() or int(value) < 1):
            raise SystemExit(f"error: {name} must be a whole number >= 1, got {value!r}")
        return int(value or 0)

    def flag(self, name: str, help: str = "") -> bool:
        """Remove ``--name`` and return whether it was there."""
        self.choices.append(Choice(name, bool, False, help))
        there = [i for i, word in enumerate(self.words) if spelt(word) == name]
        for i in reversed(there):
            del self.words[i]
        self.given[name] = bool(there)
        return self.given[name]

    def settings(self, presets: Mapping[str, Any], description: str | None) -> Any:
        """The settings of the preset that ``--preset`` names (by default the first), changed by the options that are left."""
        preset = presets[self.option("--preset", presets, next(iter(presets)), preset_help(presets))]
        selection = make_dataclass("Selection", [choice.field() for choice in self.choices])
        settings = documented(preset)
        command = make_dataclass("Command", [("selection", selection), ("settings", settings)])
        refuse_unknown_values(self.words, type(preset))
        parsed = tyro.cli(
            command,
            args=self.words,
            default=command(selection(), settings()),
            description="\n\n".join([*paragraphs(description or ""), self._selected()]),
            config=(tyro.conf.OmitArgPrefixes,),
        )
        with errors_in_one_line():
            return type(preset)(**vars(parsed.settings))

    def _selected(self) -> str:
        """A sentence with the selection whose options ``--help`` lists, and the commands that list others."""
        chosen = " ".join(f"{name} {value}" for name, value in self.chosen.items())
        others = [choice for choice in self.choices if choice.name in self.chosen and choice.name != "--framework"]
        examples = [f"`{c.name} {value} --help`" for c in others for value in get_args(c.kind) if value != self.chosen[c.name]]
        return f"The options below, with their defaults, are those of `{chosen}`. Others: {', '.join(examples)}."

    def _remove(self, name: str) -> str | None:
        """Remove all ``--name VALUE`` and ``--name=VALUE``, and return the last value, or None."""
        found, left = None, []
        words = iter(self.words)
        for word in words:
            own, equals, value = spelt(word).partition("=")
            following = None if equals or own != name else next(words, None)
            if own != name or (not equals and following is None):
                left.append(word)  # another option, or one without its value, which tyro reports
            else:
                found = value if equals else following
        self.words = left
        return found


def spelt(word: str) -> str:
    """An option with hyphens between its words: ``--data_dir`` and ``--data-dir`` are the same."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def not_among(name: str, value: str, known: Collection[str]) -> str:
    """The message for a value that is not among the known ones, with the one that may have been meant."""
    close = similar(value, known)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{name} must be one of {', '.join(known)}, got {value!r}{hint}"


def option_help(text: str, default: Any, **more: Any) -> Any:
    """The help of an option for tyro: one paragraph, and its default."""
    hints = {None: "(default: none)", True: "(default: on)", False: "(default: off)"}
    own = default is None or isinstance(default, bool)
    return tyro.conf.arg(help=" ".join(text.split()), help_behavior_hint=hints[default] if own else None, **more)


def documented(preset: Any) -> type:
    """A dataclass with the fields of a preset, its values as defaults, and the strings below the fields as their help.

    tyro reads these strings too, but breaks the lines of a paragraph where the source does.
    """
    kinds, texts = get_type_hints(type(preset)), field_texts(type(preset))
    made = []
    for f in fields(preset):
        value = getattr(preset, f.name)
        made.append((f.name, Annotated[kinds[f.name], option_help(texts.get(f.name, ""), value)], field(default=value)))
    return make_dataclass("Settings", made)


def field_texts(settings: type) -> dict[str, str]:
    """The string below each field of a dataclass or its bases; of several, the one of the most derived class."""
    found: dict[str, str] = {}
    for base in reversed(settings.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for statement, below in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[statement.target.id] = below.value.value  # type: ignore[union-attr, assignment]
    return found


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, a line each: tyro would break them where the source does."""
    return [" ".join(part.split()) for part in text.split("\n\n")]


def preset_help(presets: Mapping[str, Any]) -> str:
    """The help of ``--preset``: which settings each preset changes, compared with the first one."""
    (first, base), *others = presets.items()
    about = "as published, for a GPU" if first == "paper" else "for a GPU"
    lines = [f"Named set of defaults for the settings below. {first}: {about}."]
    for name, preset in others:
        changed = [f for f in fields(preset) if getattr(preset, f.name) != getattr(base, f.name, None)]
        listed = ", ".join(f"{f.name.replace('_', '-')} {shown(getattr(preset, f.name))}" for f in changed)
        lines.append(f"{name}: {listed or 'the same'}.")
    return " ".join(lines)


def shown(value: Any) -> str:
    """A value as it is typed on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def refuse_unknown_values(words: Sequence[str], settings: type) -> None:
    """End the program with one line if a setting with named values has another one that looks like one of them."""
    kinds = get_type_hints(settings)
    for i, word in enumerate(words):
        name, equals, value = spelt(word).partition("=")
        kind = kinds.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
        named = [str(v) for part in (kind, *get_args(kind)) if get_origin(part) is Literal for v in get_args(part)]
        value = value if equals else words[i + 1] if i + 1 < len(words) else ""
        if named and value not in named and similar(value, named):
            raise SystemExit(f"error: {not_among(name, value, named)}")


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
    """Return ``run(seed, folder)`` for every seed of the settings; with several, print and write a table of these columns.

    first: whether this process prints and writes OUT/seeds.csv.
    """
    if not settings.seeds:
        raise SystemExit("error: --seeds must name at least one seed, got none")
    if min(settings.seeds) < 0 or len({*settings.seeds}) < len(settings.seeds):
        raise SystemExit(f"error: --seeds must be different numbers >= 0, got {shown(settings.seeds)}")
    rows = []
    for seed in settings.seeds:
        with errors_in_one_line(), stops_in_one_line(settings.out, first):
            rows.append({"seed": seed, **run(seed, folder_of(settings, seed))})
    if columns and len(rows) > 1 and first():
        print("\n" + table(rows, [name for name in columns if not isinstance(rows[0][name], str)]))
        write_csv(settings.out / SEEDS, [{name: row[name] for name in ("seed", *columns)} for row in rows])
    return rows


def folder_of(settings: Any, seed: int) -> Path:
    """The folder of the run of a seed: OUT, or OUT/seed-N if there are several seeds."""
    return settings.out if len(settings.seeds) == 1 else settings.out / f"seed-{seed}"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The columns of all seeds as text, with mean and sample standard deviation ("spread")."""
    lines = ["seed      " + "".join(f"{c:>22}" for c in columns)]
    lines += [f"{row['seed']:<10}" + "".join(f"{row[c]:>22.4g}" for c in columns) for row in rows]
    for name, function in (("mean", statistics.mean), ("spread", statistics.stdev)):
        lines.append(f"{name:<10}" + "".join(f"{function([float(r[c]) for r in rows]):>22.4g}" for c in columns))
    return "\n".join(lines)
