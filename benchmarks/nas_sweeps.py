"""Effect of the settings of the sparse supernet: python benchmarks/nas_sweeps.py --sweep strength_step --data-dir data [--train]

--sweep strength_step: 0.01, 0.02 and 0.03 per epoch, accuracy and sparsity over the epochs (SparseNAS, Fig. 4). --sweep
l1_ratio: 0.3, 0.5 and 0.7 (Table 4; with --optimizer adam the other half of Table 5). --values replaces the values. One search
for each with --preset (small or paper); with --train each result is trained with the same preset of `examples/train_cifar10.py`,
or with --train-preset, for the test errors of the tables. Writes sweep.csv and sweep.png to --out; finished searches there are
not repeated, and interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.bilevel.search_cifar import CifarSearch
from nas.engine import curves
from nas.engine.log import write_csv
from nas.engine.run import launch
from nas.methods import registry
from nas.space import drawing, genotype
from nas.train.settings import CIFAR_TRAIN_PRESETS
from nas.train.train_cifar import GenotypeTraining
from stopping import in_one_line

SWEEPS = {"strength_step": (0.01, 0.02, 0.03), "l1_ratio": (0.3, 0.5, 0.7)}


def search(method: str, settings: Any, out: Path, seed: int) -> list[dict[str, Any]]:
    """Run a search, or resume it; return its rows."""
    made: list[CifarSearch] = []

    def make(processes: Any, device: Any) -> CifarSearch:
        made.append(CifarSearch(registry.CIFAR[method].method, replace(settings, resume=True), seed, out, processes, device))
        return made[0]

    launch(make, replace(settings, resume=True), out)
    return made[0].rows


def trained(settings: Any, found: genotype.Genotype, out: Path, seed: int) -> dict[str, Any]:
    """Train the result, or resume the training; return its last row."""
    settings = replace(settings, resume=True)
    return launch(lambda processes, device: GenotypeTraining(found, settings, seed, out, processes, device), settings, out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=SWEEPS, default="strength_step")
    parser.add_argument("--values", type=float, nargs="+", help="values instead of the published ones")
    parser.add_argument("--optimizer", choices=("adamhapg", "hapg", "adam"), default="adamhapg", help="of the architecture")
    parser.add_argument("--preset", choices=("small", "paper"), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="train the result of each search")
    parser.add_argument("--train-preset", choices=CIFAR_TRAIN_PRESETS, help="of the training; default: that of the search")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/nas_sweeps"))
    for name in ("epochs", "images", "channels", "layers", "batch"):
        parser.add_argument(f"--{name}", type=int, help="of the search; default: as in the preset")
    args = parser.parse_args(argv)
    chosen = {k: v for k in ("epochs", "images", "channels", "layers", "batch") if (v := getattr(args, k)) is not None}
    base = replace(registry.CIFAR["sparse_supernet"].presets[args.preset], data_dir=args.data_dir, **chosen)
    base = replace(base, optimizer=args.optimizer)
    rows, runs = [], {}
    for value in args.values or SWEEPS[args.sweep]:
        out = args.out / f"{args.sweep}-{value:g}"
        history = search("sparse_supernet", replace(base, **{args.sweep: value}), out / "search", args.seed)
        runs[f"{args.sweep} {value:g}"] = history
        row = {args.sweep: value, **{k: history[-1][k] for k in ("valid_accuracy", "restricted_accuracy", "paths_normal")}}
        row |= {k: history[-1][k] for k in ("paths_reduce", "nodes_normal", "nodes_reduce")}
        if args.train:
            settings = replace(CIFAR_TRAIN_PRESETS[args.train_preset or args.preset], data_dir=args.data_dir)
            last = trained(settings, genotype.load_genotype(out / "search" / "genotype.json"), out / "train", args.seed)
            row["test_error"] = 1 - last["valid_accuracy"]
        rows.append(row)
    write_csv(args.out / "sweep.csv", rows)
    drawing.save(curves.curves(runs), args.out / "sweep.png")
    print("".join(f"{key:>21}" for key in rows[0]))
    for row in rows:
        print("".join(f"{value:>21.4g}" for value in row.values()))
    print(f"written: {args.out}/sweep.csv, {args.out}/sweep.png")


if __name__ == "__main__":
    with in_one_line():
        main()
