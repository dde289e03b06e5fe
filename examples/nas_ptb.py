"""Search for a recurrent cell on text: python examples/nas_ptb.py --preset small --data-dir data/ptb

Methods: sparse_supernet (SparseNAS; --optimizer hapg shows why its paper takes AdamHAPG on text), darts, ista. Presets: paper
(the default; for a GPU) and small (for a laptop). Everything else is a setting: --method NAME --help lists those of a method.
--data-dir names a folder with Penn Treebank or with text of your own; without it the documentation of Python is the text.

The search goes into --out: genotype.json, report.html, cells.svg, weights.png, search.csv, and a checkpoint from which
--resume continues after any stop. `examples/train_ptb.py --genotype OUT/genotype.json` trains what was found. Several --seeds
give a folder each and a table of all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nas.engine import report
from nas.engine.command_line import CommandLine, run_each_seed
from nas.methods import registry
from nas.nets.torch.rnn import RecurrentNetwork, parameter_count
from nas.space import genotype

COLUMNS = ("valid_perplexity", "restricted_perplexity", "paths_recurrent", "nodes_recurrent")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Search; the last row of the table of each seed."""
    words = CommandLine(argv)
    method = words.option("--method", registry.TEXT, "sparse_supernet")
    settings = words.settings(registry.TEXT[method].presets, __doc__)

    def search(seed: int, out: Path) -> dict[str, Any]:
        row = registry.TEXT[method].search(settings, seed, out)
        describe(method, row, out)
        return row

    return run_each_seed(settings, search, COLUMNS)


def describe(method: str, row: dict[str, Any], out: Path) -> None:
    """What was found, in a few lines."""
    found = genotype.load_genotype(out / "genotype.json", genotype.RecurrentGenotype)
    print(f"\n{method}: {row['paths_recurrent']} paths into {row['nodes_recurrent']} nodes")
    print(
        f"perplexity of the supernet {row['valid_perplexity']:.2f}, of its living paths alone {row['restricted_perplexity']:.2f}"
    )
    with torch.device("meta"):
        size = parameter_count(RecurrentNetwork(found, vocabulary=10_000, hidden=850))
    print(f"as a network of 850 entries with 10 000 words: {size / 1e6:.2f} M parameters")
    for warning in report.warnings([row]):
        print(f"note: {warning}")
    print(f"written: {out}/genotype.json, {out}/report.html")


if __name__ == "__main__":
    main()
