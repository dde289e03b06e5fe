"""The DIGITS ablation of SparseNAS (Fig. 3): python benchmarks/digits_ablation.py --out runs/digits_ablation [--quick]

A 64-40-20-10 network on scikit-learn's digits is trained with a penalty on the outgoing weights of each feature and neuron,
zeros are removed, and what is left is trained from fresh weights. Curves over the strength: SGD, Adam, HAPG, AdamHAPG and
ProxAdam under the sparse group lasso, lasso and group lasso under HAPG. All strengths and seeds of a curve are one batch of
networks, and all sparse networks are retrained as one batch.

`--framework jax` trains in JAX, on the device that JAX finds, and needs no torch; torch trains on `--device`.
Writes ablation.csv, ablation.json and ablation.png into --out. Finished stages are kept there too: a run that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from digits.problem import CURVES, QUICK, Data, Settings, accuracy, connected_weights, weights_of
from digits.report import draw, records, table, write
from digits.stages import stage
from tqdm import tqdm


def trainings(framework: str, device: str) -> tuple[Callable, Callable]:
    """`search` and `retrain` of a framework, which is imported here: the other one need not be installed."""
    if framework == "jax":
        from digits import in_jax

        return in_jax.search, in_jax.retrain
    from digits import in_torch

    return partial(in_torch.search, device=device), partial(in_torch.retrain, device=device)


def cuda() -> bool:
    """Whether torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()


def run(settings: Settings, out: Path, device: str = "cpu") -> list[dict]:
    """All stages; one record for each curve, strength and seed."""
    data = Data(settings)
    search, retrain = trainings(settings.framework, device)
    names = [name for name in CURVES if not settings.curves or name in settings.curves]
    per_epoch = settings.seeds * len(data)
    searched = len(names) * settings.strengths
    total = per_epoch * (searched * settings.epochs + (searched + 1) * settings.retrain_epochs)
    patience = 0.5 if sys.stderr.isatty() else 15.0  # seconds between lines of progress
    with tqdm(total=total, unit="step", unit_scale=True, smoothing=0.02, mininterval=patience) as bar:
        found = {}
        for name in names:
            bar.set_description(f"search {name}")
            work = lambda name=name: search(CURVES[name], settings, data, bar)
            count = settings.strengths * per_epoch * settings.epochs
            found[name] = stage(out / f"search-{name}.npz", settings, work, count, bar)
        bar.set_description("retrain all")
        masks = [connected_weights(weights_of(f)) for f in found.values()]
        dense = [np.ones_like(m[:, :1]) for m in masks[0]]
        joined = [np.concatenate(layer, 1) for layer in zip(*masks, dense)]
        checkpoint = out / "retrain-unfinished.npz"
        work = lambda: {"accuracy": accuracy(data, retrain(joined, settings, data, bar, checkpoint))}
        retrained = stage(out / "retrain.npz", settings, work, (searched + 1) * per_epoch * settings.retrain_epochs, bar)
        checkpoint.unlink(missing_ok=True)
    *accuracies, dense_accuracy = np.split(retrained["accuracy"], settings.strengths * np.arange(1, len(names) + 1), axis=1)
    for name, stage_found in [*found.items(), ("retraining", retrained)]:
        wall, cpu = stage_found["took"]
        print(f"{name:18} {wall:7.1f} s wall, {cpu:7.1f} s CPU")
    before = {name: accuracy(data, f) for name, f in found.items()}
    return [
        record
        for name, acc in zip(names, accuracies)
        for record in records(CURVES[name], settings, found[name], acc, before[name], dense_accuracy)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_ablation"), help="folder for results and finished stages")
    parser.add_argument("--quick", action="store_true", help="the four SGL methods, three strengths, short retraining")
    parser.add_argument("--fresh", action="store_true", help="forget finished stages in --out")
    for name in ("strengths", "seeds", "epochs", "retrain_epochs", "batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {getattr(Settings, name)}")
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that torch trains on; JAX takes what it finds")
    parser.add_argument("--drop-last", action="store_true", default=None, help="leave out the short last batch of an epoch")
    parser.add_argument("--curves", nargs="+", help=f"among {', '.join(CURVES)}; default all")
    args = parser.parse_args(argv)
    chosen = dict(QUICK) if args.quick else {}
    for name in ("strengths", "seeds", "epochs", "retrain_epochs", "batch", "drop_last", "curves", "framework"):
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    try:
        settings = Settings(**{k: tuple(v) if k == "curves" else v for k, v in chosen.items()})
    except ValueError as error:
        parser.error(str(error))
    if args.device == "cuda" and not (settings.framework == "torch" and cuda()):
        parser.error("device must be cpu with --framework jax, and where torch finds no CUDA device, got cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        for file in args.out.glob("*.npz"):
            file.unlink()
    start = time.perf_counter(), time.process_time()
    rows = run(settings, args.out, args.device)
    write(rows, args.out)
    draw(rows, args.out / "ablation.png")
    print(f"\n{table(rows)}\n")
    print(f"{time.perf_counter() - start[0]:.0f} s wall, {time.process_time() - start[1]:.0f} s CPU in this run")
    print(f"written: {args.out}/ablation.json, ablation.csv, ablation.png")


if __name__ == "__main__":
    main()
