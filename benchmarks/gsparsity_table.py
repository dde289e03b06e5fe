"""Several searches, several trainings of each result: python benchmarks/gsparsity_table.py --preset small --data-dir data

The protocol of GSparsity, Tables 2 and 3: each method searches with three seeds, each result is trained with three seeds, and the
table has mean and standard deviation of the test accuracy over all nine, and of the parameters over the three results. --methods
names the searches (gsparsity, darts, darts_es: DARTS with early stopping, pc_darts, ista, sparse_supernet), --space the search
space; with S1, S2 or S4 the networks have 17 cells, as in Table 3. --preset small makes searches and trainings small (hours on a
laptop), paper has the published settings; all trainings have the form of GSparsity's.

Writes table.csv (a row for each training) and summary.csv to --out. The same command continues where it was interrupted: finished
searches and trainings are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.engine.log import write_csv
from nas.methods import registry
from nas.nets.torch import cnn
from nas.space import genotype
from nas.train import train_cifar
from nas.train.settings import CIFAR_TRAIN_PRESETS, CifarTrainSettings
from nas_sweeps import trained
from stopping import in_one_line

SIZES = ("epochs", "images", "channels", "layers", "batch")
SUBSPACES = ("S1", "S2", "S3", "S4")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in registry.CIFAR}
VARIANTS["darts_es"] = "darts", {"early_stop": True}


def training_settings(preset: str, space: str) -> CifarTrainSettings:
    """The settings of the trainings, in the form of GSparsity."""
    if preset == "paper":
        return CIFAR_TRAIN_PRESETS["gsparsity_subspaces" if space in SUBSPACES else "gsparsity"]
    return replace(CIFAR_TRAIN_PRESETS["small"], form="gsparsity")


def search_settings(method: str, preset: str, space: str | None) -> Any:
    """The settings of the searches of a method."""
    name, own = VARIANTS[method]
    settings = replace(registry.CIFAR[name].presets[preset], **own)
    return settings if space is None else replace(settings, space=space)


def parameters(found: genotype.Genotype, settings: CifarTrainSettings) -> int:
    """The parameters of the network to be trained, without its auxiliary head."""
    net = train_cifar.image_network(found, replace(settings, auxiliary=0.0), 10)
    return cnn.network_size(net, (3, 32, 32))["parameters"]


def summary(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of a method: accuracy over its trainings, parameters over its searches."""
    accuracies = [row["test_accuracy"] for row in rows]
    sizes = list({row["search_seed"]: row["parameters"] for row in rows}.values())
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "method": method,
        "trainings": len(rows),
        "accuracy": statistics.mean(accuracies),
        "accuracy_spread": spread(accuracies),
        "parameters": statistics.mean(sizes),
        "parameters_spread": spread(sizes),
    }


def of_method(method: str, searching: Any, training: CifarTrainSettings, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Search and train with all seeds; return a row for each training."""
    rows = []
    for seed in args.search_seeds:
        out = args.out / method / f"search-{seed}"
        registry.CIFAR[VARIANTS[method][0]].search(searching, seed, out)
        found = genotype.load_genotype(out / "genotype.json")
        size = parameters(found, training)
        for number in args.train_seeds:
            last = trained(training, found, out / f"train-{number}", number)
            row = {"method": method, "search_seed": seed, "train_seed": number, "parameters": size}
            rows.append({**row, "test_accuracy": last["valid_accuracy"]})
            print(
                f"{method}, search {seed}, training {number}: {100 * last['valid_accuracy']:.2f} %, {size / 1e6:.2f} M parameters"
            )
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all searches and trainings, print and write the tables; return the summary of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=["gsparsity"])
    parser.add_argument("--preset", choices=("small", "paper"), default="small", help="of searches and trainings")
    parser.add_argument("--space", help="search space; default: as in the preset")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/gsparsity_table"))
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, help="of the searches; default: as in the preset")
        parser.add_argument(f"--train-{name}", type=int, help="of the trainings; default: as in the preset")
    args = parser.parse_args(argv)
    given = lambda prefix: {k: v for k in SIZES if (v := getattr(args, prefix + k)) is not None}
    training = replace(training_settings(args.preset, args.space or ""), data_dir=args.data_dir, **given("train_"))
    rows, table = [], []
    for method in args.methods:
        searching = search_settings(method, args.preset, args.space)
        searching = replace(searching, data_dir=args.data_dir, resume=True, **given(""))
        rows += of_method(method, searching, training, args)
        table.append(summary(method, [row for row in rows if row["method"] == method]))
        write_csv(args.out / "table.csv", rows)
        write_csv(args.out / "summary.csv", table)
    print(f"\n{'method':<18}{'trainings':>10}{'accuracy (%)':>18}{'parameters (M)':>18}")
    for row in table:
        accuracy = f"{100 * row['accuracy']:.2f} ± {100 * row['accuracy_spread']:.2f}"
        size = f"{row['parameters'] / 1e6:.2f} ± {row['parameters_spread'] / 1e6:.2f}"
        print(f"{row['method']:<18}{row['trainings']:>10}{accuracy:>18}{size:>18}")
    print(f"written: {args.out}/table.csv, {args.out}/summary.csv")
    return table


if __name__ == "__main__":
    with in_one_line():
        main()
