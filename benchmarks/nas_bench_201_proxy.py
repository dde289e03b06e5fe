"""What a proxy of NAS-Bench-201 prefers, and after how much training:

    python benchmarks/nas_bench_201_proxy.py --table nats_bench.csv --data-dir data

A cell with 3x3 convolutions is trained alone, with one operation after the other on one of its edges. The network is the one
that searches with `--preset nasbench201_small` train (8 channels, three cells, images of 16 pixels), with each of --transitions
between its stages. Every cell is trained anew for each number of --steps, with a cosine schedule of that length, and is evaluated
on images that are held out. A search can prefer an operation for good reason only if its cell is better here after as many steps
as the search has; the table (see nas_bench_201.py) holds the accuracy after 200 epochs of the published network.

Finished trainings in --out are not repeated. Written there: proxy.csv and proxy.png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from nas.data import cifar
from nas.data.nats_bench import Table
from nas.engine.log import write_csv
from nas.methods import registry
from nas.space import drawing
from nas.space.amounts import duration
from nas.space.drawing import plt
from nas_bench_201_random import STREAM, RandomSearchSettings, evaluated, images_of, trained
from stopping import in_one_line
from worker_processes import Job, run

EDGES = ("1<-0", "2<-0", "2<-1", "3<-0", "3<-1", "3<-2")  # in the order of the published strings
OPERATIONS = ("skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
PRESET = "nasbench201_small"
KEY = ("transition", "edge", "operation", "architecture", "steps", "seed")  # columns that identify a training


def architecture(edge: str, operation: str) -> str:
    """The published string of the cell with this operation on one edge and 3x3 convolutions on all others."""
    chosen = [operation if name == edge else "nor_conv_3x3" for name in EDGES]
    nodes: dict[str, str] = defaultdict(str)
    for name, op in zip(EDGES, chosen):
        node, source = name.split("<-")
        nodes[node] += f"{op}~{source}|"
    return "+".join("|" + paths for paths in nodes.values())


def train(settings: RandomSearchSettings, cell: str, steps: int, seed: int) -> dict[str, float]:
    """Train the network of a cell for so many steps; return its loss and accuracy on the held-out images."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train_set, held_out, normalise, augment, classes = images_of(settings)
    batches = cifar.Batches(train_set, settings.batch, seed, augment, STREAM)
    net, masks, _ = trained(cell, settings, lambda done: done / steps, batches, classes)
    loss, accuracy = evaluated(net, masks, held_out, normalise)
    return {"loss": round(loss, 4), "accuracy": round(100 * accuracy, 2)}


def proxy(data_dir: Path, held_out: int) -> RandomSearchSettings:
    """The network and data of the preset of the searches."""
    preset = registry.CIFAR["darts"].presets[PRESET]
    names = ("data", "batch", "channels", "layers", "pixels", "lr", "lr_min", "momentum", "weight_decay", "clip")
    sizes = {name: getattr(preset, name) for name in names}
    return RandomSearchSettings(**sizes, images=50_000, data_dir=data_dir, held_out=held_out)


def gaps(rows: Sequence[Mapping[str, Any]], transition: str, operation: str, steps: int) -> list[float]:
    """The loss of an operation less that of a skip connection, for each seed that has both."""
    at = [row for row in rows if (row["transition"], row["steps"]) == (transition, steps)]
    skip = {row["seed"]: row["loss"] for row in at if row["operation"] == "skip_connect"}
    return [row["loss"] - skip[row["seed"]] for row in at if row["operation"] == operation and row["seed"] in skip]


def picture(rows: Sequence[Mapping[str, Any]]) -> plt.Figure:
    """The loss of every operation less that of a skip connection, over the steps, a panel for each transition."""
    transitions, operations = (list(dict.fromkeys(row[name] for row in rows)) for name in ("transition", "operation"))
    size = (1.5 + 4.6 * len(transitions), 4.2)
    figure, axes = plt.subplots(1, len(transitions), figsize=size, squeeze=False, sharey=True, layout="constrained")
    places = {row["operation"]: (row["cifar10"], row["rank"]) for row in rows}
    for axis, transition in zip(axes[0], transitions):
        for operation, marker in zip(operations, "osD^"):
            accuracy, rank = places[operation]
            points = []
            for steps in sorted({row["steps"] for row in rows}):
                if found := gaps(rows, transition, operation, steps):
                    points.append((steps, statistics.mean(found), min(found), max(found)))
            if points:
                steps, mean, low, high = zip(*points)
                axis.plot(steps, mean, marker=marker, label=f"{operation}: {accuracy:.2f} % in the table, rank {rank}")
                axis.fill_between(steps, low, high, alpha=0.15)
        shown = sorted({row["steps"] for row in rows})
        axis.set(xscale="log", xlabel="training steps", title=f"transition: {transition}")
        axis.set_xticks(shown, [f"{steps:,}".replace(",", " ") for steps in shown])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("held-out loss less that of the skip connection")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(transitions), frameon=False)
    return figure


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE", required=True, help="the accuracies of all cells")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is, or is downloaded to")
    parser.add_argument("--edge", choices=EDGES, default="3<-0")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=["skip_connect", "avg_pool_3x3", "nor_conv_3x3"])
    parser.add_argument("--transitions", nargs="+", choices=("patch", "residual"), default=["patch", "residual"])
    parser.add_argument("--steps", type=int, nargs="+", default=[500, 1500, 5000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--held-out", type=int, default=5000, help="number of images")
    parser.add_argument("--jobs", type=int, default=1, help="number of worker processes")
    parser.add_argument("--out", type=Path, default=Path("runs/nas_bench_201_proxy"))
    args = parser.parse_args(argv)
    if min(args.steps) < 1 or args.jobs < 1:
        parser.error(f"--steps and --jobs must be at least 1, got {args.steps} and {args.jobs}")
    if "skip_connect" not in args.operations:
        parser.error("--operations must hold skip_connect, with which the others are compared")
    try:
        table, base = Table.read(args.table), proxy(args.data_dir, args.held_out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, tuple[Job, dict[str, Any]]] = {}
    for seed in args.seeds:  # a first seed of everything, shortest first, then the next
        for steps in sorted(args.steps):
            for transition in args.transitions:
                for operation in args.operations:
                    cell = architecture(args.edge, operation)
                    key = dict(zip(KEY, (transition, args.edge, operation, cell, steps, seed)))
                    out = args.out / f"{transition}-{args.edge.replace('<-', 'from')}-{operation}-{steps}-{seed}"
                    settings = replace(base, transition=transition)
                    job = Job(str(out), train, (settings, cell, steps, seed), out)
                    jobs[str(out)] = job, key
    rows: list[dict[str, Any]] = []
    work, spent, todo = 0.0, 0.0, sum(key["steps"] for _, key in jobs.values())
    for job, done in run([job for job, _ in jobs.values()], workers=args.jobs):
        key = jobs[str(job.out)][1]
        if done.error:
            raise SystemExit(f"error: {job.name} failed, see {job.log}: {done.error}")
        place = table.place(key["architecture"])
        found = {"cifar10": round(place.cifar10, 2), "rank": place.rank, "cpu_seconds": round(done.cpu_seconds, 1)}
        rows.append({**key, **done.found, **found})
        work, spent = work + key["steps"], spent + done.seconds
        left = f"{duration(spent / work * (todo - work) / args.jobs)} left"
        text = f"{key['transition']:8} {key['operation']:13} {key['steps']:5} steps, seed {key['seed']}"
        scores = f"loss {rows[-1]['loss']:.4f}, {rows[-1]['accuracy']:.2f} %"
        print(f"{text}: {scores}, {done.cpu_seconds:.0f} CPU s  ({left})", flush=True)
        write_csv(args.out / "proxy.csv", sorted(rows, key=lambda row: [row[name] for name in KEY]))
    drawing.save(picture(rows), args.out / "proxy.png")
    print(f"written: {args.out}/proxy.csv, {args.out}/proxy.png")
    return rows


if __name__ == "__main__":
    with in_one_line():
        main()
