"""Write checkpoints for the tests of later releases: python tests/checkpoints/write.py RELEASE   (in the root of a checkout)

Runs the commands below on the fake data of `nas_cases`, stops each in the middle as if it were killed, and stores its checkpoint
in RELEASE/NAME.pt.gz, its command line in RELEASE/commands.json, and files that other commands read in RELEASE/results.

Run this once for each release. A committed folder must not be changed, because its files represent those of the users of that
release; an existing folder is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "examples"), str(HERE.parent)]

import nas_cases  # noqa: E402
import torch  # noqa: E402
from nas.engine import checkpoint  # noqa: E402

IMAGES = "--preset small --images 32 --batch 8 --channels 1 --layers 3 --threads 1 --device cpu --checkpoint-minutes 0".split()
TEXT = "--preset small --hidden 4 --batch 4 --bptt 9 --tokens 200 --threads 1 --device cpu --checkpoint-minutes 0".split()
SEARCH = [*IMAGES, "--epochs", "2"]
TRAIN = [*IMAGES, *"--auxiliary 0 --valid-images 32".split()]
PROXSGD = [*TRAIN, *"--lr 0.3 --lr-min 0.3".split()]

# name: (program, its options, number of checkpoints after which it is stopped)
COMMANDS: dict[str, tuple[str, list[str], int]] = {
    "sparse_supernet_adamhapg": ("nas_cifar10", [*SEARCH, *"--space S1 --strength-step 0.5 --arch-lr 0.01".split()], 4),
    "sparse_supernet_hapg": (
        "nas_cifar10",
        [*SEARCH, *"--space S1 --optimizer hapg --arch-lr 0.1 --strength-step 3 --order second".split()],
        4,
    ),
    "darts": ("nas_cifar10", ["--method", "darts", *SEARCH, *"--space S3 --order second".split()], 4),
    "ista": ("nas_cifar10", ["--method", "ista", *SEARCH, *"--space S3 --recover-every 2".split()], 4),
    "ista_one_stage_searching": (
        "nas_cifar10",
        [*"--method ista --one-stage --space S2 --sparsity 1 --epochs 1 --search-epochs 3 --tolerance 0".split(), *TRAIN],
        7,
    ),
    "ista_one_stage_training": (
        "nas_cifar10",
        [*"--method ista --one-stage --space S2 --sparsity 1 --epochs 2 --search-epochs 1".split(), *TRAIN],
        7,
    ),
    "gsparsity": ("nas_cifar10", [*"--method gsparsity --space S1 --epochs 2 --mu 0.4 --tau 1".split(), *PROXSGD], 7),
    "gsparsity_direct": ("nas_cifar10", [*"--method gsparsity --space S1 --epochs 2 --mu 0.8".split(), *PROXSGD], 7),
    "train_cifar10": ("train_cifar10", [*"--genotype ISTA --epochs 2".split(), *TRAIN], 7),
    "prune_operations": (
        "prune_operations",
        [*"--genotype DARTS_V2 --epochs 2 --retrain-epochs 1 --mu 1 --tau adaptive".split(), *PROXSGD],
        7,
    ),
    "text_sparse_supernet": ("nas_ptb", [*TEXT, *"--epochs 2 --strength-step 0.05 --arch-lr 0.02".split()], 9),
    "text_hapg": ("nas_ptb", [*TEXT, *"--epochs 2 --optimizer hapg --arch-lr 0.1 --strength-step 1.9".split()], 9),
    "text_darts": ("nas_ptb", ["--method", "darts", *TEXT, "--epochs", "2", "--order", "second"], 9),
    "text_ista": ("nas_ptb", ["--method", "ista", *TEXT, "--epochs", "2"], 9),
    "train_ptb": ("train_ptb", [*TEXT, *"--genotype DARTS_V2 --epochs 3 --lr 5".split()], 9),
    "train_ptb_averaged": ("train_ptb", [*TEXT, *"--genotype DARTS_V1 --epochs 6 --patience 1 --lr 25".split()], 40),
    "train_ptb_lstm": ("train_ptb", [*TEXT, *"--genotype LSTM --epochs 2 --lr 5".split()], 9),
}


def preset_options(program: str, options: list[str], identity: dict[str, Any]) -> list[str]:
    """Options for all settings that came from the preset, because presets may differ in other releases."""
    known = {"method", "seed", "processes", "architecture", "text"} | ({"data"} if program.endswith("ptb") else set())
    out = []
    for name, value in identity.items():
        flag = name.replace("_", "-")
        if name in known or f"--{flag}" in options:
            continue
        out += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return out


def compress(source: Path, target: Path) -> None:
    target.write_bytes(gzip.compress(source.read_bytes(), 9, mtime=0))


def checksums(images: Path, text: Path) -> dict[str, str]:
    """Checksums of the files of the fake data, on which the checkpoints depend."""
    parts = ["data_batch_1", "data_batch_5", "test_batch"]
    found = {p: nas_cases.fake_images(p, 32) for p in parts}
    out = {p: hashlib.sha256(d[b"data"].tobytes() + bytes(d[b"labels"])).hexdigest() for p, d in found.items()}
    return out | {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(text.iterdir())}


def main(release: str) -> None:
    folder = HERE / release
    folder.mkdir()  # fails if it exists
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        nas_cases.fake_cifar(work / "data")
        nas_cases.fake_text(work / "corpus")
        commands = {}
        for name, (program, options, saves) in COMMANDS.items():
            place = work / ("corpus" if program.endswith("ptb") else "data")
            argv = [*options, "--data-dir", str(place), "--out", str(work / name)]
            nas_cases.stopped(importlib.import_module(program).main, argv, saves)
            file = next((work / name).rglob("checkpoint.pt"))
            compress(file, folder / f"{name}.pt.gz")
            every = [*options, *preset_options(program, options, checkpoint.load(file)["identity"])]
            commands[name] = {"program": program, "options": " ".join(every), "file": str(file.relative_to(work / name))}
        written = {"data": checksums(work / "data", work / "corpus"), "commands": commands}
        (folder / "commands.json").write_text(json.dumps(written, indent=1) + "\n")
        results(work, folder / "results")


def results(work: Path, folder: Path) -> None:
    """Write files that are results of a command and input of another one."""
    folder.mkdir()
    run = lambda program, *argv: importlib.import_module(program).main(list(argv))
    images, text = ["--data-dir", str(work / "data")], ["--data-dir", str(work / "corpus")]
    run("nas_cifar10", "--method", "ista", *SEARCH, "--epochs", "1", *images, "--out", str(work / "search"))
    run("nas_ptb", *TEXT, "--epochs", "1", *text, "--out", str(work / "search_text"))
    run("train_cifar10", "--genotype", "DARTS_V2", *TRAIN, "--epochs", "1", *images, "--out", str(work / "train"))
    run("digits_pruning", *"--epochs 40 --retrain-epochs 2 --strength 3e-3 --out".split(), str(work / "digits"))
    shutil.copy(work / "search" / "genotype.json", folder / "genotype.json")
    shutil.copy(work / "search_text" / "genotype.json", folder / "recurrent_genotype.json")
    compress(work / "train" / "network.pt", folder / "network.pt.gz")
    compress(work / "digits" / "compact.pt", folder / "compact.pt.gz")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
