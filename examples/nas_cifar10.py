"""Search for an architecture on CIFAR-10: python examples/nas_cifar10.py --method sparse_supernet --preset small --data-dir data

Methods: sparse_supernet (SparseNAS), darts. Presets: paper (the default; a day on a CPU for an epoch, hours on a GPU for all) and
small (a laptop). Everything else is a setting: --method NAME --help lists those of a method.

The search goes into --out: genotype.json, report.html, cells.svg, weights.png, search.csv, and a checkpoint from which
--resume continues after any stop. `examples/train_cifar10.py --genotype OUT/genotype.json` trains what was found. Several --seeds
give a folder each and a table of all. Under torchrun the processes share every batch.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from nas import cnn, genotype, report, search
from nas.methods import registry


@dataclass(frozen=True)
class Command:
    out: Path = Path("runs/nas_cifar10")
    """Folder for everything that the search writes."""
    seeds: tuple[int, ...] = (0,)
    """One search for each."""
    resume: bool = False
    """Continue what is in --out."""


def option(argv: list[str], name: str, known: Any, default: str) -> str:
    """Take `--name VALUE` or `--name=VALUE` out of the command line."""
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
        raise SystemExit(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    argv = list(sys.argv[1:] if argv is None else argv)
    methods = registry()
    method = option(argv, "--method", methods, "sparse_supernet")
    _, kind, presets = methods[method]
    preset = presets[option(argv, "--preset", presets, "paper")]
    command, settings = tyro.cli(
        tyro.conf.OmitArgPrefixes[tuple[Command, kind]],  # type: ignore[valid-type]
        args=argv,
        default=(Command(), preset),
        description=__doc__,
    )
    rows = []
    for seed in command.seeds:
        out = command.out if len(command.seeds) == 1 else command.out / f"seed-{seed}"
        try:
            row = search.run(method, settings, seed, out, command.resume)
        except (ValueError, FileExistsError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from None
        rows.append({"seed": seed, **row})
        describe(method, settings, row, out)
    if len(rows) > 1:
        compare(rows)
    return rows


def describe(method: str, settings: Any, row: dict[str, Any], out: Path) -> None:
    found = genotype.load(out / "genotype.json")
    size = cnn.count(cnn.Network(found, auxiliary=False), (3, 32, 32)) if all(map(found.living, genotype.CELLS)) else None
    print(f"\n{method}: {row['paths_normal']} paths in the normal cell, {row['paths_reduce']} in the reduction cell")
    print(f"supernet {100 * row['valid_accuracy']:.2f} %, its living paths alone {100 * row['restricted_accuracy']:.2f} %")
    if size:
        print(
            f"as a network of 20 cells, 36 channels: {size['parameters'] / 1e6:.2f} M parameters, {size['macs'] / 1e6:.0f} M MACs"
        )
    for warning in report.warnings([row]):
        print(f"note: {warning}")
    print(f"written: {out}/genotype.json, {out}/report.html")


def compare(rows: list[dict[str, Any]]) -> None:
    """All seeds, their mean and spread."""
    columns = ("valid_accuracy", "restricted_accuracy", "paths_normal", "paths_reduce", "nodes_normal", "nodes_reduce")
    print("\nseed      " + "".join(f"{c:>22}" for c in columns))
    for row in rows:
        print(f"{row['seed']:<10}" + "".join(f"{row[c]:>22.4g}" for c in columns))
    for name, function in (("mean", statistics.mean), ("spread", statistics.stdev)):
        print(f"{name:<10}" + "".join(f"{function([float(r[c]) for r in rows]):>22.4g}" for c in columns))


if __name__ == "__main__":
    main()
