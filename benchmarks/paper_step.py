"""Two steps of each paper preset, with seconds and memory: python benchmarks/paper_step.py --device cuda

The cost of searches and trainings at full size: each case is the run of a command with its preset, optimizers and batches, on
as many random images or words as CIFAR-10 or Penn Treebank has. One warm-up step is followed by two timed ones. On a CPU, seconds
are CPU time and peak memory is that of the process, so each case has a process of its own.

Each case prints a line `ROW {...}` for `benchmarks/gpu.py`. If a case fails, for lack of memory for example, the others still
run. --tiny reduces every preset, to test this script.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
IMAGES = (50_000, 10_000)  # of CIFAR-10, for training and test
WORDS, VOCABULARY = (929_589, 73_760, 82_430), 10_000  # of Penn Treebank, for training, validation and test
CASES = (
    "images, sparse_supernet",
    "images, ista",
    "images, ista one-stage",
    "images, gsparsity",
    "images, darts",
    "images, training",
    "images, pruning",
    "text, sparse_supernet",
    "text, ista",
    "text, darts",
    "text, training",
)
TINY = {
    "images": {"images": 64, "channels": 4, "layers": 3, "batch": 8},
    "text": {"hidden": 8, "batch": 8, "bptt": 5},
}


def command(case: str) -> str:
    """The command line for this case alone."""
    return f'python benchmarks/paper_step.py --only "{case}"'


@cache
def data_sets(tiny: bool) -> tuple[Any, Any]:
    """Random images and random words."""
    import torch
    from nas.data import cifar, cifar_files, text

    draw = lambda n: cifar.Images(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (n,)))
    source = cifar_files.SOURCES["cifar10"]
    counts, lengths, words = ((64, 64), (600, 300, 300), 30) if tiny else (IMAGES, WORDS, VOCABULARY)
    images = cifar.Dataset("cifar10", *map(draw, counts), source.classes, source.mean, source.std)
    parts = [torch.randint(words, (n,)).numpy() for n in lengths]
    return images, text.Corpus("random words", tuple(map(str, range(words))), *parts, fingerprint="random")


def build(case: str, out: Path, device: str, tiny: bool) -> Any:
    """Build the run of a case, ready for its first step."""
    import torch

    sys.path.insert(0, str(EXAMPLES))
    from nas.bilevel.search_cifar import CifarSearch
    from nas.bilevel.search_text import TextSearch
    from nas.data import cifar, text
    from nas.engine.distributed import SINGLE_PROCESS
    from nas.methods import gsparsity, ista_one_stage, operation_pruning, registry
    from nas.methods.settings import gsparsity as gsparsity_settings
    from nas.space import genotype
    from nas.train import train_cifar, train_text
    from nas.train.settings import CIFAR_TRAIN_PRESETS, TEXT_TRAIN_PRESETS

    images, corpus = data_sets(tiny)
    cifar.load_cifar, text.load_corpus = lambda name, folder: images, lambda folder: corpus
    where, method = case.split(", ")
    own = TINY[where] if tiny else {}
    place = torch.device(device)
    end: tuple[Any, ...] = (0, out, SINGLE_PROCESS, place)  # the last arguments of every run: seed, folder, processes, device

    def at(preset: Any) -> Any:
        return replace(preset, **own)

    if case == "images, ista one-stage":
        run: Any = ista_one_stage.OneStageSearch(at(ista_one_stage.CIFAR_PRESETS["paper"]), *end)
    elif case == "images, gsparsity":
        run = gsparsity.GSparsitySearch(at(gsparsity_settings.CIFAR_PRESETS["paper"]), *end)
    elif case == "images, training":
        run = train_cifar.GenotypeTraining(genotype.load_genotype("DARTS_V2"), at(CIFAR_TRAIN_PRESETS["paper"]), *end)
    elif case == "images, pruning":
        run = operation_pruning.Pruning(genotype.load_genotype("DARTS_V2"), at(operation_pruning.PruningSettings()), 1e-4, *end)
    elif case == "text, training":
        cell = genotype.load_genotype("DARTS_V2", genotype.RecurrentGenotype)
        run = train_text.TextTraining(cell, at(TEXT_TRAIN_PRESETS["paper"]), *end)
    elif where == "images":
        run = CifarSearch(registry.CIFAR[method].method, at(registry.CIFAR[method].presets["paper"]), *end)
    else:
        run = TextSearch(registry.TEXT[method].method, at(registry.TEXT[method].presets["paper"]), *end)
    run.begin_epoch()
    return run


def measure(case: str, steps: int, device: str, tiny: bool) -> dict[str, Any]:
    """Measure the seconds of a step, without the first one, and peak MiB."""
    import torch

    gpu = device != "cpu"
    if gpu:
        gc.collect()  # of the previous case
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    now = time.perf_counter if gpu else time.process_time
    wait: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        run = build(case, Path(out), device, tiny)
        batches = run.batches()
        clock = []
        for _ in range(steps + 1):
            run.train_step(next(batches))
            wait()
            clock.append(now())
    seconds = (clock[-1] - clock[0]) / steps
    peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    hours = seconds * len(run) * run.epochs() / 3600
    return {
        "command": command(case),
        "seconds": round(seconds, 4),
        "cpu_seconds": round(seconds, 4) if not gpu else None,
        "peak_mib": round(peak),
        "result": f"{seconds:.3g} s a step of batch {run.settings.batch}, {len(run)} steps an epoch:"
        f" {hours:.3g} h for {run.epochs()} epochs",
    }


def report(case: str, steps: int, device: str, tiny: bool) -> bool:
    """Print the line of a case; return whether it was measured."""
    try:
        row = {**measure(case, steps, device, tiny), "state": "done"}
    except Exception as error:  # the other cases can still be measured
        text = str(error).strip().splitlines() or [""]
        row = {"command": command(case), "state": "failed", "result": f"{type(error).__name__}: {text[0]}"[:300]}
    print(f"{case}: {row['result']}\nROW {json.dumps(row)}", flush=True)
    return row["state"] == "done"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="the cases to run, or parts of their names")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks and batches")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"steps must be >= 1, got {args.steps}")
    if args.case:
        sys.exit(not report(args.case, args.steps, args.device, args.tiny))
    cases = [c for c in CASES if not args.only or any(word == c or (word not in CASES and word in c) for word in args.only)]
    if not cases:
        parser.error(f"only must be parts of {', '.join(CASES)}, got {' '.join(args.only)}")
    measured = 0
    for case in cases:
        if args.device == "cpu" and not args.tiny:
            words = [sys.executable, __file__, "--case", case, "--steps", str(args.steps)]
            measured += not subprocess.run(words).returncode
        else:
            measured += report(case, args.steps, args.device, args.tiny)
    sys.exit(measured < len(cases))


if __name__ == "__main__":
    main()
