"""What a cap on the extrapolation of HAPG and AdamHAPG saves and costs: python benchmarks/extrapolation.py

Three experiments, each with the rule of the paper ("nesterov", u_t = (t-2)/(t+1)) and with caps on u_t:

  digits  the 64-40-20-10 network of the DIGITS ablation, batches of 16, 64 and 256, without penalty and with a sparse group
          lasso, constant lr: validation accuracy, zeros and training loss at the prox point after 150 epochs
  noisy   f(x) = ||x||^2 / 2 with gradients x + noise, noise ~ N(0, 1): rms of the prox point after 1000 and 8000 steps
  exact   least squares with exact gradients and condition number 1e2, 1e3 and 1e4: steps until f has fallen by a factor of 1e6

All rules, strengths and seeds of a digits run are one stack of networks. Writes extrapolation.csv and extrapolation.png into
--out and prints the table. Finished runs are kept in --out/stages: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from digits import in_torch, problem
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from proxopt import SparseGroupLasso, updates
from proxopt_torch import HAPG, AdamHAPG

RULES = ("nesterov", 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
STRENGTHS = (0.0, problem.LARGEST)
DIGITS = {"AdamHAPG": (AdamHAPG, 1e-3), "HAPG": (HAPG, 0.05)}
NOISY = {"AdamHAPG": (updates.adam_hapg, (1e-2, 1e-3)), "HAPG": (updates.hapg, (0.1, 0.01))}
EXACT = {"AdamHAPG": (updates.adam_hapg, 1e-2), "HAPG": (updates.hapg, 1.0)}  # HAPG: 1 / the Lipschitz constant
CONDITIONS = (1e2, 1e3, 1e4)
FALL = 1e-6
FIELDS = (
    *("experiment", "optimizer", "lr", "batch", "strength", "condition", "rule", "seed"),
    *("accuracy", "zeros", "loss", "rms_1000", "rms_8000", "steps"),
)


@dataclass(frozen=True)
class Settings:
    epochs: int = 150
    seeds: int = 3
    batches: tuple[int, ...] = (16, 64, 256)
    noisy_steps: int = 8000
    exact_steps: int = 20_000  # an entry of the table that needs more stays empty

    def __post_init__(self) -> None:
        for name in ("epochs", "seeds", "noisy_steps", "exact_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


# -- digits -----------------------------------------------------------------------------------


class Stack:
    """Networks of all seeds, rules and strengths, (seeds, rules * strengths, ...), in one optimizer.

    The optimizer extrapolates by 0, so that its step ends at the prox points; the extrapolation, which differs between the
    networks, is done here.
    """

    def __init__(self, settings: problem.Settings, make: Callable[..., Any], lr: float) -> None:
        self.weights, self.biases = in_torch.initial(settings, len(RULES) * len(STRENGTHS))
        penalty = SparseGroupLasso(torch.tensor(STRENGTHS * len(RULES)).reshape(1, -1, 1, 1), 0.5, problem.OUTGOING)
        groups = [{"params": self.weights, "penalty": penalty}, {"params": self.biases}]
        self.optimizer = make(groups, lr=lr, extrapolation=0.0, check_finite=False)  # a rule may diverge, the others go on
        self.points = [p.detach().clone() for p in self.weights + self.biases]
        self.steps = 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        in_torch.loss_of(images, labels, self.weights, self.biases).backward()
        self.optimizer.step()
        self.steps += 1
        u = torch.tensor([updates.momentum(self.steps, rule) for rule in RULES]).repeat_interleave(len(STRENGTHS))
        with torch.no_grad():
            for x, last in zip(self.weights + self.biases, self.points):
                search = x + u.reshape(1, -1, 1, 1) * (x - last)
                last.copy_(x)
                x.copy_(search)

    @torch.no_grad()
    def measure(self, data: problem.Data) -> dict[str, Tensor]:
        """Of the prox points, (seeds, rules, strengths)."""
        images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        weights, biases = self.points[: len(self.weights)], self.points[len(self.weights) :]
        nets = weights[0].shape[1]
        target = labels[:, None].expand(-1, nets, -1).flatten(0, 1)
        losses = F.cross_entropy(in_torch.logits(images, weights, biases), target, reduction="none").mean(1)
        zeros = sum((w == 0).sum((2, 3)) for w in weights) / sum(w[0, 0].numel() for w in weights)
        accuracy = torch.from_numpy(problem.accuracy(data, in_torch.arrays(weights, biases)))
        found = {"accuracy": accuracy, "zeros": zeros, "loss": losses.unflatten(0, (-1, nets))}
        return {name: v.unflatten(1, (len(RULES), len(STRENGTHS))) for name, v in found.items()}


def digits(optimizer: str, batch: int, settings: Settings, bar: tqdm) -> Iterator[dict]:
    make, lr = DIGITS[optimizer]
    shape = problem.Settings(seeds=settings.seeds, epochs=settings.epochs, batch=batch, drop_last=True)
    data, stack = problem.Data(shape), Stack(shape, make, lr)
    batches = in_torch.Batches(data)
    for epoch in range(settings.epochs):
        for images, labels in batches.epoch(epoch):
            stack.step(images, labels)
        bar.update(digits_cost(batch))
    found = stack.measure(data)
    for i, rule in enumerate(RULES):
        for j, strength in enumerate(STRENGTHS):
            for seed in range(settings.seeds):
                values = {name: float(v[seed, i, j]) for name, v in found.items()}
                yield {"lr": lr, "batch": batch, "strength": strength, "rule": rule, "seed": seed} | values


def digits_cost(batch: int) -> int:
    """Steps of an epoch, in those of the other experiments: a stack of networks takes about a hundred times as long."""
    return 100 * (1347 // batch)


# -- least squares ----------------------------------------------------------------------------


def noisy(optimizer: str, lr: float, rule: Any, settings: Settings, bar: tqdm) -> Iterator[dict]:
    update, _ = NOISY[optimizer]
    rng, x, state, rms = np.random.default_rng(0), np.zeros(500), None, {}
    for t in range(1, settings.noisy_steps + 1):
        x, state = update(x, x + rng.normal(size=500), state, None, lr=lr, extrapolation=rule)
        if t in (1000, 8000):
            rms[f"rms_{t}"] = float(np.sqrt(np.mean(state.point**2)))
    bar.update(settings.noisy_steps)
    yield {"lr": lr, "rule": rule} | rms


def exact(optimizer: str, condition: float, rule: Any, settings: Settings, bar: tqdm) -> Iterator[dict]:
    """Eigenvalues from 1 / condition to 1, spread evenly in the logarithm, in a random basis."""
    update, lr = EXACT[optimizer]
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    hessian = basis * np.geomspace(1 / condition, 1, 50) @ basis.T
    x, state = rng.normal(size=50), None
    first = x @ hessian @ x
    needed: Any = ""
    for t in range(1, settings.exact_steps + 1):
        x, state = update(x, hessian @ x, state, None, lr=lr, extrapolation=rule)
        if state.point @ hessian @ state.point <= FALL * first:
            needed = t
            break
    bar.update(settings.exact_steps // 4)
    yield {"lr": lr, "condition": condition, "rule": rule, "steps": needed}


# -- stages -----------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A part that is computed, and kept, as a whole: its name, what bar it fills, and its rows."""

    name: str
    cost: int
    rows: Callable[[tqdm], Iterator[dict]]


def stages(s: Settings) -> Iterator[Stage]:
    for name, (_, lrs) in NOISY.items():
        for lr in lrs:
            for rule in RULES:
                work = lambda bar, a=(name, lr, rule): noisy(*a, s, bar)
                yield Stage(f"noisy-{name}-{lr:g}-{rule}", s.noisy_steps, work)
    for name in EXACT:
        for condition in CONDITIONS:
            for rule in RULES:
                work = lambda bar, a=(name, condition, rule): exact(*a, s, bar)
                yield Stage(f"exact-{name}-{condition:g}-{rule}", s.exact_steps // 4, work)
    for batch in sorted(s.batches, reverse=True):
        for name in DIGITS:
            work = lambda bar, a=(name, batch): digits(*a, s, bar)
            yield Stage(f"digits-{name}-{batch}", s.epochs * digits_cost(batch), work)


def run(settings: Settings, out: Path) -> list[dict]:
    todo, rows = list(stages(settings)), []
    patience = 0.5 if sys.stderr.isatty() else 15.0  # seconds between lines of progress
    with tqdm(total=sum(stage.cost for stage in todo), unit="step", unit_scale=True, smoothing=0.02, mininterval=patience) as bar:
        for stage in todo:
            bar.set_description(stage.name, refresh=False)
            experiment, optimizer = stage.name.split("-")[:2]
            head = {"experiment": experiment, "optimizer": optimizer}
            path = out / "stages" / f"{stage.name}.json"
            if path.exists():
                bar.update(stage.cost)
                rows += read(path, settings)
            else:
                rows += write(path, settings, [head | row for row in stage.rows(bar)])
    return rows


def read(path: Path, settings: Settings) -> list[dict]:
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["settings"] != plain(settings):
        raise SystemExit(f"{path} was written with other settings, {saved['settings']}: choose another --out, or --fresh")
    return saved["rows"]


def write(path: Path, settings: Settings, rows: list[dict]) -> list[dict]:
    """In one move: a file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps({"settings": plain(settings), "rows": rows}), encoding="utf-8")
    os.replace(draft, path)
    return rows


def plain(settings: Settings) -> dict:
    return asdict(settings) | {"batches": list(settings.batches)}


# -- table and picture ------------------------------------------------------------------------


def pick(rows: list[dict], measure: str, **wanted: Any) -> list[float]:
    """The numbers of the rows that match; a number that was not reached is NaN."""
    own = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    return [math.nan if r.get(measure, "") == "" else r[measure] for r in own]


def table(rows: list[dict], settings: Settings) -> str:
    """The rule of the paper beside the default, as Markdown."""
    columns = [(name, rule) for name in DIGITS for rule in ("nesterov", updates.EXTRAPOLATION)]

    def percent(measure: str, batch: int, strength: float) -> Callable[[str, Any], str]:
        def cell(name: str, rule: Any) -> str:
            values = pick(rows, measure, optimizer=name, batch=batch, strength=strength, rule=rule)
            return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.pstdev(values):.1f}"

        return cell

    def distance(which: int) -> Callable[[str, Any], str]:
        def cell(name: str, rule: Any) -> str:
            wanted = {"experiment": "noisy", "optimizer": name, "lr": NOISY[name][1][which], "rule": rule}
            early, late = (pick(rows, measure, **wanted)[0] for measure in ("rms_1000", "rms_8000"))
            return f"{early:.2f}, {late:.2f}"

        return cell

    def needed(condition: float) -> Callable[[str, Any], str]:
        def cell(name: str, rule: Any) -> str:
            (steps,) = pick(rows, "steps", optimizer=name, condition=condition, rule=rule)
            return f"> {settings.exact_steps}" if math.isnan(steps) else f"{steps:.0f}"

        return cell

    lines = {f"digits, batch {b}: accuracy %": percent("accuracy", b, 0.0) for b in settings.batches}
    lines |= {f"the same, penalised, batch {b}": percent("accuracy", b, STRENGTHS[-1]) for b in settings.batches}
    lines |= {f"penalised, batch {b}: zeros %": percent("zeros", b, STRENGTHS[-1]) for b in settings.batches}
    for i, lrs in enumerate(zip(*(rates for _, rates in NOISY.values()))):
        text = " and ".join(f"{lr:g}" for lr in lrs)
        lines[f"noisy gradients, lr {text}: rms distance after 1000, 8000 steps"] = distance(i)
    lines |= {f"exact gradients, condition {c:.0e}: steps to 1e-6": needed(c) for c in CONDITIONS}
    head = ["", *(f"{name}, {rule if rule == 'nesterov' else f'cap {rule:g} (default)'}" for name, rule in columns)]
    body = [[text, *(cell(*column) for column in columns)] for text, cell in lines.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


COLORS = ("#1b6ca8", "#d95f02", "#66a61e")


def draw(rows: list[dict], settings: Settings, path: Path) -> None:
    """A row for each optimizer: accuracy on digits, zeros, distance under noise, steps without noise, over the rules."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rules = [*RULES[1:], RULES[0]]
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.6), constrained_layout=True)
    for line, name in zip(axes, DIGITS):
        for batch, color in zip(settings.batches, COLORS):
            for strength, style in zip(STRENGTHS, ("--", "-")):
                by_rule = [pick(rows, "accuracy", optimizer=name, batch=batch, strength=strength, rule=r) for r in rules]
                means = [100 * statistics.mean(v) for v in by_rule]
                text = f"batch {batch}" + (", penalised" if strength else "")
                line[0].plot(range(len(rules)), means, style, color=color, marker="o", markersize=3, label=text)
            by_rule = [pick(rows, "zeros", optimizer=name, batch=batch, strength=STRENGTHS[-1], rule=r) for r in rules]
            means = [100 * statistics.mean(v) for v in by_rule]
            line[1].plot(range(len(rules)), means, color=color, marker="o", markersize=3, label=f"batch {batch}")
        for rate, color in zip(NOISY[name][1], COLORS):
            for measure, style in (("rms_1000", "--"), ("rms_8000", "-")):
                values = [pick(rows, measure, experiment="noisy", optimizer=name, lr=rate, rule=r)[0] for r in rules]
                text = f"lr {rate:g}, {measure[4:]} steps"
                line[2].plot(range(len(rules)), values, style, color=color, marker="o", markersize=3, label=text)
        for condition, color in zip(CONDITIONS, COLORS):
            values = [pick(rows, "steps", optimizer=name, condition=condition, rule=r)[0] for r in rules]
            line[3].plot(range(len(rules)), values, color=color, marker="o", markersize=3, label=f"condition {condition:.0e}")
        line[0].set(ylim=(70, 99.5), title=f"{name}, digits: accuracy %, diverged below the frame")
        line[1].set(title=f"{name}, digits, penalised: zeros %")
        line[2].set(yscale="log", title=f"{name}, noisy gradients: rms distance")
        line[3].set(yscale="log", title=f"{name}, exact gradients: steps to 1e-6")
        for axis in line:
            axis.set_xticks(range(len(rules)), [r if r == "nesterov" else f"{r:g}" for r in rules])
            axis.title.set_fontsize(10)
            axis.tick_params(which="both", labelsize=8)
            axis.axvline(rules.index(updates.EXTRAPOLATION), color="black", linewidth=0.6, linestyle=":")
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("cap on u_t (dotted: default)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/extrapolation"), help="folder for results and finished runs")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs in --out")
    for name in ("epochs", "seeds", "noisy_steps", "exact_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name), help="default %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=Settings.batches, help="default %(default)s")
    args = parser.parse_args(argv)
    try:
        settings = Settings(args.epochs, args.seeds, tuple(args.batches), args.noisy_steps, args.exact_steps)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # the matrices are too small to share
    if args.fresh:
        for file in (args.out / "stages").glob("*.json"):
            file.unlink()
    rows = run(settings, args.out)
    with (args.out / "extrapolation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, settings, args.out / "extrapolation.png")
    print(table(rows, settings))
    print(f"\nwritten: {args.out}/extrapolation.csv, {args.out}/extrapolation.png")


if __name__ == "__main__":
    main()
