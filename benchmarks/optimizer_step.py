"""Cost of one optimizer step beside torch's fused Adam: python benchmarks/optimizer_step.py

Two models: the 62 tensors of ResNet-18 (11.7 million entries), and many small tensors (architecture weights). Ours carry
the sparse group lasso on the rows (output channels) of the weights; torchao's pruning-aware training, if installed, the
group lasso. Every optimizer steps in turn, round after round, in one process on one thread; the table gives CPU
milliseconds a step (median), and the ratio to `torch.optim.Adam(fused=True)` of the same round as median and range. With
--device cuda: milliseconds between two events on an idle device, before and behind the step, the host's work included.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from proxopt import Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD

BASELINE = "torch Adam, fused"


def resnet18_shapes() -> list[tuple[int, ...]]:
    """Shapes of the parameters of torchvision's ResNet-18, in order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, before, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and before != width:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return [*shapes, (1000, 512), (1000,)]


def penalty(metric: str | None, ndim: int) -> SparseGroupLasso:
    return SparseGroupLasso(1e-4, groups=Groups.along(tuple(range(1, ndim)) or 0), metric=metric)


def param_groups(params: list[nn.Parameter], metric: str | None = None) -> list[dict]:
    """Rows (output channels) of the weights penalised, vectors in the small model too, norms and biases not."""
    small = all(p.ndim == 1 for p in params)
    out = []
    for ndim in sorted({p.ndim for p in params}):
        members = [p for p in params if p.ndim == ndim]
        out.append({"params": members, "penalty": penalty(metric, ndim) if ndim > 1 or small else None})
    return out


def torchao_pat(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The group lasso of torchao's pruning-aware training on the same rows, behind the same fused Adam."""
    from torchao.prototype.pat.optim import PruneOptimizer

    groups: list[dict] = []
    for group in param_groups(params):
        pruned = {"prox_type": "ProxGroupLasso", "group_type": "Dim0Grouper", "reg_lambda": 1e-4}
        groups.append({"params": group["params"], **(pruned if group["penalty"] else {})})
    return PruneOptimizer(torch.optim.Adam(groups, lr=1e-3, fused=True))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    BASELINE: lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "torch Adam, default": lambda p: torch.optim.Adam(p, lr=1e-3),
    "torch SGD, fused": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "torchao PAT, Adam fused": torchao_pat,
    "Proximal(Adam fused)": lambda p: Proximal(torch.optim.Adam(param_groups(p), lr=1e-3, fused=True)),  # type: ignore[arg-type]
    "ProxSGD": lambda p: ProxSGD(param_groups(p), lr=1e-3),
    "HAPG": lambda p: HAPG(param_groups(p), lr=1e-3),
    "ProxAdam, metric=support": lambda p: ProxAdam(param_groups(p, "support"), lr=1e-3),
    "ProxAdam (exact)": lambda p: ProxAdam(param_groups(p), lr=1e-3),
    "AdamHAPG, metric=support": lambda p: AdamHAPG(param_groups(p, "support"), lr=1e-3),
    "AdamHAPG (median)": lambda p: AdamHAPG(param_groups(p), lr=1e-3),
    "AdamHAPG, metric=exact": lambda p: AdamHAPG(param_groups(p, "exact"), lr=1e-3),
}


def build(shapes: list[tuple[int, ...]], make: Callable, check_finite: bool, device: str) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape, scale: (torch.randn(shape, generator=generator) * scale).to(device)
    params = [nn.Parameter(draw(s, 0.05)) for s in shapes]
    for p in params:
        p.grad = draw(p.shape, 0.01)
    optimizer = make(params)
    for group in optimizer.param_groups:
        if "check_finite" in group:
            group["check_finite"] = check_finite
    return optimizer


def seconds_of(step: Callable[[], object], device: str) -> float:
    """CPU seconds of one step; on a GPU the seconds from one event to another around it."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(shapes: list[tuple[int, ...]], names: list[str], rounds: int, check_finite: bool, device: str = "cpu") -> list[dict]:
    """CPU time of a step of each optimizer, in turn, `rounds` times after two steps of warm-up."""
    optimizers = {}
    for name in names:
        try:
            optimizers[name] = build(shapes, OPTIMIZERS[name], check_finite, device)
            optimizers[name].step()
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error.name} is not installed")
        except RuntimeError as error:  # of a device: the others are still worth their time
            if device == "cpu" or name == BASELINE:
                raise
            print(f"{name}: left out, {str(error).splitlines()[0]}")
            optimizers.pop(name, None)
    names = list(optimizers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            seconds = seconds_of(optimizer.step, device)
            if turn >= 2:
                times[name].append(seconds)
    rows = []
    for name in names:
        ratios = [t / base for t, base in zip(times[name], times[BASELINE])]
        rows.append(
            {
                "optimizer": name,
                f"{device}_ms": 1e3 * statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    return rows


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", type=int, default=2000, help="how many small tensors of 8 entries")
    parser.add_argument("--check-finite", action="store_true", help="with the check of the gradients, as is the default on CPU")
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the optimizers to run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device must be cpu where torch finds no CUDA device, got cuda")
    torch.set_num_threads(1)
    where = "one thread" if args.device == "cpu" else torch.cuda.get_device_name()
    names = [n for n in OPTIMIZERS if n == BASELINE or not args.only or any(o in n for o in args.only)]
    rows = []
    for model, shapes in (("ResNet-18", resnet18_shapes()), (f"{args.small} tensors of 8", [(8,)] * args.small)):
        print(f"\n{model}, {where}\n{'optimizer':28} {'ms':>8} {'/ Adam fused':>13}   range")
        for row in measure(shapes, names, args.rounds, args.check_finite, args.device):
            rows.append({"model": model, **row})
            print(
                f"{row['optimizer']:28} {row[f'{args.device}_ms']:8.2f} {row['ratio']:13.2f}   "
                f"{row['ratio_min']:.2f} - {row['ratio_max']:.2f}",
                flush=True,
            )
    if args.out:
        write_table(args.out, rows)


if __name__ == "__main__":
    main()
