"""Search for an architecture on images: python examples/nas_cifar10.py --method sparse_supernet --preset small --data-dir data

Methods: sparse_supernet (SparseNAS; with --rule sound by architecture steps that are not in the paper), ista (ISTA-NAS, which can
search and train in one run, --one-stage), gsparsity (which can find the strength of the penalty for a wanted size, --want-paths
or --want-parameters), darts (with --early-stop DARTS-ES), pc_darts. Presets: paper (the default, for a GPU), small (for a
laptop), and others of some methods. examples/PUBLISHED.md has the commands for the tables and figures of the papers. All other
options are settings, most of which depend on the method.

Data: CIFAR-10 or CIFAR-100, or own images of one size with sides divisible by 4, with `--data folder --data-dir DIR`. Their files
lie in DIR/train/CLASS, and those to validate trainings in DIR/val/CLASS; without a folder val, a tenth of train is kept for them.
Two halves of train are for the weights and for the architecture, with --levels 1 all but a tenth is for both; gsparsity and
--one-stage train on all of it, and are evaluated on val. Images are grey, coloured, with transparency, or arrays (H, W, C) of
bytes with any number of channels in .npy files.

With --space nasbench201 the result is a cell of NAS-Bench-201, with one operation on each edge; its published string is the
column architecture. --preset nasbench201 is the published network, nasbench201_small a proxy that needs a few minutes.

Before the first step the run prints what it will compute, and after a few steps the time and memory that it needs. Results in
--out: genotype.json, report.html, cells.svg, weights.png, search.csv; with --method ista also distances.png; with --one-stage
also train.png and network.pt, the trained network. `examples/train_cifar10.py --genotype OUT/genotype.json` trains the result.
Where TensorBoard is installed (`pip install tensorboard`), `tensorboard --logdir OUT` shows the columns of search.csv over the
epochs while the search runs: losses and accuracies (train, valid, and restricted: of the nonzero paths alone), the learning rate,
paths, nodes and zeros of each cell, and what the method adds, such as the strength of the penalty.

`--resume --out FOLDER` continues a search with the method and settings in its folder, --config FILE starts a new one with those
in a settings.json. Ctrl-C and SIGTERM let it finish its step, and save.

With several --seeds each search has a folder of its own, and OUT/seeds.csv compares them. DARTS trains each result for a short
time and keeps the best: `--seeds 0 1 2 3 --select-by-training 100`.

Under torchrun the processes share every batch. With --framework jax the search runs in JAX, on all devices that it finds (TPU,
GPU or CPU), which share every batch; several hosts find each other with --coordinator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nas.engine import report
from nas.engine.command_line import CommandLine, errors_in_one_line, run_each_seed
from nas.engine.resume import expand
from nas.methods.frameworks import registry_of
from nas.methods.search_method import RULE_HELP, RULES
from nas.methods.selection import Selection
from nas.space import genotype
from nas.space.spaces import get_space

METHOD = """Search method. sparse_supernet: SparseNAS, a sparse group lasso on architecture weights. ista: ISTA-NAS, sparse
coding of the paths into each node. gsparsity: group sparsity on the weights of the operations. darts and pc_darts: baselines,
DARTS (with --early-stop DARTS-ES) and PC-DARTS."""


def columns(space: str) -> list[str]:
    """The columns of OUT/seeds.csv for searches in this space."""
    layout = get_space(space).layout
    counts = [f"{what}_{cell}" for what in ("paths", "nodes") for cell in layout.cells]
    return ["valid_accuracy", "restricted_accuracy", *counts, *(["architecture"] if layout.name == "nasbench201" else [])]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Search; return the row of the result of each seed."""
    words = CommandLine(expand(argv, "nas_cifar10", "runs/nas_cifar10"))
    registry = registry_of(words)
    method = words.option("--method", registry.CIFAR, "sparse_supernet", METHOD)
    chosen = registry.CIFAR[method]
    if words.flag("--one-stage", "Search and train the final network in one run; for --method ista of --framework torch."):
        if method not in registry.ONE_STAGE:
            able = ", ".join(registry.ONE_STAGE) or "ista of --framework torch"
            raise SystemExit(f"error: --one-stage belongs to --method {able}, got --method {method}")
        chosen = registry.ONE_STAGE[method]
    selection = Selection(words, "images")
    settings = words.settings(chosen.presets_of(words.option("--rule", RULES, "published", RULE_HELP)), __doc__)

    def search(seed: int, out: Path) -> dict[str, Any]:
        row = chosen.search(settings, seed, out)
        if registry.first_process():
            describe(method, settings, row, out, registry.cifar_size)
        return row

    selection.begin(settings, registry.first_process())
    with errors_in_one_line():
        shown = columns(settings.space)
    rows = run_each_seed(settings, search, shown, registry.first_process)
    return selection.run(settings, rows, shown, registry.first_process())


def describe(method: str, settings: Any, row: dict[str, Any], out: Path, size_of: Callable[[Any], dict[str, int]]) -> None:
    """Print a summary of the result."""
    found = genotype.load_image_genotype(out / "genotype.json")
    if isinstance(found, genotype.CellGenotype):
        print(f"\n{method}: {row['architecture']}")
    else:
        print(f"\n{method}: {row['paths_normal']} paths in the normal cell, {row['paths_reduce']} in the reduction cell")
    if not all(map(found.output_nodes, found.layout.cells)):
        print(
            f"a cell without paths cannot be trained: a smaller strength of the penalty keeps some\nwritten: {out}/genotype.json"
        )
        return
    if "frozen_nodes" in row:
        ends = f"{row['frozen_nodes']} nodes frozen by themselves, {row['stopped_nodes']} stopped"
        evaluated = "test" if report.evaluation_images(settings.plain()) == "test images" else "validation"
        print(f"{ends}, {evaluated} accuracy {100 * row['valid_accuracy']:.2f} %")
    else:
        print(f"supernet {100 * row['valid_accuracy']:.2f} %, its nonzero paths alone {100 * row['restricted_accuracy']:.2f} %")
    size = row if "parameters" in row else size_of(found)
    network, millions = report.SKETCH[found.layout.name][0], size["macs"] / 1e6
    print(f"as {network}: {size['parameters'] / 1e6:.2f} M parameters, {millions:.0f} M multiply-adds")
    print(f"written: {out}/genotype.json, {out}/report.html")


if __name__ == "__main__":
    main()
