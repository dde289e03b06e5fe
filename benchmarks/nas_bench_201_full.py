"""A search of the full supernet of NAS-Bench-201, as long as there is time: python benchmarks/nas_bench_201_full.py --seconds 240

The supernet has the published size, 16 channels and three stages of 5 cells (17 layers), and sees all training images. First a
few steps are timed, which gives the time of an epoch; then a search with as many steps as fit into the rest of --seconds runs to
its end, with schedules of that length. With --table its cell is looked up (see nas_bench_201.py). Used by gpu.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.bilevel.search_cifar import CifarSearch
from nas.data import cifar
from nas.data.nats_bench import Table
from nas.engine.distributed import join_processes
from nas.engine.run import launch
from nas.methods import registry
from nas.methods.search_method import RULES
from stopping import in_one_line

START, IMPORTS = time.monotonic(), 10.0  # when the program began to measure; seconds that it took until then
METHOD, PRESET = "sparse_supernet", "nasbench201"
SIZES = ("images", "valid_images", "batch", "channels", "layers")
WARM_UP, TIMED = 3, 12  # steps
VALID = 1000  # images
EPOCHS = 10  # parts of the search, after each of which it is evaluated
USED = 0.85  # share of the remaining time for the steps of the search; the rest is for evaluations and the report


def step_seconds(make: Callable[..., CifarSearch], device: str) -> tuple[float, CifarSearch]:
    """The seconds of a step, mean of `TIMED`, and the search that took them."""
    run = make(*join_processes(device))
    run.begin_epoch()
    start = time.monotonic()
    for number, batch in enumerate(run.batches()):
        if number == WARM_UP:
            run.wait_for_steps()
            start = time.monotonic()
        run.train_step(batch)
        if number == WARM_UP + TIMED - 1:
            break
    run.wait_for_steps()
    return (time.monotonic() - start) / TIMED, run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="of the whole program")
    parser.add_argument("--rule", choices=RULES, default="sound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="the accuracies of all cells")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/nas_bench_201_full"))
    for name in SIZES:
        default = VALID if name == "valid_images" else "as published"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {default}")
    args = parser.parse_args(argv)
    sizes = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    method, preset = registry.CIFAR[METHOD].method, registry.CIFAR[METHOD].presets_of(args.rule)[PRESET]
    own = {"data_dir": args.data_dir, "device": args.device, "order": "first", "valid_images": VALID, "epochs": EPOCHS}
    there = len(cifar.load_images(preset.data, args.data_dir).train.labels)  # a packed part of CIFAR-10 has fewer than the preset
    base = replace(preset, **{**own, "images": min(preset.images, there), **sizes})
    timed = replace(base, epoch_steps=WARM_UP + TIMED, warmup=0.0)  # steps of the weights alone would be cheaper
    each, run = step_seconds(partial(CifarSearch, method, timed, args.seed, args.out), args.device)
    in_epoch = len(run.train_set.labels) // base.batch
    memory = run.machine().memory() / 2**20
    size = f"{base.channels} channels, {base.layers} layers, batch {base.batch}, {args.rule} rule"
    costs = f"{each:.3g} s a step, {each * in_epoch:.3g} s an epoch of {in_epoch} steps, {memory:.0f} MiB"
    print(f"supernet of {size}: {costs}", flush=True)
    left = args.seconds - IMPORTS - (time.monotonic() - START)
    steps = max(int(USED * left / each) // EPOCHS, 1)
    settings = replace(base, epoch_steps=steps)
    del run
    row = launch(partial(CifarSearch, method, settings, args.seed, args.out), settings, args.out)
    length = f"{EPOCHS * steps} steps, {EPOCHS * steps / in_epoch:.2g} epochs, in {row['seconds']:.3g} s"
    accuracies = f"supernet {100 * row['valid_accuracy']:.2f} %, its nonzero paths alone {100 * row['restricted_accuracy']:.2f} %"
    print(f"search of {length}: {accuracies}, {row['paths_cell']} paths, cell {row['architecture']}")
    if args.table:
        place = Table.read(args.table).place(row["architecture"])
        print(f"rank {place.rank}, {place.cifar10:.2f} % on CIFAR-10, {place.size_percentile:.2g} % of its size")


if __name__ == "__main__":
    with in_one_line("what it has measured is printed above"):
        main()
