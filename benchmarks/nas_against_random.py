"""Compare genotypes with random ones of their size: python benchmarks/nas_against_random.py --genotype FILE --data-dir data

Each random genotype has the same number of paths in each cell, from the same space, and no dead ends; it is the one of 300 draws
with the closest number of parameters. With --same-edges it has as many paths on each edge, too, so that only the operations are
drawn: for results of `--rule sound` with a norm held on each edge, which keep all edges. All are trained with the same settings
and every seed. Writes against_random.csv to --out and prints all results; finished trainings there are not repeated, and
interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(File(__file__).parent.parent / "examples"))

from nas.engine.log import write_csv
from nas.engine.run import launch
from nas.space import spaces
from nas.space.genotype import G, Genotype, Path, load_genotype
from nas.train import train_cifar
from nas.train.settings import CIFAR_TRAIN_PRESETS
from stopping import in_one_line


def alike(
    found: G,
    space: spaces.Space,
    size: Callable[[G], int],
    seed: int,
    draws: int = 300,
    same_nodes: bool = False,
    same_edges: bool = False,
) -> G:
    """Draw random genotypes with as many paths in each cell and no dead ends; return the one of closest size.

    same_nodes: also with as many active nodes, which are drawn first. same_edges: with as many paths on each edge.
    """
    rng = np.random.default_rng(seed)
    wanted = size(found)
    best, gap = found, np.inf
    while draws and gap:
        chosen = {}
        for cell in found.layout.cells:
            paths = [p for p in space.paths(cell) if p.operation != "none"]
            if same_edges:
                chosen[cell] = on_same_edges(found.paths(cell), paths, rng)
                continue
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


def on_same_edges(found: Sequence[Path], paths: Sequence[Path], rng: np.random.Generator) -> list[Path]:
    """Random paths of a cell, as many on each edge as there are in `found`."""
    drawn = []
    for edge in dict.fromkeys((p.node, p.source) for p in found):
        own = [p for p in paths if (p.node, p.source) == edge]
        count = sum((p.node, p.source) == edge for p in found)
        drawn += [own[i] for i in sorted(rng.choice(len(own), count, replace=False))]
    return drawn


def entrants(genotypes: Sequence[G], count: int, draw: Callable[[G, int], G]) -> dict[str, G]:
    """The genotypes and random ones of the size of each, by name.

    count: of random ones for each. draw: makes one from a genotype and a number.
    """
    found = {}
    for i, genotype in enumerate(genotypes):
        several = len(genotypes) > 1
        found[f"searched {i}" if several else "searched"] = genotype
        found |= {f"random {i}.{j}" if several else f"random {j}": draw(genotype, i * count + j) for j in range(count)}
    return found


def pairs(rows: Sequence[Mapping[str, Any]], name: str, measure: str, sign: int) -> str:
    """In a sentence, how often a searched genotype is better than a random one of its size with the same training seed.

    name, measure: the columns of names as by `entrants` and of results, which are better the larger `sign` times the result is.
    """
    searched = {(row[name], row["seed"]): row[measure] for row in rows if row[name].startswith("searched")}
    drawn = [(searched[opponent(row[name]), row["seed"]], row[measure]) for row in rows if row[name].startswith("random")]
    better = sum(sign * (own - other) > 0 for own, other in drawn)
    return f"searched better than random of its size, with the same training seed: {better} of {len(drawn)} pairs"


def opponent(name: str) -> str:
    """The name of the searched genotype whose size a random one of this name has."""
    number, several, _ = name.removeprefix("random ").partition(".")
    return f"searched {number}" if several else "searched"


def parameters(genotype: Genotype, settings: Any) -> int:
    """The parameters of the network to be trained, without its auxiliary head."""
    with torch.device("meta"):
        net = train_cifar.image_network(genotype, replace(settings, auxiliary=0.0), 10)
    return sum(p.numel() for p in net.parameters())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genotype", required=True, nargs="+", help="files that searches wrote, or published names")
    parser.add_argument("--space", default="darts")
    parser.add_argument("--random", type=int, default=3, help="number of random genotypes for each")
    parser.add_argument("--same-edges", action="store_true", help="draw operations only: as many paths on each edge")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", choices=CIFAR_TRAIN_PRESETS, default="small")
    parser.add_argument("--data-dir", type=File, default=File("data"))
    parser.add_argument("--out", type=File, default=File("runs/against_random"))
    for name in ("epochs", "images", "channels", "layers", "batch"):
        parser.add_argument(f"--{name}", type=int, help="of the trainings; default: as in the preset")
    args = parser.parse_args(argv)
    chosen = {k: v for k in ("epochs", "images", "channels", "layers", "batch") if (v := getattr(args, k)) is not None}
    settings = replace(CIFAR_TRAIN_PRESETS[args.preset], data_dir=args.data_dir, resume=True, **chosen)
    space, size = spaces.get_space(args.space), lambda g: parameters(g, settings)
    draw = lambda found, i: alike(found, space, size, i, same_edges=args.same_edges)
    competing = entrants([load_genotype(name).clean() for name in args.genotype], args.random, draw)
    rows = []
    for name, genotype in competing.items():
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
    for name in competing:
        own = [r for r in rows if r["genotype"] == name]
        each = [100 * r["test_accuracy"] for r in own]
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        listed = ", ".join(f"{a:.2f}" for a in each)
        print(f"{name:12}{own[0]['parameters']:>12}   {statistics.mean(each):.2f} ± {spread:.2f} %   ({listed})")
    print(pairs(rows, "genotype", "test_accuracy", 1))
    print(f"written: {args.out}/against_random.csv")


if __name__ == "__main__":
    with in_one_line():
        main()
