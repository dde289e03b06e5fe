"""Search methods on NAS-Bench-201, where the accuracy of every cell is known:

    python benchmarks/nas_bench_201.py --table nats_bench.csv --data-dir data

Every method searches with every seed, as by `examples/nas_cifar10.py` with the options that are printed first, in --jobs worker
processes, of one thread each in PyTorch. For every run as it ends: the accuracy of its cell on CIFAR-10, CIFAR-100 and
ImageNet16-120 in the table, its rank among all 15 625 cells, its percentile among all and among the cells with as many
parameters, and CPU seconds. At the end a summary with baselines, and a picture. Written to --out: runs.csv, summary.csv,
summary.txt, nas_bench_201.png, and a folder for each run. Finished runs there are not repeated, and interrupted ones are resumed;
--only-summary makes the table and the picture from runs.csv alone.

Baselines that are run: random_search, which trains --cells random cells by the network and data of the search, each for the same
share of --cost CPU seconds, and returns the one with the best accuracy on held-out images. Baselines for free: a random cell, the
largest of --cells random cells, the cell with a 3x3 convolution on every edge, and published figures.

--ablation runs the sound rule of sparse_supernet, and the same with one switch after the other as in the published rule.

--table is a CSV file that is not shipped. It is exported from the file NATS-tss-v1_0-3ffb9-simple of the authors (Dong et al.,
NATS-Bench, 2021) by their package nats_bench, and has the mean test accuracies after 200 epochs and the string of each cell:
{columns}.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.data.nats_bench import COLUMNS, DATA_SETS, Table
from nas.engine.command_line import CommandLine
from nas.engine.lock import locked
from nas.engine.log import write_csv
from nas.methods.search_method import RULES
from nas.space import drawing
from nas.space.amounts import duration
from nas.space.files import write_text
from nas_bench_201_summary import picture, summary, text_table
from stopping import in_one_line
from worker_processes import RESULT, Job, run

SWITCHES = {  # of the sound rule: by name the settings that are as in the published rule without it
    "path_norm": ("path_norm",),
    "hold_norm": ("hold_norm",),
    "warmup": ("warmup",),
    "nonnegative": ("nonnegative",),
    "cap": ("cap",),
    "levels": ("levels", "order"),
    "probe_every": ("probe_every",),
    "strength": ("strength", "strength_step"),
    "optimizer": ("optimizer", "arch_lr", "constant_arch_lr", "metric"),
}
SPARSE, RANDOM = "sparse_supernet", "random_search"
SIZES = ("data", "data_dir", "images", "batch", "channels", "layers", "pixels", "transition", "device")  # of random search, too
PRESET = "nasbench201_small"
REGISTRIES = {"torch": "nas.methods.registry", "jax": "nas.methods.jax.registry"}


@dataclass(frozen=True)
class Kind:
    """A method of the command line.

    settings: those that differ from the preset. published, sound: further ones with this rule.
    """

    title: str
    method: str
    settings: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)
    sound: Mapping[str, str] = field(default_factory=dict)


METHODS = {
    # the learning rates of the preset and of the sound rule are those of the other optimizer
    "adamhapg": Kind("SparseNAS, AdamHAPG", SPARSE, {"optimizer": "adamhapg"}, sound={"arch_lr": "0.005"}),
    "hapg": Kind("SparseNAS, HAPG", SPARSE, {"optimizer": "hapg"}, published={"arch_lr": "None"}),
    "ista": Kind("ISTA-NAS", "ista"),
    "gsparsity": Kind("GSparsity", "gsparsity"),
    "darts_first": Kind("DARTS, first order", "darts", {"order": "first"}),
    "darts_second": Kind("DARTS, second order", "darts", {"order": "second"}),
}


@dataclass(frozen=True)
class Entry:
    """A method with its settings, which every seed searches with. key: names its folder. words: the options it stands for."""

    key: str
    title: str
    method: str
    framework: str
    words: tuple[str, ...]
    settings: Any

    @property
    def command(self) -> str:
        """The command line of one search."""
        framework = () if self.framework == "torch" else ("--framework", self.framework)
        return shlex.join(["python", "examples/nas_cifar10.py", "--method", self.method, *framework, *self.words])

    def plain(self) -> dict[str, Any]:
        """What identifies its results."""
        return {"method": self.method, "framework": self.framework, **self.settings.plain()}


# -- what is run ------------------------------------------------------------------------------------


def entries(names: Sequence[str], rules: Sequence[str], framework: str, changes: Sequence[str]) -> list[Entry]:
    """The searches of these methods: those of sparse_supernet by each rule."""
    pairs = [(name, rule) for name in names for rule in (rules if METHODS[name].method == SPARSE else (None,))]
    return [entry(name, rule, framework, changes) for name, rule in pairs]


def ablation(framework: str, changes: Sequence[str]) -> list[Entry]:
    """The sound rule, and the same with one switch at a time as in the published rule."""
    published, sound = entry("adamhapg", "published", framework, changes), entry("hapg", "sound", framework, changes)
    found = [sound]
    for switch, names in SWITCHES.items():
        values = {name: getattr(published.settings, name) for name in names}
        if any(value != getattr(sound.settings, name) for name, value in values.items()):
            found.append(entry("hapg", "sound", framework, changes, switch, values))
    return found


def entry(
    name: str,
    rule: str | None,
    framework: str,
    changes: Sequence[str],
    switch: str = "",
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Entry:
    """A search of a method with the options of --set that it has.

    rule: None for methods that have only one. switch: of the sound rule, to be set back to these values of its settings.
    """
    kind, own = METHODS[name], f"{name}-{rule}" if rule else name
    registered = registry(framework).CIFAR[kind.method]
    presets = registered.presets_of(rule) if rule else registered.presets
    known = {"preset", *(f.name for f in fields(presets[PRESET]))}
    chosen = {k: v for where, k, v in map(change, changes) if where in (name, own) or (where is None and k in known)}
    of_rule = getattr(kind, rule) if rule else {}
    options = {"preset": PRESET, **kind.settings, **of_rule, **chosen, **values}
    words = [word for pair in options.items() for word in option(*pair)]
    settings = CommandLine(words).settings(presets, None)
    jax = framework == "jax"
    title = ", ".join(filter(None, (kind.title, rule and f"{rule} rule", switch and f"without {switch}", jax and "in JAX")))
    key = "-".join(filter(None, (own, switch and f"without_{switch}", jax and "jax")))
    return Entry(key, title, kind.method, framework, (*(("--rule", rule) if rule else ()), *words), settings)


def registry(framework: str) -> Any:
    """The registry of the methods of a library, which is imported only here."""
    return importlib.import_module(REGISTRIES[framework])


def change(text: str) -> tuple[str | None, str, str]:
    """A word of --set, [METHOD.]NAME=VALUE, in its three parts."""
    place, equals, value = text.partition("=")
    method, _, name = place.rpartition(".")
    known = [*METHODS, *(f"{name}-{rule}" for name, kind in METHODS.items() if kind.method == SPARSE for rule in RULES)]
    if not equals or not name or (method and method not in known):
        raise SystemExit(
            f"error: --set must be NAME=VALUE or METHOD.NAME=VALUE with a METHOD of {', '.join(known)}, got {text!r}"
        )
    return method or None, name.replace("-", "_"), value


def option(name: str, value: Any) -> tuple[str, ...]:
    """A setting as words of a command line."""
    word = f"--{name.replace('_', '-')}"
    if str(value) in ("True", "False"):
        return (word if str(value) == "True" else f"--no-{word[2:]}",)
    return (word, str(value))


def refuse_unused(changes: Sequence[str], chosen: Sequence[Entry]) -> None:
    """End the program if a word of --set changes nothing."""
    for text in changes:
        where, name, _ = change(text)
        own = [e for e in chosen if where is None or e.key.startswith(where)]
        if name != "preset" and not any(hasattr(e.settings, name) for e in own):
            raise SystemExit(
                f"error: --set {text}: none of {', '.join(e.key for e in own) or 'the methods'} has a setting {name}"
            )


def search(framework: str, method: str, settings: Any, seed: int, out: Path) -> dict[str, Any]:
    """Search, or continue a search; the program of a worker process."""
    row = registry(framework).CIFAR[method].search(replace(settings, resume=True), seed, out)
    return {"rows": [{"seed": seed, "architecture": row["architecture"]}]}


def sweep(framework: str, method: str, settings: Any, seeds: tuple[int, ...], out: Path) -> dict[str, Any]:
    """Search with all seeds in one program, or continue; the program of a worker process."""
    found = registry(framework).CIFAR[method].sweep(replace(settings, resume=True), seeds, out)
    return {"rows": [{name: row[name] for name in ("seed", "architecture")} for row in found]}


# -- what is there already --------------------------------------------------------------------------


class Results:
    """The rows of finished runs in a folder, by entry and seed, and the settings of its entries."""

    def __init__(self, out: Path, table: Table) -> None:
        self.out, self.table = out, table
        self.file, self.settings_file = out / "runs.csv", out / "settings.json"
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        for row in self._read():
            self.rows[row["key"], row["seed"]] = row
        self.settings = self._read_settings()

    def _read_settings(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.settings_file.read_text(encoding="utf-8")) if self.settings_file.exists() else {}
            if not isinstance(found, dict) or not all(isinstance(settings, dict) for settings in found.values()):
                raise ValueError("it is no object of objects")
        except ValueError as error:
            raise SystemExit(f"error: {self.settings_file} must be the settings of this benchmark, but {error}") from None
        return found

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self.file.exists():
            return
        with self.file.open(encoding="utf-8", errors="replace", newline="") as opened:
            reader = csv.DictReader(opened)
            for row in reader:
                try:
                    times = {name: float(row[name]) for name in ("cpu_seconds", "seconds")}
                    own = {"key": row["key"], "title": row["title"], "seed": int(row["seed"])}
                    yield own | self.placed(row["architecture"]) | times
                except (KeyError, TypeError, ValueError) as error:
                    raise SystemExit(f"error: {self.file}, line {reader.line_num} is no row of this benchmark: {error}") from None

    def placed(self, architecture: str) -> dict[str, Any]:
        """The columns of a cell."""
        place = self.table.place(architecture)._asdict()
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in place.items()}

    def register(self, entry: Entry) -> None:
        """Write down the settings of an entry. Ends the program if the folder has results of other settings under its key."""
        plain = json.loads(json.dumps(entry.plain()))
        there = self.settings.get(entry.key)
        finished = any(key == entry.key for key, _ in self.rows) or any((self.out / entry.key).glob(f"*/{RESULT}"))
        if there is None and finished:
            raise SystemExit(f"error: {self.out} has results of {entry.key}, but no settings of them: choose another --out")
        if there is not None and there != plain:
            names = [name for name in {**there, **plain} if there.get(name) != plain.get(name)]
            listed = "; ".join(f"{name} is {there.get(name)!r}, not {plain.get(name)!r}" for name in names)
            raise SystemExit(f"error: {self.out} has results of {entry.key} by other settings ({listed}): choose another --out")
        self.settings[entry.key] = plain
        write_text(self.settings_file, json.dumps(self.settings, indent=1) + "\n")

    def add(self, entry: Entry, seed: int, architecture: str, cpu_seconds: float, seconds: float) -> dict[str, Any]:
        """Add a run, and write all of them; return its row."""
        own = {"key": entry.key, "title": entry.title, "seed": seed}
        times = {"cpu_seconds": round(cpu_seconds, 1), "seconds": round(seconds, 1)}
        row = self.rows[entry.key, seed] = own | self.placed(architecture) | times
        write_csv(self.file, self.ordered())
        return row

    def ordered(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of these entries in this order, by default of all as they came first; of each by seed."""
        order = list(dict.fromkeys(key for key, _ in self.rows)) if keys is None else list(keys)
        return sorted((r for r in self.rows.values() if r["key"] in order), key=lambda r: (order.index(r["key"]), r["seed"]))


# -- running ----------------------------------------------------------------------------------------


def jobs_of(one: Entry, seeds: Sequence[int], out: Path) -> list[tuple[Job, tuple[int, ...]]]:
    """The jobs for these seeds of an entry, each with its seeds: one for all where the library has such a program."""
    if not seeds:
        return []
    whole = one.method != RANDOM and one.framework == "jax" and registry("jax").CIFAR[one.method].sweep is not None
    found = []
    for own in [tuple(seeds)] if whole else [(seed,) for seed in seeds]:
        folder, name = out / one.key / f"seed-{'-'.join(map(str, own))}", f"{one.title}, seed {' '.join(map(str, own))}"
        if one.method == RANDOM:
            from nas_bench_201_random import search as search_random

            job = Job(name, search_random, (one.settings, own[0], folder), folder)
        else:
            arguments = (one.framework, one.method, one.settings, own if whole else own[0], folder)
            job = Job(name, sweep if whole else search, arguments, folder, (REGISTRIES[one.framework],))
        found.append((job, own))
    return found


def run_all(chosen: Sequence[Entry], seeds: Sequence[int], results: Results, workers: int) -> int:
    """Run what is not finished, and print every result as it comes; return the number of runs that failed.

    The methods take turns, so that all of them have results early.
    """
    for one in chosen:
        results.register(one)
    missing = {one.key: [seed for seed in seeds if (one.key, seed) not in results.rows] for one in chosen}
    lists = [[(one, job, own) for job, own in jobs_of(one, missing[one.key], results.out)] for one in chosen]
    longest = max(map(len, lists), default=0)
    turns = [jobs[i] for i in range(longest) for jobs in lists if i < len(jobs)]
    by_job = {job: (one, own) for one, job, own in turns}
    left, failed = list(by_job), 0
    total = len(chosen) * len(seeds)
    for job, done in run(list(by_job), workers):
        one, own = by_job[job]
        left.remove(job)
        if done.error:
            failed += len(own)
            print(f"failed: {job.name}: {done.error} (see {job.log})", flush=True)
            continue
        for row in done.found["rows"]:
            share = len(own)  # seeds that ran together cost an equal share each
            new = results.add(one, row["seed"], row["architecture"], done.cpu_seconds / share, done.seconds / share)
            count = sum((e.key, seed) in results.rows for e in chosen for seed in seeds)
            print(
                f"[{count:>{len(str(total))}}/{total}] {line(new)}{rest([by_job[j] for j in left], results, workers)}", flush=True
            )
    return failed


def line(row: dict[str, Any]) -> str:
    """The result of a run in a line."""
    accuracies = " / ".join(f"{row[name]:.2f}" for name in DATA_SETS)
    places = f"rank {row['rank']}, {row['percentile']:.2g} % of all, {row['size_percentile']:.2g} % of its size"
    return f"{row['title']}, seed {row['seed']}: {accuracies} %, {places}, {row['cpu_seconds']:.0f} CPU s  {row['architecture']}"


def rest(left: Sequence[tuple[Entry, tuple[int, ...]]], results: Results, workers: int) -> str:
    """The expected time of the runs that are left: of each method as long as its runs took, or, without any, as all took."""
    if not left:
        return ""
    rows = list(results.rows.values())
    mean = lambda own: statistics.mean(row["seconds"] for row in own or rows)
    seconds = sum(len(seeds) * mean([row for row in rows if row["key"] == one.key]) for one, seeds in left)
    return f"  ({duration(seconds / min(workers, len(left)))} left)"


def random_entry(args: argparse.Namespace, chosen: Sequence[Entry], like: Entry, results: Results) -> Entry:
    """Random search at the median cost of the chosen searches, unless --cost or the folder has another.

    like: an entry with the same network and data.
    """
    from nas_bench_201_random import RandomSearchSettings

    there = results.settings.get(RANDOM, {}).get("cost")
    costs = [row["cpu_seconds"] for row in results.ordered([one.key for one in chosen])]
    cost = args.cost or there or (round(statistics.median(costs), 1) if costs else None)
    if cost is None:
        raise SystemExit(f"error: {RANDOM} needs --cost, as there are no searches whose cost it could take")
    shared = {name: getattr(like.settings, name) for name in SIZES}
    settings = RandomSearchSettings(**{**shared, "cells": args.cells, "cost": cost, "held_out": args.held_out, "threads": 1})
    return Entry(RANDOM, f"best of {args.cells} random cells, trained", RANDOM, "torch", (), settings)


def summarise(results: Results, keys: Sequence[str] | None, cells: int, name: str) -> None:
    """Write and print the summary, and draw the picture."""
    rows = results.ordered(keys)
    if not rows:
        raise SystemExit(f"error: {results.file} has no runs to summarise")
    found = summary(rows, results.table, cells)
    text = text_table(found)
    write_csv(results.out / f"{name}summary.csv", found)
    write_text(results.out / f"{name}summary.txt", text + "\n")
    drawing.save(picture(rows, results.table), results.out / f"{name}nas_bench_201.png")
    print(
        f"\n{text}\nwritten: {', '.join(f'{results.out}/{name}{n}' for n in ('summary.txt', 'summary.csv', 'nas_bench_201.png'))}"
    )


def parser() -> argparse.ArgumentParser:
    text = __doc__.format(columns=", ".join(COLUMNS))
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--table", type=Path, required=True, metavar="FILE", help="the accuracies of all cells, see above")
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is, or is downloaded to")
    add(
        "--methods",
        nargs="+",
        choices=(*METHODS, RANDOM),
        default=[*METHODS, RANDOM],
        metavar="METHOD",
        help=f"of {', '.join((*METHODS, RANDOM))}",
    )
    add("--rule", nargs="+", choices=RULES, default=list(RULES), help="of the searches with sparse_supernet")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="[METHOD.]NAME=VALUE",
        help="settings of the searches, for all methods that have them, or preset=NAME",
    )
    add(
        "--framework",
        choices=("torch", "jax"),
        default="torch",
        help="jax: all seeds of a method are one program, but for ista and gsparsity",
    )
    add(
        "--ablation", action="store_true", help="the sound rule, and each of its switches as in the published rule, one at a time"
    )
    add("--cells", type=int, default=8, help="number of random cells of random_search, and of which the largest is taken")
    add("--held-out", type=int, default=2000, help="number of images on which random_search compares its cells")
    add("--cost", type=float, help="CPU seconds of a random_search; default: the median of the searches")
    add("--jobs", type=int, default=2, help="number of worker processes")
    add("--only-summary", action="store_true", help="run nothing")
    add("--out", type=Path, default=Path("runs/nas_bench_201"))
    return found


def main(argv: list[str] | None = None) -> int:
    """Run, print and write everything; return the exit status, 1 if a run has failed."""
    args = parser().parse_args(argv)
    if min(args.seeds) < 0 or len({*args.seeds}) < len(args.seeds):
        raise SystemExit(f"error: --seeds must be different numbers >= 0, got {' '.join(map(str, args.seeds))}")
    for name in ("cells", "held_out", "jobs"):
        if getattr(args, name) < 1:
            raise SystemExit(f"error: --{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    if args.cost is not None and not 0 < args.cost < math.inf:
        raise SystemExit(f"error: --cost must be finite and > 0, got {args.cost}")
    try:
        table = Table.read(args.table)
        if args.only_summary:
            summarise(Results(args.out, table), None, args.cells, "")
            return 0
        with locked(args.out):
            return run_and_summarise(args, Results(args.out, table))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def run_and_summarise(args: argparse.Namespace, results: Results) -> int:
    threads = ["threads=1"] if args.framework == "torch" else []  # JAX has no such setting
    changes = [f"data_dir={args.data_dir}", "checkpoint_minutes=1", "device=cpu", *threads, *args.set]
    names = [name for name in dict.fromkeys(args.methods) if name != RANDOM]
    chosen = ablation(args.framework, changes) if args.ablation else entries(names, args.rule, args.framework, changes)
    like = entry("hapg", "published", args.framework, changes)  # for the network and data of random search
    refuse_unused(args.set, chosen or [like])
    for one in chosen:
        print(f"{one.title}: {one.command}")
    failed = run_all(chosen, args.seeds, results, args.jobs)
    if RANDOM in args.methods and not args.ablation:
        last = random_entry(args, chosen, like, results)
        print(f"{last.title}: {', '.join(f'{name} {value}' for name, value in last.settings.plain().items())}")
        failed += run_all([last], args.seeds, results, args.jobs)
        chosen = [*chosen, last]
    if failed:
        print(f"{failed} runs failed; the same command tries them again")
    if failed and not results.rows:
        return 1
    keys = [one.key for one in chosen] if args.ablation else None
    summarise(results, keys, args.cells, "ablation_" if args.ablation else "")
    return int(failed > 0)


if __name__ == "__main__":
    with in_one_line():
        sys.exit(main())
