"""Cost of one optimizer step beside torch's fused Adam: python benchmarks/optimizer_step.py

Models: the 62 tensors of ResNet-18 (11.7 million entries), and many small tensors (architecture weights). Ours carry the sparse
group lasso on the rows (output channels) of the weights; on ResNet-18 also on groups of a channel with the scale and shift of
its norm, and on ragged labels, about four rows each. torchao's pruning-aware training, if installed, has the group lasso on
the rows. Every optimizer steps in turn, round after round, in one process on one thread; the table gives CPU milliseconds a step
(median), and the ratio to `torch.optim.Adam(fused=True)` of the same round as median and range. --kernels off measures without
the compiled loops of `proxopt.kernels`, --kernels both with and without. With --device cuda: milliseconds between two events on
an idle device, before and behind the step, the host's work included. --framework jax measures the optimizers in JAX beside
`optax.adam`, and their time to compile (jax_step.py). --out writes the table, and a picture beside it.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax_step
import timings
import torch
from torch import nn

from proxopt import Groups, SparseGroupLasso, kernels
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


def with_norms(params: list[nn.Parameter], metric: str | None = None) -> list[dict]:
    """Each convolution with the scale and shift of its norm, which follow it: a group for each output channel of the three."""
    out: list[dict] = []
    rest = []
    for i, p in enumerate(params):
        if p.ndim == 4:
            labels = Groups.labels([range(p.shape[0])] * 3, axis=0)
            joint = {"params": params[i : i + 3], "joint": True}
            out.append({**joint, "penalty": SparseGroupLasso(1e-4, groups=labels, metric=metric)})
        elif not (out and any(p is q for q in out[-1]["params"])):
            rest.append(p)
    return [*out, {"params": rest}]


def ragged(params: list[nn.Parameter], metric: str | None = None) -> list[dict]:
    """Rows of each weight in groups of different sizes, about four rows each."""
    out: list[dict] = [{"params": [p for p in params if p.ndim == 1]}]
    for p in params:
        if p.ndim > 1:
            labels = torch.randint(max(p.shape[0] // 4, 1), (p.shape[0],), generator=torch.Generator().manual_seed(0))
            out.append({"params": [p], "penalty": SparseGroupLasso(1e-4, groups=Groups.labels(labels.tolist()), metric=metric)})
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
ON_RESNET18: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "ProxAdam, channels with norms": lambda p: ProxAdam(with_norms(p), lr=1e-3),
    "ProxAdam, ragged labels": lambda p: ProxAdam(ragged(p), lr=1e-3),
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
            optimizers[name] = build(shapes, {**OPTIMIZERS, **ON_RESNET18}[name], check_finite, device)
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
    return [timings.summary(name, times[name], times[BASELINE], device) for name in names]


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measured(args: argparse.Namespace) -> list[dict]:
    """The rows of all models, printed as they come."""
    own = [n for n in {**OPTIMIZERS, **ON_RESNET18} if n == BASELINE or not args.only or any(o in n for o in args.only)]
    models = {"ResNet-18": resnet18_shapes(), **{f"{n} tensors of 8": [(8,)] * n for n in args.small}}
    rows = []
    for loops in {"on": (True,), "off": (False,), "both": (True, False)}[args.kernels]:
        for model, shapes in models.items():
            names = [n for n in own if n in OPTIMIZERS or model == "ResNet-18"]
            print(f"\n{model}, compiled loops {'on' if loops and kernels.available() else 'off'}")
            print(f"{'optimizer':30} {'ms':>8} {'/ Adam fused':>13}   range")
            with kernels.enabled(loops):
                found = measure(shapes, names, args.rounds, args.check_finite, args.device)
            for row in found:
                rows.append({"model": model, "kernels": "on" if loops and kernels.available() else "off", **row})
                print(
                    f"{row['optimizer']:30} {row[f'{args.device}_ms']:8.2f} {row['ratio']:13.2f}   "
                    f"{row['ratio_min']:.2f} - {row['ratio_max']:.2f}",
                    flush=True,
                )
    return rows


def machine(device: str) -> str:
    """What the times were measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.exists() else None
    return f"one thread of {found.group(1) if found else platform.processor() or platform.machine()}"


def draw(path: Path, rows: list[dict], title: str) -> None:
    """Bars of the ratios to fused Adam, a panel for each model, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    names = [name for name in dict.fromkeys(row["optimizer"] for row in rows) if name != BASELINE]
    settings = list(dict.fromkeys(row["kernels"] for row in rows))
    height = 1.5 + 0.2 * (len(settings) + 1) * len(names)
    figure, axes = plt.subplots(1, len(models), figsize=(4 + 4 * len(models), height), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models):
        for k, setting in enumerate(settings):
            chosen = {row["optimizer"]: row["ratio"] for row in rows if (row["model"], row["kernels"]) == (model, setting)}
            places = [i + (k - (len(settings) - 1) / 2) * 0.4 for i, name in enumerate(names) if name in chosen]
            ratios = [chosen[name] for name in names if name in chosen]
            bars = axis.barh(
                places, ratios, 0.38, color=("tab:blue", "tab:gray")[setting == "off"], label=f"compiled loops {setting}"
            )
            axis.bar_label(bars, labels=[f"{ratio:.2f}" for ratio in ratios], padding=2, fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", title=model, xlabel="time of a step / fused Adam")
        axis.set_xlim(right=1.6 * axis.get_xlim()[1])
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(loc="lower right", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch", help="jax: beside optax.adam, see jax_step.py")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--small", type=int, nargs="*", help="how many small tensors of 8 entries (default 2000 and 10000; in JAX 300)"
    )
    parser.add_argument("--check-finite", action="store_true", help="with the check of the gradients, as is the default on CPU")
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the optimizers to run")
    parser.add_argument(
        "--kernels", choices=("on", "off", "both"), default="on", help="with the compiled loops on a CPU, without"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="CSV file for the table; a picture of it is written beside")
    args = parser.parse_args()
    if args.framework == "jax":
        if args.check_finite or args.kernels != "on":
            parser.error("--check-finite and --kernels are options of the optimizers in torch, got --framework jax")
        jax_step.on_one_thread(args.device)
        if (args.device == "cuda") != (jax_step.backend() == "gpu"):
            parser.error(f"device must be where JAX computes, which is {jax_step.backend()}, got {args.device}")
        small = [300] if args.small is None else args.small
        rows = jax_step.measured(resnet18_shapes(), small, args.only, args.rounds, args.device)
        if args.out:
            where = machine("cpu") if args.device == "cpu" else jax_step.device_name()
            write_table(args.out, [{**row, "machine": where} for row in rows])
        return
    args.small = [2000, 10_000] if args.small is None else args.small
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device must be cpu where torch finds no CUDA device, got cuda")
    torch.set_num_threads(1)
    where = f"{machine(args.device)}, torch {torch.__version__}"
    print(where)
    rows = measured(args)
    if args.out:
        write_table(args.out, [{**row, "machine": where} for row in rows])
        draw(args.out.with_suffix(".png"), rows, where)


if __name__ == "__main__":
    main()
