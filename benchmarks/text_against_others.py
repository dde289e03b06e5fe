"""Compare recurrent cells with random cells, the published one and an LSTM, all of one size and with the same training:

    python benchmarks/text_against_others.py --genotype FILE --data-dir data/ptb

Each random cell has as many nodes and paths as the given one, and no dead ends; with --same-edges also as many paths on each
edge, so that only the operations are drawn. An LSTM and the published cell DARTS_V2, or those of them that --references names,
have the width whose number of parameters is closest to that of the first given cell. Every network is trained with every seed,
for a number of epochs fixed in advance. Writes text_against_others.csv to --out and prints all results; finished trainings
there are not repeated, and interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.data import text
from nas.engine.log import write_csv
from nas.engine.run import launch
from nas.nets.torch.rnn import parameter_count
from nas.space import spaces
from nas.space.genotype import RecurrentGenotype, load_genotype
from nas.train import train_text
from nas.train.settings import TEXT_TRAIN_PRESETS, TextTrainSettings
from nas_against_random import alike, entrants, pairs
from stopping import in_one_line

CHOICES = ("epochs", "tokens", "batch", "lr")
REFERENCES = ["LSTM", "DARTS_V2"]


def size(cell: RecurrentGenotype | None, words: int, settings: TextTrainSettings) -> int:
    with torch.device("meta"):
        return parameter_count(train_text.language_model(cell, words, settings))


def of_size(wanted: int, cell: RecurrentGenotype | None, words: int, settings: TextTrainSettings) -> TextTrainSettings:
    """The settings with the width whose number of parameters is closest to `wanted`."""
    tried = (replace(settings, hidden=hidden) for hidden in range(8, 2 * settings.hidden))
    return min(tried, key=lambda s: abs(size(cell, words, s) - wanted))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genotype", required=True, nargs="+", help="files that searches wrote, or published names")
    parser.add_argument("--random", type=int, default=3, help="how many random cells for each")
    parser.add_argument("--references", nargs="*", choices=REFERENCES, default=REFERENCES, help="other networks of that size")
    parser.add_argument("--same-edges", action="store_true", help="draw operations only: as many paths on each edge")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", choices=TEXT_TRAIN_PRESETS, default="small")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/text_against_others"))
    parser.add_argument("--threads", type=int, default=0)
    for name in CHOICES:
        parser.add_argument(f"--{name}", type=float if name == "lr" else int, help="of the trainings; default: as in the preset")
    args = parser.parse_args(argv)
    chosen = {k: v for k in CHOICES if (v := getattr(args, k)) is not None}
    settings = replace(TEXT_TRAIN_PRESETS[args.preset], data_dir=args.data_dir, threads=args.threads, resume=True, **chosen)
    words = len(text.load_corpus(args.data_dir).vocabulary)
    cells = [load_genotype(name, RecurrentGenotype).clean() for name in args.genotype]
    wanted = size(cells[0], words, settings)
    space, counted = spaces.get_space("recurrent", RecurrentGenotype), lambda g: size(g, words, settings)
    draw = lambda found, i: alike(found, space, counted, i, same_nodes=True, same_edges=args.same_edges)
    competing: dict[str, tuple[RecurrentGenotype | None, TextTrainSettings]] = {
        name: (cell, settings) for name, cell in entrants(cells, args.random, draw).items()
    }
    for name in args.references:
        cell = None if name == "LSTM" else load_genotype(name, RecurrentGenotype)
        competing[name] = cell, of_size(wanted, cell, words, settings)
    rows = []
    for name, (cell, own) in competing.items():
        for seed in args.seeds:
            out = args.out / name.replace(" ", "-") / f"seed-{seed}"
            make = lambda processes, device, c=cell, s=seed, o=out, own=own: train_text.TextTraining(
                c, own, s, o, processes, device
            )
            last = launch(make, own, out)
            if cell is not None:
                cell.save(out / "genotype.json")
            measured = {f"{part}_perplexity": last[f"{part}_perplexity"] for part in ("valid", "test")}
            rows.append({"cell": name, "hidden": own.hidden, "parameters": size(cell, words, own), "seed": seed, **measured})
    write_csv(args.out / "text_against_others.csv", rows)
    print(f"{'cell':10}{'width':>6}{'parameters':>12}   test perplexity, mean ± standard deviation, each seed")
    for name in competing:
        own_rows = [r for r in rows if r["cell"] == name]
        each = [r["test_perplexity"] for r in own_rows]
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        listed = ", ".join(f"{p:.1f}" for p in each)
        head = f"{name:10}{own_rows[0]['hidden']:>6}{own_rows[0]['parameters']:>12}"
        print(f"{head}   {statistics.mean(each):.1f} ± {spread:.1f}   ({listed})")
    print(pairs(rows, "cell", "test_perplexity", -1))
    print(f"written: {args.out}/text_against_others.csv")


if __name__ == "__main__":
    with in_one_line():
        main()
