"""Train or count the network of a genotype: python examples/train_cifar10.py --genotype DARTS_V2 --data-dir data --out runs/train

The genotype is a published name (DARTS_V1, DARTS_V2, PDARTS, PC_DARTS, ISTA, ...), a file that a search wrote, or a genotype as
the published code prints it, in a file or in quotes: "Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6),
reduce=[...], reduce_concat=range(2, 6))", or a cell of NAS-Bench-201, "|nor_conv_3x3~0|+|none~0|...", which is trained as there
with --preset nasbench201. With --count the script prints {"parameters": ..., "macs": ...} and trains nothing.

Data: CIFAR-10 or CIFAR-100. Own images of one size with sides divisible by 4, in DIR/train/CLASS and DIR/val/CLASS: `--data
folder --data-dir DIR`, with `--auxiliary 0` unless their sides are 32, 36 or 40 pixels. Images of any size in such folders:
--imagenet trains the mobile network on crops of them.

Presets: paper (the default, 600 epochs), long (1200), small (for a laptop), nasbench201, and others. Before the first step the
run prints what it will compute, and after a few steps the time and memory that it needs. Results in --out: settings.json and
genotype.json at the start, train.csv, train.png, network.pt, result.json, and a checkpoint. Where TensorBoard is installed (`pip
install tensorboard`), `tensorboard --logdir OUT` shows the columns of train.csv over the epochs: learning rate, losses and
accuracies. With several --seeds each training has a folder of its own, and OUT/seeds.csv compares them.

`--resume --out FOLDER` continues a training with the settings in its folder; --epochs prolongs one without schedules.
`--config FILE` starts a new one with the settings in a settings.json. `--evaluate FOLDER` prints the accuracy of a trained
network, `--start FOLDER` trains it further, and `nas.load(FOLDER)` returns it as a module of PyTorch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nas.engine.command_line import CommandLine, errors_in_one_line, first_process, run_each_seed
from nas.engine.resume import expand
from nas.engine.run import join, launch
from nas.space import genotype
from nas.train.loading import ImageClassifier, evaluate_images, load
from nas.train.settings import CIFAR_TRAIN_PRESETS, IMAGENET_TRAIN_PRESETS, CifarTrainSettings
from nas.train.train_cifar import GenotypeTraining, size_of_genotype

IMAGENET = "Train the mobile network of ImageNet on images of any size, decoded in every epoch; see --data folder for small ones."
EVALUATE = "Folder of a training whose network is evaluated on the validation images; nothing is trained."
COLUMNS = ("train_accuracy", "valid_accuracy", "valid_top5")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train; return the last row of the table of each seed."""
    words = CommandLine(expand(argv, "train_cifar10", "runs/train"))
    trained = words.value("--evaluate", EVALUATE, "FOLDER")
    presets = IMAGENET_TRAIN_PRESETS if words.flag("--imagenet", IMAGENET) else CIFAR_TRAIN_PRESETS
    settings = words.settings(presets, __doc__)
    with errors_in_one_line():
        if trained is not None:
            return [evaluate(Path(trained), settings)]
        chosen = genotype.load_image_genotype(settings.genotype)
        if settings.classes and not settings.count:
            raise ValueError(f"classes is for --count only, as a training has the classes of its data, got {settings.classes}")
        if settings.count:
            print(json.dumps(size_of_genotype(chosen, settings)))
            return []

    def one(seed: int, out: Path) -> dict[str, Any]:
        make = lambda processes, device: GenotypeTraining(chosen, settings, seed, out, processes, device)
        row = launch(make, settings, out)
        if first_process():
            print(f"\nvalidation accuracy {100 * row['valid_accuracy']:.2f} %\nwritten: {out}/train.csv, {out}/network.pt")
        return row

    return run_each_seed(settings, one, COLUMNS)


def evaluate(folder: Path, settings: CifarTrainSettings) -> dict[str, Any]:
    """Print loss and accuracy of the network in a folder on the validation images, and return them."""
    _, device = join(settings)
    net = load(folder, device)
    if not isinstance(net, ImageClassifier):
        raise ValueError(f"{folder} must be the folder of a training on images, got one on text")
    row = dict(zip(("valid_loss", "valid_accuracy", "valid_top5"), evaluate_images(net, settings, device)))
    print(f"validation accuracy {100 * row['valid_accuracy']:.2f} %, top-5 {100 * row['valid_top5']:.2f} %")
    return row


if __name__ == "__main__":
    main()
