"""Train or count the network of a genotype: python examples/train_cifar10.py --genotype DARTS_V2 --data-dir data --out runs/train

--genotype is a published name (DARTS_V1, DARTS_V2, PDARTS, PC_DARTS, ISTA, ...), a file that a search wrote, or a genotype as
the published code prints it, in a file or in quotes: "Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6),
reduce=[...], reduce_concat=range(2, 6))". --count prints {"parameters": ..., "macs": ...} and trains nothing; --classes counts
for another number of classes. --data cifar100 trains on CIFAR-100. --imagenet takes the mobile network, and images from the
folders DATA_DIR/train/CLASS and DATA_DIR/val/CLASS.

Presets: paper (the default, 600 epochs), long (1200), small (for a laptop). The training goes into --out: train.csv, train.png,
network.pt, and a checkpoint from which --resume continues after any stop. Several --seeds give a folder each and a table of all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tyro
from nas.engine import command_line
from nas.engine.run import carry_out
from nas.space import genotype
from nas.train.settings import CIFAR_PRESETS, IMAGENET_PRESETS
from nas.train.train_cifar import Training, count

COLUMNS = ("train_accuracy", "valid_accuracy", "valid_top5")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train; the last row of the table of each seed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    imagenet = command_line.flag(argv, "--imagenet")
    presets = IMAGENET_PRESETS if imagenet else CIFAR_PRESETS
    preset = presets[command_line.option(argv, "--preset", presets, "paper")]
    try:
        settings = tyro.cli(type(preset), args=argv, default=preset, description=__doc__)
        chosen = genotype.load(settings.genotype)
        if settings.classes and not settings.count:
            raise ValueError(f"classes belongs to --count; the data say how many to train, got {settings.classes}")
        if settings.count:
            print(json.dumps(count(chosen, settings)))
            return []
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None

    def one(seed: int, out: Path) -> dict[str, Any]:
        make = lambda processes, device: Training(chosen, settings, seed, out, processes, device)
        row = carry_out(make, settings, out)
        if os.environ.get("RANK", "0") == "0":
            print(f"\nvalidation accuracy {100 * row['valid_accuracy']:.2f} %\nwritten: {out}/train.csv, {out}/network.pt")
        return row

    rows = command_line.each_seed(settings, one)
    if len(rows) > 1 and os.environ.get("RANK", "0") == "0":
        print("\n" + command_line.compare(rows, COLUMNS))
    return rows


if __name__ == "__main__":
    main()
