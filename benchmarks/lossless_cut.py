"""What a cut costs: train sparse, remove the channels, train on, with proxopt and with what others use:

    python benchmarks/lossless_cut.py --data-dir data --out runs/lossless_cut

Every method trains the same residual network on the same batches of CIFAR-10 with the same schedule of the learning rate, is cut
to a share of the multiply-adds of the dense network (--budgets), and trains on for a short time. Measured on all test images, in
the last epoch and never the best: the accuracy before the cut, directly after it, and after the short training; the multiply-adds
(counted by PyTorch) and parameters that are left, as shares; and the largest change of the outputs by the cut, over the largest
output. The methods are described in `lossless_cut_methods.py`.

Each method has one option that is chosen from three trial values (two for magnitude pruning): those are trained once each, with a
seed of their own, and compared on held-out training images at the smallest budget after the short training. A sparse group lasso
takes the value of the group lasso. Then each method runs with every seed of --seeds.

Every training is a process of one thread, --jobs at a time. runs.csv has all of them as they come, summary.csv and summary.txt
mean and standard deviation over the seeds, lossless_cut.png the picture. Finished trainings in --out are not repeated; one that
was interrupted starts again. --only-summary makes table and picture from runs.csv alone.

--preset small (the default) is a network of 8 layers for images of 16x16 pixels, for two CPU cores; full is ResNet-20 on all
images, for a GPU (--device cuda). Torch-Pruning and torchao come with the extra `bench`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from lossless_cut_methods import METHODS, PRESETS, Setting, run
from nas.engine.lock import locked
from nas.engine.log import write_csv
from nas.space import drawing
from nas.space.amounts import duration
from nas.space.files import write_text
from stopping import in_one_line
from worker_processes import Job
from worker_processes import run as run_jobs

TRIAL_SEED = 1000
DENSE = 1.0  # the budget of the network that is not cut
MEASURED = ("macs", "parameters", "before", "after", "trained", "gap", "cpu_seconds")
NUMBERS = ("seed", "budget", *MEASURED)


@dataclass(frozen=True)
class Training:
    """One training of a method, and the cuts of its result."""

    method: str
    value: Any
    budgets: tuple[float, ...]
    seed: int

    @property
    def trial(self) -> bool:
        return self.seed == TRIAL_SEED

    @property
    def key(self) -> str:
        budgets = "-".join(f"{b:g}" for b in self.budgets)
        return f"{self.method}/{self.value}-{budgets}-seed{self.seed}".replace(" ", "_")

    def job(self, setting: Setting, out: Path) -> Job:
        part = "held out" if self.trial else "test"
        arguments = (self.method, self.value, self.budgets, setting, self.seed, part)
        return Job(f"{METHODS[self.method].title}, {self.value}, seed {self.seed}", run, arguments, out / self.key)


def trials(names: Sequence[str], budget: float) -> list[Training]:
    """One training for each trial value of the methods that choose one."""
    chosen = {METHODS[name].value_of or name for name in names}
    return [Training(name, value, (budget,), TRIAL_SEED) for name in METHODS if name in chosen for value in METHODS[name].values]


def finals(names: Sequence[str], budgets: Sequence[float], seeds: Sequence[int], best: Mapping[str, Any]) -> list[Training]:
    """All trainings with the chosen values, one seed after the other, so that all methods have results early."""
    found = []
    for seed in seeds:
        for name in names:
            method, value = METHODS[name], best[METHODS[name].value_of or name]
            all_of = (DENSE, *budgets) if method.kind == "magnitude" else tuple(budgets)
            parts = [(b,) for b in all_of] if method.kind == "ours" else [all_of]
            found += [Training(name, value, part, seed) for part in parts]
    return found


def best_values(rows: Sequence[Mapping[str, Any]], budget: float) -> dict[str, Any]:
    """The trial value of each method with the highest accuracy in the end."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        own = [r for r in rows if r["method"] == name and r["seed"] == TRIAL_SEED and r["budget"] == budget]
        if own:
            best = max(own, key=lambda r: r["trained"])["value"]
            found[name] = next(value for value in method.values if str(value) == str(best))
    return found


def run_all(trainings: Sequence[Training], setting: Setting, out: Path, jobs: int, rows: list[dict[str, Any]]) -> int:
    """Run what is not finished, print every result as it comes, and add it to the rows; return how many failed."""
    by_job = {training.job(setting, out): training for training in trainings}
    finished, failed, seconds = 0, 0, []
    for job, done in run_jobs(list(by_job), jobs):
        training, finished = by_job[job], finished + 1
        if done.error:
            failed += 1
            print(f"failed: {job.name}: {done.error} (see {job.log})", flush=True)
            continue
        seconds.append(done.seconds)
        left = (len(by_job) - finished) * statistics.mean(seconds) / jobs
        own = {"method": training.method, "title": METHODS[training.method].title, "value": training.value, "seed": training.seed}
        for found in done.found["rows"]:
            row = own | {k: round(v, 6) for k, v in found.items()} | {"cpu_seconds": round(done.cpu_seconds, 1)}
            same = [r for r in rows if all(str(r[k]) == str(row[k]) for k in ("method", "value", "seed", "budget"))]
            if not same:
                rows.append(row)
                write_csv(out / "runs.csv", rows)
            print(f"[{finished}/{len(by_job)}] {line(row)}" + (f"  ({duration(left)} left)" if left else ""), flush=True)
    return failed


def line(row: Mapping[str, Any]) -> str:
    """A result in a line."""
    accuracies = f"{row['before']:.1f} % before the cut, {row['after']:.1f} % after it, {row['trained']:.1f} % trained on"
    return (
        f"{row['title']}, {row['value']}, seed {row['seed']}, budget {row['budget']:g}: {accuracies}; {row['macs']:.3f} of macs"
    )


# -- the summary ------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each method at each budget.

    Rows with another value than the one that the trials chose are left out: they are from before the trials were repeated.
    """
    found = []
    finals = [r for r in rows if r["seed"] != TRIAL_SEED]
    tried = [r["budget"] for r in rows if r["seed"] == TRIAL_SEED]
    best = best_values(rows, min(tried)) if tried else {}
    for budget in sorted({r["budget"] for r in finals}, reverse=True):
        for name, method in METHODS.items():
            own = [r for r in finals if r["method"] == name and r["budget"] == budget]
            chosen = str(best.get(method.value_of or name))
            own = [r for r in own if str(r["value"]) == chosen] or own
            if not own:
                continue
            title = f"dense network, {method.optimizer}" if budget == DENSE else method.title
            entry: dict[str, Any] = {
                "method": name,
                "title": title,
                "value": own[0]["value"],
                "budget": budget,
                "seeds": len(own),
            }
            for measure in MEASURED:
                values = [r[measure] for r in own]
                entry[measure] = round(statistics.mean(values), 5)
                entry[f"{measure}_sd"] = round(statistics.stdev(values), 5) if len(values) > 1 else 0.0
            entry["gap"] = max(r["gap"] for r in own)
            found.append(entry)
    return found


def text_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table of Markdown."""
    head = "| method | budget | multiply-adds | parameters | before the cut | after it | trained on | change by the cut |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for e in entries:
        accuracies = " | ".join(f"{e[m]:.1f} ± {e[f'{m}_sd']:.1f} %" for m in ("before", "after", "trained"))
        sizes = f"{e['macs']:.3f} | {e['parameters']:.3f}"
        gap = f"{e['gap']:.0e}" if e["gap"] >= 1e-6 else "< 1e-6"
        lines.append(f"| {e['title']} | {e['budget']:g} | {sizes} | {accuracies} | {gap} |")
    return "\n".join(lines)


def picture(entries: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy over multiply-adds, directly after the cut and in the end."""
    plt = drawing.plt
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), sharey=True, layout="constrained")
    styles = {
        "magnitude": ("#969696", "s"),
        "magnitude_adam": ("#525252", "s"),
        "torch_pruning": ("#fdae6b", "D"),
        "torch_pruning_adam": ("#d94801", "D"),
        "pat": ("#8c6bb1", "^"),
    }
    blues = ["#08306b", "#2171b5", "#6baed6", "#00441b", "#238b45", "#74c476", "#74c476"]
    for axis, measure, title in zip(axes, ("after", "trained"), ("directly after the cut", "after the short training")):
        ours = iter(blues)
        for name, method in METHODS.items():
            own = [e for e in entries if e["method"] == name and e["budget"] != DENSE]
            color, marker = styles.get(name) or (next(ours), "o" if method.penalty == "group lasso" else "v")
            if own:
                x, y, error = ([e[k] for e in own] for k in ("macs", measure, f"{measure}_sd"))
                axis.errorbar(x, y, error, color=color, marker=marker, capsize=3, lw=1, label=method.title)
        for dense, dashes in zip((e for e in entries if e["budget"] == DENSE), ("--", ":")):
            axis.axhline(dense[measure], color="#333333", lw=1, ls=dashes, label=dense["title"])
        axis.set(title=title, xlabel="multiply-adds, share of the dense network")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of finished trainings."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as opened:
        reader, rows = csv.DictReader(opened), []
        for row in reader:
            try:
                numbers = {k: int(row[k]) if k == "seed" else float(row[k]) for k in NUMBERS}
                rows.append({"method": row["method"], "title": row["title"], "value": row["value"]} | numbers)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {reader.line_num} is no row of this benchmark: {error}") from None
        return [{k: row[k] for k in ("method", "title", "value", *NUMBERS)} for row in rows]


def summarise(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write and print the summary, and draw the picture."""
    entries = summary(rows)
    if not entries:
        raise ValueError(f"{out / 'runs.csv'} must have finished trainings, got none")
    write_csv(out / "summary.csv", entries)
    write_text(out / "summary.txt", text_table(entries) + "\n")
    drawing.save(picture(entries), out / "lossless_cut.png")
    print(f"\n{text_table(entries)}\nwritten: {out}/summary.csv, summary.txt, lossless_cut.png")


def register(setting: Setting, out: Path) -> None:
    """Write down the settings. Refuses a folder with results of others."""
    file, plain = out / "settings.json", {k: v for k, v in asdict(setting).items() if k not in ("data_dir", "device")}
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else plain
    if there != plain:
        names = [f"{k} is {there.get(k)!r}, not {plain.get(k)!r}" for k in {**there, **plain} if there.get(k) != plain.get(k)]
        raise ValueError(f"{out} has results of other settings ({'; '.join(names)}): choose another --out")
    write_text(file, json.dumps(plain, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run, print and write everything; return the exit status, 1 if a training has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is, or is downloaded to")
    add("--out", type=Path, default=Path("runs/lossless_cut"))
    add("--preset", choices=list(PRESETS), default="small")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=f"of {', '.join(METHODS)}")
    add("--budgets", type=float, nargs="+", default=[0.5, 0.25], help="shares of the multiply-adds")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--device", default="cpu")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    for name in Setting().sizes:
        add(f"--{name.replace('_', '-')}", type=int, help="default: as in the preset")
    add("--no-trials", action="store_true", help="take the middle trial value of each method instead of choosing one")
    add("--only-summary", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    if len({*args.seeds}) < len(args.seeds) or min(args.seeds) < 0 or TRIAL_SEED in args.seeds:
        parser.error(f"--seeds must be different numbers >= 0 but {TRIAL_SEED}, got {' '.join(map(str, args.seeds))}")
    if not all(0 < b < 1 for b in args.budgets) or len({*args.budgets}) < len(args.budgets):
        parser.error(f"--budgets must be different shares in (0, 1), got {' '.join(map(str, args.budgets))}")
    if args.jobs < 1:
        parser.error(f"--jobs must be >= 1, got {args.jobs}")
    try:
        if args.only_summary:
            summarise(read_rows(args.out / "runs.csv"), args.out)
            return 0
        own = {k: v for k in PRESETS[args.preset].sizes if (v := getattr(args, k)) is not None}
        setting = replace(PRESETS[args.preset], data_dir=args.data_dir, device=args.device, **own)
        with locked(args.out):
            register(setting, args.out)
            rows = read_rows(args.out / "runs.csv")
            smallest = min(args.budgets)
            if args.no_trials:
                failed, best = 0, {n: m.values[len(m.values) // 2] for n, m in METHODS.items() if m.values}
            else:
                failed = run_all(trials(args.methods, smallest), setting, args.out, args.jobs, rows)
                best = best_values(rows, smallest)
            usable = [name for name in args.methods if (METHODS[name].value_of or name) in best]
            for name, value in best.items() if not args.no_trials else ():
                print(f"{METHODS[name].title}: {METHODS[name].knob} {value}")
            failed += run_all(
                finals(usable, sorted(args.budgets, reverse=True), args.seeds, best), setting, args.out, args.jobs, rows
            )
            summarise(rows, args.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    if failed:
        print(f"{failed} trainings failed; the same command tries them again")
    return int(failed > 0)


if __name__ == "__main__":
    with in_one_line():
        sys.exit(main())
