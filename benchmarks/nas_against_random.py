"""Compare a genotype with random ones of its size: python benchmarks/nas_against_random.py --genotype FILE --data-dir data

Each random genotype has the same number of paths in each cell, from the same space, and no dead ends; it is the one of 300 draws
with the closest number of parameters. All are trained with the same settings and every seed. Writes against_random.csv to --out
and prints all results; finished trainings there are not repeated, and interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.engine.log import write_csv
from nas.engine.run import launch
from nas.space import spaces
from nas.space.genotype import G, Genotype, load_genotype
from nas.train import train_cifar
from nas.train.settings import CIFAR_TRAIN_PRESETS


def alike(found: G, space: spaces.Space, size: Callable[[G], int], seed: int, draws: int = 300, same_nodes: bool = False) -> G:
    """Draw random genotypes with as many paths in each cell and no dead ends; return the one of closest size.

    same_nodes: also with as many active nodes, which are drawn first.
    """
    rng = np.random.default_rng(seed)
    wanted = size(found)
    best, gap = found, np.inf
    while draws and gap:
        chosen = {}
        for cell in found.layout.cells:
            paths = [p for p in space.paths(cell) if p.operation != "none"]
            if same_nodes:
                nodes = set(rng.choice(found.layout.nodes, len(found.active_nodes(cell)), replace=False).tolist())
                paths = [p for p in paths if p.node in nodes and p.source in nodes.union(found.layout.inputs)]
            chosen[cell] = [paths[i] for i in sorted(rng.choice(len(paths), len(found.paths(cell)), replace=False))]
        drawn = type(found).from_paths(**chosen)
        if drawn.clean() != drawn or (
            same_nodes and any(len(drawn.active_nodes(c)) != len(found.active_nodes(c)) for c in chosen)
        ):
            continue
        draws -= 1
        distance = abs(size(drawn) - wanted)
        if distance < gap:
            best, gap = drawn, distance
    return best


def parameters(genotype: Genotype, settings: Any) -> int:
    """The parameters of the network to be trained, without its auxiliary head."""
    with torch.device("meta"):
        net = train_cifar.image_network(genotype, replace(settings, auxiliary=0.0), 10)
    return sum(p.numel() for p in net.parameters())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genotype", required=True, help="a file that a search wrote, or a published name")
    parser.add_argument("--space", default="darts")
    parser.add_argument("--random", type=int, default=3, help="number of random genotypes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", choices=CIFAR_TRAIN_PRESETS, default="small")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/against_random"))
    for name in ("epochs", "images", "channels", "layers", "batch"):
        parser.add_argument(f"--{name}", type=int, help="of the trainings; default: as in the preset")
    args = parser.parse_args(argv)
    chosen = {k: v for k in ("epochs", "images", "channels", "layers", "batch") if (v := getattr(args, k)) is not None}
    settings = replace(CIFAR_TRAIN_PRESETS[args.preset], data_dir=args.data_dir, resume=True, **chosen)
    found = load_genotype(args.genotype).clean()
    entrants = {"searched": found}
    for i in range(args.random):
        entrants[f"random {i}"] = alike(found, spaces.get_space(args.space), lambda g: parameters(g, settings), i)
    rows = []
    for name, genotype in entrants.items():
        for seed in args.seeds:
            out = args.out / name.replace(" ", "-") / f"seed-{seed}"
            make = lambda processes, device, g=genotype, s=seed, o=out: train_cifar.GenotypeTraining(
                g, settings, s, o, processes, device
            )
            last = launch(make, settings, out)
            genotype.save(out / "genotype.json")
            rows.append(
                {
                    "genotype": name,
                    "parameters": parameters(genotype, settings),
                    "seed": seed,
                    "test_accuracy": last["valid_accuracy"],
                }
            )
    write_csv(args.out / "against_random.csv", rows)
    print(f"{'genotype':12}{'parameters':>12}   test accuracy, mean ± standard deviation, each seed")
    for name in entrants:
        own = [r for r in rows if r["genotype"] == name]
        each = [100 * r["test_accuracy"] for r in own]
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        listed = ", ".join(f"{a:.2f}" for a in each)
        print(f"{name:12}{own[0]['parameters']:>12}   {statistics.mean(each):.2f} ± {spread:.2f} %   ({listed})")
    print(f"written: {args.out}/against_random.csv")


if __name__ == "__main__":
    main()
