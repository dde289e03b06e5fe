"""Rank correlation of search and test accuracy: python benchmarks/nas_kendall.py --method ista --seeds 0 1 2 3 --data-dir data

Kendall's tau between the final accuracy of a search and the test accuracy of its result, over several seeds (ISTA-NAS, Table 2).
Two-stage methods: the accuracy of the supernet on its validation half, and that of the genotype trained with --train-preset. With
--one-stage: the final accuracy of the run, and that of the same network trained from new weights without compressed variables, by
the same recipe and for as many epochs.
Writes kendall.csv and kendall.png to --out; finished runs there are not repeated, and interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.engine.log import write_csv
from nas.engine.run import launch
from nas.methods import ista_one_stage, registry
from nas.space import drawing, genotype
from nas.space.drawing import plt
from nas.train.settings import CIFAR_TRAIN_PRESETS, CifarTrainSettings, ImageTrainSettings
from nas_sweeps import search, trained
from scipy.stats import kendalltau
from stopping import in_one_line

SIZES = ("epochs", "images", "channels", "layers", "batch")


def two_stage(method: str, settings: Any, training: CifarTrainSettings, out: Path, seed: int) -> tuple[float, float]:
    """Return the accuracy of the supernet and that of the trained result."""
    row = search(method, settings, out / "search", seed)[-1]
    found = genotype.load_genotype(out / "search" / "genotype.json")
    return row["valid_accuracy"], trained(training, found, out / "train", seed)["valid_accuracy"]


def single(settings: ista_one_stage.OneStageSettings, out: Path, seed: int) -> tuple[float, float]:
    """Return the accuracy of the run and that of its network trained from new weights."""
    settings = replace(settings, resume=True)
    make = lambda processes, device: ista_one_stage.OneStageSearch(settings, seed, out / "search", processes, device)
    row = launch(make, settings, out / "search")
    shared = {f.name: getattr(settings, f.name) for f in fields(ImageTrainSettings)}
    again = CifarTrainSettings(**{**shared, "epochs": row["epoch"], "form": "one_stage"})
    return row["valid_accuracy"], trained(again, genotype.load_genotype(out / "search" / "genotype.json"), out / "train", seed)[
        "valid_accuracy"
    ]


def picture(rows: list[dict[str, Any]], tau: float, title: str) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(4.8, 4.2), constrained_layout=True)
    places = [[100 * row[key] for row in rows] for key in ("search_accuracy", "evaluation_accuracy")]
    axis.plot(*places, "o")
    for row, *place in zip(rows, *places):
        axis.annotate(str(row["seed"]), place, (4, 4), textcoords="offset points")
    axis.set(title=f"{title}, Kendall's tau {tau:.2f}", xlabel="search accuracy (%)", ylabel="evaluation accuracy (%)")
    axis.grid(alpha=0.25)
    return figure


def main(argv: list[str] | None = None) -> float:
    """Run all seeds, print and write the results; return tau."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[n for n, m in registry.CIFAR.items() if m.method], default="ista")
    parser.add_argument("--one-stage", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--preset", default="small", help="of the search; see --help of examples/nas_cifar10.py")
    parser.add_argument("--train-preset", choices=CIFAR_TRAIN_PRESETS, default="small")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/nas_kendall"))
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, help="of the search; default: as in the preset")
        parser.add_argument(f"--train-{name}", type=int, help="of the training; default: as in the preset")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < 2:
        parser.error(f"--seeds must name at least two seeds to be ranked, got {args.seeds}")
    if args.one_stage and args.method != "ista":
        parser.error(f"--one-stage belongs to --method ista, got --method {args.method}")
    given = lambda prefix: {k: v for k in SIZES if (v := getattr(args, prefix + k)) is not None}
    if args.one_stage and given("train_"):
        parser.error("--one-stage retrains by the recipe of the run: leave out the options that begin with --train-")
    presets = ista_one_stage.CIFAR_PRESETS if args.one_stage else registry.CIFAR[args.method].presets
    if args.preset not in presets:
        parser.error(f"--preset must be one of {', '.join(presets)}, got {args.preset!r}")
    settings = replace(presets[args.preset], data_dir=args.data_dir, **given(""))
    training = replace(CIFAR_TRAIN_PRESETS[args.train_preset], data_dir=args.data_dir, **given("train_"))
    title = args.method + (", one stage" if args.one_stage else "")
    rows = []
    for seed in args.seeds:
        out = args.out / title.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
        pair = single(settings, out, seed) if args.one_stage else two_stage(args.method, settings, training, out, seed)
        rows.append({"seed": seed, "search_accuracy": pair[0], "evaluation_accuracy": pair[1]})
        print(f"seed {seed}: search {100 * pair[0]:.2f} %, evaluation {100 * pair[1]:.2f} %")
    found = kendalltau(*([row[k] for row in rows] for k in ("search_accuracy", "evaluation_accuracy")))
    write_csv(args.out / "kendall.csv", rows)
    drawing.save(picture(rows, found.statistic, title), args.out / "kendall.png")
    print(f"{title}: Kendall's tau {found.statistic:.2f} over {len(rows)} seeds (p = {found.pvalue:.2f})")
    print(f"written: {args.out}/kendall.csv, {args.out}/kendall.png")
    return float(found.statistic)


if __name__ == "__main__":
    with in_one_line():
        main()
