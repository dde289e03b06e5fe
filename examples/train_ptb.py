"""Train or count the network of a recurrent cell: python examples/train_ptb.py --genotype DARTS_V2 --data-dir data/ptb

The genotype is a published cell (DARTS_V1, DARTS_V2), a file that a search wrote, a cell as the published code prints it, in a
file or in quotes ("Genotype(recurrent=[('sigmoid', 0), ...], concat=range(1, 9))"), or LSTM. With --count the script prints
{"parameters": ...} and trains nothing. The folder --data-dir contains Penn Treebank or other text; without it the text is the
documentation of Python.

Presets: paper (the default, 4000 epochs, for a GPU), small (for a laptop). Before the first step the run prints what it will
compute, and after a few steps the time and memory that it needs. Results in --out: settings.json, genotype.json and
vocabulary.json at the start, train.csv, train.png, network.pt, result.json, and a checkpoint. Where TensorBoard is installed
(`pip install tensorboard`), `tensorboard --logdir OUT` shows the columns of train.csv over the epochs: losses, perplexities, and
whether weights are averaged. With several --seeds each training has a folder of its own, and OUT/seeds.csv compares them.

`--resume --out FOLDER` continues a training with the settings in its folder; --epochs prolongs it. `--config FILE` starts a
new one with the settings in a settings.json. `--evaluate FOLDER` prints the perplexities of a trained network, `--start FOLDER`
trains it further, and `nas.load(FOLDER)` returns it as a module of PyTorch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nas.data.text import load_corpus
from nas.engine.command_line import CommandLine, errors_in_one_line, run_each_seed
from nas.engine.resume import expand
from nas.engine.run import join, launch
from nas.space.genotype import RecurrentGenotype, load_genotype
from nas.train.loading import LanguageClassifier, evaluate_text, load
from nas.train.settings import TEXT_TRAIN_PRESETS, TextTrainSettings
from nas.train.train_text import TextTraining, size_of_cell

EVALUATE = "Folder of a training whose network is evaluated on the validation and the test text; nothing is trained."
COLUMNS = ("train_perplexity", "valid_perplexity", "test_perplexity")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train; return the row of the best epoch of each seed, with the perplexity on the test text."""
    words = CommandLine(expand(argv, "train_ptb", "runs/train_ptb"))
    trained = words.value("--evaluate", EVALUATE, "FOLDER")
    settings = words.settings(TEXT_TRAIN_PRESETS, __doc__)
    with errors_in_one_line():
        if trained is not None:
            return [evaluate_folder(Path(trained), settings)]
        cell = None if settings.genotype.upper() == "LSTM" else load_genotype(settings.genotype, RecurrentGenotype)
        if settings.count:
            print(json.dumps(size_of_cell(cell, settings)))
            return []

    def one(seed: int, out: Path) -> dict[str, Any]:
        make = lambda processes, device: TextTraining(cell, settings, seed, out, processes, device)
        row = launch(make, settings, out)
        print(f"\n{row['parameters'] / 1e6:.2f} M parameters, best epoch {row['epoch']}")
        print(f"perplexity: validation {row['valid_perplexity']:.2f}, test {row['test_perplexity']:.2f}")
        if row["rollbacks"]:
            print(
                f"the loss was not finite {row['rollbacks']} times, and training returned to the best epoch: a lower lr may help"
            )
        print(f"written: {out}/train.csv, {out}/result.json, {out}/network.pt")
        return row

    return run_each_seed(settings, one, COLUMNS)


def evaluate_folder(folder: Path, settings: TextTrainSettings) -> dict[str, Any]:
    """Print the perplexities of the network in a folder, and return them with the losses."""
    _, device = join(settings)
    net = load(folder, device)
    if not isinstance(net, LanguageClassifier):
        raise ValueError(f"{folder} must be the folder of a training on text, got one on images")
    row = evaluate_text(net, load_corpus(settings.data_dir), settings)
    print(f"perplexity: validation {row['valid_perplexity']:.2f}, test {row['test_perplexity']:.2f}")
    return row


if __name__ == "__main__":
    main()
