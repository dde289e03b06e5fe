"""Device time of one optimizer step beside torch's fused Adam: python benchmarks/device_step.py

Two models: the 62 tensors of ResNet-18 (11.7 million entries) and the 148 of a transformer (124 million, the shapes of GPT-2
small), with the sparse group lasso on the rows (output channels) of their weights. Each of our optimizers steps without and with
the Triton kernels (proxopt_torch.device.triton_steps), which are compared first: the largest difference after three steps, and
how many zeros differ. Then every optimizer steps in turn, round after round. The table gives milliseconds between two events on
the device (median), the ratio to fused Adam of the same round as median and range, and milliseconds of the host. The device is
kept busy before the first event while the host launches the step, so that the time between the events is that of the kernels
alone, except for steps of more than about a thousand launches, which a device does not queue. With --device cpu, for a test of
this script, milliseconds of the CPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from optimizer_step import resnet18_shapes
from torch import nn

from proxopt import Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, ProxSGD
from proxopt_torch.device import triton_steps

BASELINE = "torch Adam, fused"
BUSY = 100_000_000  # cycles of a device, about 60 ms: longer than the host needs for a step


class Row(NamedTuple):
    """An optimizer of parameters, and whether the Triton kernels are on."""

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    triton: bool = False


def transformer_shapes() -> list[tuple[int, ...]]:
    """Shapes of the parameters of GPT-2 small, as matrices from inputs (last axis) to outputs."""
    shapes: list[tuple[int, ...]] = [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,)]
        shapes += [(3072, 768), (3072,), (768, 3072), (768,)]
    return [*shapes, (768,), (768,)]


def param_groups(params: list[nn.Parameter], metric: str | None = None) -> list[dict]:
    """The rows of all tensors with at least two axes are groups; norms and biases have no penalty."""
    out: list[dict] = []
    for ndim in sorted({p.ndim for p in params}):
        penalty = SparseGroupLasso(1e-4, groups=Groups.along(tuple(range(1, ndim))), metric=metric) if ndim > 1 else None
        out.append({"params": [p for p in params if p.ndim == ndim], "penalty": penalty})
    return out


def rows() -> dict[str, Row]:
    """The optimizers by name."""
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "ProxAdam (exact)": lambda p: ProxAdam(param_groups(p), lr=1e-3),
        "ProxAdam, metric=support": lambda p: ProxAdam(param_groups(p, "support"), lr=1e-3),
        "AdamHAPG (median)": lambda p: AdamHAPG(param_groups(p), lr=1e-3),
        "ProxSGD": lambda p: ProxSGD(param_groups(p), lr=1e-3),
        "HAPG": lambda p: HAPG(param_groups(p), lr=1e-3),
    }
    out = {BASELINE: Row(lambda p: torch.optim.Adam(p, lr=1e-3, fused=True))}
    for name, make in makers.items():
        out |= {name: Row(make), f"{name}, Triton": Row(make, True)}
    return out


def build(shapes: list[tuple[int, ...]], row: Row, device: str) -> torch.optim.Optimizer:
    """The optimizer with parameters and gradients that are the same for all rows."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda shape, scale: torch.randn(shape, generator=generator, device=device) * scale
    params = [nn.Parameter(draw(s, 0.05)) for s in shapes]
    for p in params:
        p.grad = draw(p.shape, 0.01)
    return row.make(params)


def compare(shapes: list[tuple[int, ...]], row: Row, device: str) -> str:
    """What distinguishes three steps with the Triton kernels from three without them; compiles the kernels."""
    points = []
    start = time.perf_counter()
    for on in (True, False):
        optimizer = build(shapes, row, device)
        with triton_steps.enabled(on):
            for i in range(3):
                optimizer.step()
                if i == 0 and on:
                    seconds = time.perf_counter() - start
        points.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
    largest = max(float((a - b).abs().max()) for a, b in zip(*points))
    zeros = [sum(int((p == 0).sum()) for p in side) for side in points]
    other = sum(int(((a == 0) != (b == 0)).sum()) for a, b in zip(*points))
    return f"first step {seconds:.1f} s, largest difference {largest:.1e}, {zeros[1]} zeros, of which {other} differ"


def timed(optimizer: torch.optim.Optimizer, triton: bool, device: str) -> tuple[float, float]:
    """Seconds of the device and of the host for one step."""
    with triton_steps.enabled(triton):
        if device == "cpu":
            start = time.process_time()
            optimizer.step()
            return (time.process_time() - start,) * 2
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY)
        first.record()
        start = time.perf_counter()
        optimizer.step()
        host = time.perf_counter() - start
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host


def measure(shapes: list[tuple[int, ...]], names: list[str], rounds: int, device: str) -> list[dict]:
    """Times of a step of each optimizer, in turn, ``rounds`` times after two steps of warm-up."""
    optimizers = {}
    for name in names:
        row = rows()[name]
        if row.triton and importlib.util.find_spec("triton") is None:
            print(f"{name}: left out, triton is not installed")
            continue
        try:
            if row.triton:
                print(f"{name}: {compare(shapes, row, device)}", flush=True)
            optimizers[name] = build(shapes, row, device)
            timed(optimizers[name], row.triton, device)
        except Exception as error:  # of a compiler or a device: the others are still worth their time
            if name == BASELINE or device == "cpu":
                raise
            print(f"{name}: left out, {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            optimizers.pop(name, None)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in optimizers}
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            found = timed(optimizer, rows()[name].triton, device)
            if turn >= 2:
                times[name].append(found)
    out = []
    for name, own in times.items():
        ratios = [t / base for (t, _), (base, _) in zip(own, times[BASELINE])]
        milliseconds = [1e3 * statistics.median(column) for column in zip(*own)]
        ratio = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        out.append({"optimizer": name, "ms": milliseconds[0], **ratio, "host_ms": milliseconds[1]})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a few small tensors in place of the models")
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the optimizers to run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device must be cpu where torch finds no CUDA device, got cuda")
    torch.set_num_threads(1)
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("on a CPU the Triton kernels run with TRITON_INTERPRET=1 only: their rows are those without them")
    models = {"ResNet-18": resnet18_shapes(), "transformer of 124M": transformer_shapes()}
    if args.tiny:
        models = {"ResNet-18": [(8, 3, 3, 3), (8,), (4, 8)], "transformer of 124M": [(9, 16), (16,)]}
    where = "one thread" if args.device == "cpu" else torch.cuda.get_device_name()
    names = [n for n in rows() if n == BASELINE or not args.only or any(o in n for o in args.only)]
    table = []
    for model, shapes in models.items():
        print(f"\n{model}, {where}")
        found = measure(shapes, names, args.rounds, args.device)
        print(f"{'optimizer':34} {'ms':>8} {'/ Adam fused':>13}   range          host ms")
        for row in found:
            table.append({"model": model, **row})
            print(
                f"{row['optimizer']:34} {row['ms']:8.3f} {row['ratio']:13.2f}   {row['ratio_min']:.2f} - {row['ratio_max']:.2f}"
                f"  {row['host_ms']:10.3f}",
                flush=True,
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
