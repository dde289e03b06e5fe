"""Train or count the network of a recurrent cell: python examples/train_ptb.py --genotype DARTS_V2 --data-dir data/ptb

--genotype is a published cell (DARTS_V1, DARTS_V2), a file that a search wrote, a cell as the published code prints it, in a file
or in quotes ("Genotype(recurrent=[('sigmoid', 0), ...], concat=range(1, 9))"), or LSTM. --count prints {"parameters": ...} and
trains nothing. --data-dir names a folder with Penn Treebank or with text of your own; without it the documentation of Python is
the text.

Presets: paper (the default, 4000 epochs, for a GPU), small (for a laptop). The training goes into --out: train.csv, train.png,
network.pt, result.json, and a checkpoint from which --resume continues after any stop. Several --seeds give a folder each and a
table of all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tyro
from nas.engine import command_line
from nas.engine.run import carry_out
from nas.space.genotype import RecurrentGenotype, load
from nas.train.settings import TEXT_PRESETS
from nas.train.train_text import TextTraining, count

COLUMNS = ("train_perplexity", "valid_perplexity", "test_perplexity")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train; of each seed the row of the best epoch, with the perplexity on the test text."""
    argv = list(sys.argv[1:] if argv is None else argv)
    preset = TEXT_PRESETS[command_line.option(argv, "--preset", TEXT_PRESETS, "paper")]
    try:
        settings = tyro.cli(type(preset), args=argv, default=preset, description=__doc__)
        cell = None if settings.genotype.upper() == "LSTM" else load(settings.genotype, RecurrentGenotype)
        if settings.count:
            print(json.dumps(count(cell, settings)))
            return []
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None

    def one(seed: int, out: Path) -> dict[str, Any]:
        make = lambda processes, device: TextTraining(cell, settings, seed, out, processes, device)
        row = carry_out(make, settings, out)
        print(f"\n{row['parameters'] / 1e6:.2f} M parameters, best epoch {row['epoch'] + 1}")
        print(f"perplexity: validation {row['valid_perplexity']:.2f}, test {row['test_perplexity']:.2f}")
        if row["rollbacks"]:
            print(f"the loss was not finite {row['rollbacks']} times and the best epoch was taken up again: a lower lr may help")
        print(f"written: {out}/train.csv, {out}/result.json, {out}/network.pt")
        return row

    rows = command_line.each_seed(settings, one)
    if len(rows) > 1:
        print("\n" + command_line.compare(rows, COLUMNS))
    return rows


if __name__ == "__main__":
    main()
