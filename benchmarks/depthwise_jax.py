"""Depthwise convolutions on one thread of a CPU, in JAX and in PyTorch: python benchmarks/depthwise_jax.py

XLA's own depthwise convolution, the one of the supernets in JAX (`nets.jax.convolution_kernels`), and that of PyTorch, at sizes
of the supernets of images, of stride 1: CPU milliseconds of a convolution, and of one with both of its gradients (median over
the rounds, in which the three take turns), and the ratios to PyTorch, where that is installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax_step import on_one_thread

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

# (channels, height and width, kernel, dilation)
SIZES = ((16, 32, 3, 1), (16, 32, 5, 1), (16, 32, 5, 2), (64, 8, 3, 1), (64, 8, 5, 1))
TINY = ((2, 4, 3, 1),)
Timed = dict[str, Callable[[], object]]


def in_jax(channels: int, side: int, kernel: int, dilation: int, batch: int) -> dict[str, Timed]:
    """By name, a convolution and one with its gradients: XLA's own, and ours."""
    import jax
    from jax import lax
    from nas.nets.jax.convolution_kernels import depthwise

    x, weight, g = draw(channels, side, kernel, batch)

    def xla(x: Any, weight: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            weight[:, :, None],
            (1, 1),
            "SAME",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )

    def ours(x: Any, weight: Any) -> Any:
        return depthwise(x[None], weight[None], 1, dilation)[0]

    def timed(convolve: Callable) -> Timed:
        forward = jax.jit(convolve)
        backward = jax.jit(lambda x, weight, g: (lambda y, pull: (y, pull(g)))(*jax.vjp(convolve, x, weight)))
        arrays = tuple(map(jax.numpy.asarray, (x, weight, g)))
        return {
            "forward": lambda: jax.block_until_ready(forward(*arrays[:2])),
            "with gradients": lambda: jax.block_until_ready(backward(*arrays)),
        }

    return {"XLA": timed(xla), "ours": timed(ours)}


def in_torch(channels: int, side: int, kernel: int, dilation: int, batch: int) -> dict[str, Timed]:
    """As `in_jax`, by PyTorch, in its default layout NCHW."""
    import torch

    torch.set_num_threads(1)
    x, weight, g = draw(channels, side, kernel, batch)
    images, grads = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (x, g))
    taps = torch.from_numpy(weight.transpose(2, 0, 1)[:, None].copy())
    for leaf in (images, taps):
        leaf.requires_grad_()
    padding = dilation * (kernel // 2)
    convolve = lambda: torch.nn.functional.conv2d(images, taps, padding=padding, dilation=dilation, groups=channels)

    @torch.no_grad()
    def forward() -> object:
        return convolve()

    return {
        "PyTorch": {
            "forward": forward,
            "with gradients": lambda: torch.autograd.grad(convolve(), (images, taps), grads),
        }
    }


def draw(channels: int, side: int, kernel: int, batch: int) -> tuple[np.ndarray, ...]:
    """Images (N, H, W, C), a kernel (k, k, C), and the gradient of the result, of the shape of the images."""
    random = np.random.default_rng(0)
    shape = (batch, side, side, channels)
    return tuple(random.standard_normal(s, np.float32) for s in (shape, (kernel, kernel, channels), shape))


def measured(size: tuple[int, int, int, int], batch: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one size."""
    programs = in_jax(*size, batch)
    if importlib.util.find_spec("torch"):
        programs |= in_torch(*size, batch)
    times: dict[tuple[str, str], list[float]] = {(name, what): [] for name, own in programs.items() for what in own}
    for number in range(rounds + 1):  # the first compiles
        for name, what in times:
            begun = time.process_time()
            programs[name][what]()
            if number:
                times[name, what].append(1e3 * (time.process_time() - begun))
    rows = []
    for (name, what), own in times.items():
        row = {"channels": size[0], "side": size[1], "kernel": size[2], "dilation": size[3], "program": name, "computes": what}
        row["cpu_ms"] = statistics.median(own)
        if ("PyTorch", what) in times:
            row["ratio"] = statistics.median(a / b for a, b in zip(own, times["PyTorch", what]))
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="one small size, to try the script")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args(argv)
    on_one_thread("cpu")
    rows = []
    print(f"{'images':16}{'kernel':>10}  {'program':9}{'computes':16}{'CPU ms':>10}{'/ PyTorch':>11}")
    for size in TINY if args.tiny else SIZES:
        for row in measured(size, args.batch, args.rounds):
            rows.append(row)
            shape = f"{args.batch}x{row['side']}x{row['side']}x{row['channels']}"
            kernel = f"{row['kernel']}x{row['kernel']}" + (f", dil {row['dilation']}" if row["dilation"] > 1 else "")
            ratio = f"{row['ratio']:11.2f}" if "ratio" in row else ""
            print(f"{shape:16}{kernel:>10}  {row['program']:9}{row['computes']:16}{row['cpu_ms']:10.3f}{ratio}", flush=True)
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
