"""Search for a recurrent cell on text: python examples/nas_ptb.py --preset small --data-dir data/ptb

Methods: sparse_supernet (SparseNAS; as published it diverges with --optimizer hapg, which is why the paper uses AdamHAPG on text;
with --rule sound by architecture steps that are not in the paper), darts, ista. Presets: paper (the default, for a GPU) and small
(for a laptop). All other options are settings, most of which depend on the method. The folder --data-dir contains Penn Treebank
or other text; without it the text is the documentation of Python.

Before the first step the run prints what it will compute, and after a few steps the time and memory that it needs. Results in
--out: genotype.json, report.html, cells.svg, weights.png, search.csv, and a checkpoint from which --resume continues an
interrupted search. `examples/train_ptb.py --genotype OUT/genotype.json` trains the result. Where TensorBoard is installed (`pip
install tensorboard`), `tensorboard --logdir OUT` shows the columns of search.csv over the epochs while the search runs: losses
and perplexities (train, valid, and restricted: of the nonzero paths alone), paths, nodes and zeros, and what the method adds.

With several --seeds each search has a folder of its own, and OUT/seeds.csv compares them. DARTS trains each result for a short
time and keeps the best: `--seeds 0 1 2 3 --select-by-training 300`.

`--resume --out FOLDER` continues a search with the method and settings in its folder, --config FILE starts a new one with those
in a settings.json. Ctrl-C and SIGTERM let it finish its step, and save.

With --framework jax the search runs in JAX, on all devices that it finds (TPU, GPU or CPU), which share every batch; several
hosts find each other with --coordinator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nas.engine.command_line import CommandLine, run_each_seed
from nas.engine.resume import expand
from nas.methods.frameworks import registry_of
from nas.methods.search_method import RULE_HELP, RULES
from nas.methods.selection import Selection
from nas.space import genotype

METHOD = """Search method. sparse_supernet: SparseNAS, a sparse group lasso on architecture weights. ista: ISTA-NAS, sparse
coding of the paths into each node. darts: the baseline."""
COLUMNS = ("valid_perplexity", "restricted_perplexity", "paths_recurrent", "nodes_recurrent")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Search; return the row of the result of each seed."""
    words = CommandLine(expand(argv, "nas_ptb", "runs/nas_ptb"))
    registry = registry_of(words)
    method = words.option("--method", registry.TEXT, "sparse_supernet", METHOD)
    selection = Selection(words, "text")
    presets = registry.TEXT[method].presets_of(words.option("--rule", RULES, "published", RULE_HELP))
    settings = words.settings(presets, __doc__)

    def search(seed: int, out: Path) -> dict[str, Any]:
        row = registry.TEXT[method].search(settings, seed, out)
        if registry.first_process():
            describe(method, row, out, registry.text_size)
        return row

    selection.begin(settings, registry.first_process())
    rows = run_each_seed(settings, search, COLUMNS, registry.first_process)
    return selection.run(settings, rows, COLUMNS, registry.first_process())


def describe(method: str, row: dict[str, Any], out: Path, size_of: Callable[[Any, int, int], int]) -> None:
    """Print a summary of the result."""
    found = genotype.load_genotype(out / "genotype.json", genotype.RecurrentGenotype)
    print(f"\n{method}: {row['paths_recurrent']} paths into {row['nodes_recurrent']} nodes")
    print(
        f"perplexity of the supernet {row['valid_perplexity']:.2f}, of its nonzero paths alone {row['restricted_perplexity']:.2f}"
    )
    size = row.get("parameters") or size_of(found, 10_000, 850)
    print(f"as a network of hidden size 850 with 10 000 words: {size / 1e6:.2f} M parameters")
    print(f"written: {out}/genotype.json, {out}/report.html")


if __name__ == "__main__":
    main()
