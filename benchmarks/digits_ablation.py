"""The DIGITS ablation of SparseNAS (Fig. 3): python benchmarks/digits_ablation.py --out runs/digits_ablation [--quick]

A 64-40-20-10 network on scikit-learn's digits is trained with a penalty on the outgoing weights of each feature and neuron,
zeros are removed, and what is left is trained from fresh weights. Curves over the strength: SGD, Adam, HAPG, AdamHAPG and
ProxAdam under the sparse group lasso, lasso and group lasso under HAPG. All strengths and seeds of a curve are one batch of
networks, and all sparse networks are retrained as one batch.

`--framework jax` trains with `digits_ablation_jax.py`, the same in JAX, on the device that JAX finds; torch trains on `--device`.
Writes ablation.csv, ablation.json and ablation.png into --out. Finished stages are kept there too: a run that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam

SIZES = (64, 40, 20, 10)
OUTGOING = Groups.along(-2)  # weights are (..., outputs, inputs): a column is what one feature or neuron feeds
LARGEST = 10**-3.7


@dataclass(frozen=True)
class Settings:
    """Epochs, batch size and rates are those of the paper; `strengths` are spread evenly in the logarithm.

    `drop_last` leaves out the short last batch of each epoch.
    """

    strengths: int = 8
    seeds: int = 5
    epochs: int = 500
    retrain_epochs: int = 3000
    batch: int = 256
    drop_last: bool = False
    curves: tuple[str, ...] = ()
    framework: str = "torch"

    def __post_init__(self) -> None:
        for name in ("strengths", "seeds", "epochs", "retrain_epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.batch > 1347:
            raise ValueError(f"batch must be <= 1347, the size of the training set, got {self.batch}")
        unknown = [c for c in self.curves if c not in CURVES]
        if unknown:
            raise ValueError(f"curves must be among {', '.join(CURVES)}, got {', '.join(unknown)}")

    def strength_grid(self) -> list[float]:
        if self.strengths == 1:
            return [LARGEST]
        return torch.logspace(-5, -3.7, self.strengths, dtype=torch.float64).tolist()


QUICK = {"strengths": 3, "seeds": 5, "retrain_epochs": 400, "curves": ("sgd", "adam", "hapg", "adamhapg")}


@dataclass(frozen=True)
class Curve:
    """One line of the figure: how it is trained, and below which size a weight counts as zero."""

    method: str
    penalty: str
    label: str
    metric: str | None = None
    cut: float = 0.0

    def build(self, strength: Any) -> Any:
        groups: dict[str, Any] = {"groups": OUTGOING, "metric": self.metric}
        if self.penalty == "lasso":
            return L1(strength)
        if self.penalty == "group_lasso":
            return GroupL2(strength, **groups)
        return SparseGroupLasso(strength, l1_ratio=0.5, **groups)

    def optimizer(self, weights: list[nn.Parameter], biases: list[nn.Parameter], penalty: Any) -> torch.optim.Optimizer:
        if self.method == "sgd":
            return torch.optim.SGD(weights + biases, lr=0.025, momentum=0.9)
        if self.method == "adam":
            return torch.optim.Adam(weights + biases, lr=3e-4, betas=(0.5, 0.999))
        groups = [{"params": weights, "penalty": penalty}, {"params": biases}]
        if self.method == "hapg":
            return HAPG(groups, lr=0.05, extrapolation="nesterov")
        if self.method == "adamhapg":
            return AdamHAPG(groups, lr=3e-4, betas=(0.5, 0.999), extrapolation="nesterov")
        return ProxAdam(groups, lr=3e-4, betas=(0.5, 0.999))

    @property
    def cosine(self) -> bool:
        return self.method in ("sgd", "hapg")


CURVES = {
    "sgd": Curve("sgd", "sgl", "SGD, SGL", cut=1e-3),
    "adam": Curve("adam", "sgl", "Adam, SGL", cut=1e-3),
    "hapg": Curve("hapg", "sgl", "HAPG, SGL"),
    "adamhapg": Curve("adamhapg", "sgl", "AdamHAPG, SGL", metric="median"),
    "hapg_lasso": Curve("hapg", "lasso", "HAPG, lasso"),
    "hapg_group_lasso": Curve("hapg", "group_lasso", "HAPG, group lasso"),
    "adamhapg_exact": Curve("adamhapg", "sgl", "AdamHAPG exact, SGL", metric="exact"),
    "proxadam": Curve("proxadam", "sgl", "ProxAdam, SGL", metric="exact"),
}


class Data:
    """Digits scaled to [0, 1], split 75/25 for each seed; images are columns, so that a batch is (seeds, 64, batch).

    All of it is on `device`. Every draw is made on the CPU, so that all devices train the same networks on the same batches.
    """

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        digits = load_digits()
        x = torch.tensor(digits.data, dtype=torch.float32)
        low, high = x.amin(0), x.amax(0)
        x = (x - low) / torch.where(high > low, high - low, 1)
        y = torch.tensor(digits.target)
        cut = round(0.75 * len(x))
        orders = [torch.randperm(len(x), generator=stream(seed)) for seed in range(settings.seeds)]
        n = cut if not settings.drop_last else cut // settings.batch * settings.batch
        self.batch, self.shown = settings.batch, n  # images an epoch shows
        self.images = torch.stack([x[o[:cut]].T for o in orders]).to(device)
        self.labels = torch.stack([y[o[:cut]] for o in orders]).to(device)
        self.valid_images = torch.stack([x[o[cut:]].T for o in orders]).contiguous().to(device)
        self.valid_labels = torch.stack([y[o[cut:]] for o in orders]).to(device)
        self.device = self.images.device

    def __len__(self) -> int:
        return -(-self.shown // self.batch)

    def order(self, epoch: int) -> Tensor:
        """(seeds, images shown): each seed has its own order of the images, the same for all its networks."""
        seeds, _, n = self.images.shape
        return torch.stack([torch.randperm(n, generator=stream(seed, epoch))[: self.shown] for seed in range(seeds)])

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch, the short last one too."""
        order = self.order(epoch).to(self.device)
        images = self.images.gather(2, order[:, None].expand(-1, self.images.shape[1], -1))
        labels = self.labels.gather(1, order)
        for i in range(len(self)):
            part = slice(i * self.batch, (i + 1) * self.batch)
            yield images[:, :, part], labels[:, part]


def stream(seed: int, epoch: int = -1) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * (epoch + 1) + seed)


def initial(
    settings: Settings, nets: int, draw: int = 0, device: torch.device | str = "cpu"
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Glorot normal weights (seeds, nets, outputs, inputs) and zero biases; all networks of a seed and draw start alike."""
    weights, biases = [], []
    generators = [stream(seed, 10**6 + draw) for seed in range(settings.seeds)]
    for inputs, outputs in pairwise(SIZES):
        scale = (2 / (inputs + outputs)) ** 0.5
        start = torch.stack([scale * torch.randn(outputs, inputs, generator=g) for g in generators])
        weights.append(nn.Parameter(start[:, None].repeat(1, nets, 1, 1).to(device)))
        biases.append(nn.Parameter(torch.zeros(settings.seeds, nets, outputs, 1, device=device)))
    return weights, biases


def logits(images: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """(seeds * nets, 10, batch). The first layer of all networks of a seed is one matrix product."""
    nets = weights[0].shape[1]
    h = torch.bmm(weights[0].flatten(1, 2), images).unflatten(1, (nets, -1)).flatten(0, 1)
    h = F.leaky_relu(h + biases[0].flatten(0, 1), 0.01, inplace=True)
    for w, b in zip(weights[1:-1], biases[1:-1]):
        h = F.leaky_relu(torch.baddbmm(b.flatten(0, 1), w.flatten(0, 1), h), 0.01, inplace=True)
    return torch.baddbmm(biases[-1].flatten(0, 1), weights[-1].flatten(0, 1), h)


def loss_of(images: Tensor, labels: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Mean cross entropy of each network, summed: the networks do not see each other."""
    nets = weights[0].shape[1]
    target = labels[:, None].expand(-1, nets, -1).flatten(0, 1)
    return F.cross_entropy(logits(images, weights, biases), target, reduction="sum") / labels.shape[1]


def accuracy(data: Data, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Validation accuracy, (seeds, nets), on the CPU."""
    with torch.no_grad():
        nets = weights[0].shape[1]
        weights, biases = [[t.to(data.device) for t in layer] for layer in (weights, biases)]
        guess = logits(data.valid_images, weights, biases).argmax(1).unflatten(0, (-1, nets))
        return (guess == data.valid_labels[:, None]).float().mean(2).cpu()


def search(curve: Curve, settings: Settings, data: Data, bar: tqdm) -> dict[str, Tensor]:
    """Train all strengths and seeds of a curve, and cut. Named weights and biases, on the CPU."""
    strengths = torch.tensor(settings.strength_grid(), device=data.device)
    weights, biases = initial(settings, len(strengths), device=data.device)
    penalty = curve.build(strengths.reshape(1, -1, 1, 1))
    optimizer = curve.optimizer(weights, biases, penalty)
    in_loss = curve.method in ("sgd", "adam")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs) if curve.cosine else None
    for epoch in range(settings.epochs):
        for images, labels in data.epoch(epoch):
            optimizer.zero_grad()
            loss = loss_of(images, labels, weights, biases)  # type: ignore[arg-type]
            if in_loss:
                loss = loss + sum(penalty.value(w) for w in weights)
            loss.backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        bar.update(len(strengths) * settings.seeds * len(data))
    if not in_loss:
        optimizer.eval()  # type: ignore[attr-defined]
    found = {f"weight{i}": torch.where(w.detach().abs() < curve.cut, 0, w.detach()).cpu() for i, w in enumerate(weights)}
    return found | {f"bias{i}": b.detach().cpu() for i, b in enumerate(biases)}


def retrain(masks: list[Tensor], settings: Settings, data: Data, bar: tqdm, checkpoint: Path) -> Tensor:
    """Train the networks that the masks leave from fresh weights. Validation accuracy (seeds, nets).

    Every 200 epochs go to `checkpoint`, from which a stopped run goes on bit for bit.
    """
    weights, biases = initial(settings, masks[0].shape[1], draw=1, device=data.device)
    masks = [m.to(data.device) for m in masks]
    with torch.no_grad():
        for w, m in zip(weights, masks):
            w.mul_(m)
    optimizer = torch.optim.Adam(weights + biases, lr=3e-4, betas=(0.5, 0.999), fused=True)
    per_epoch = weights[0].shape[1] * settings.seeds * len(data)
    done = 0
    if checkpoint.exists():
        saved = load(checkpoint, settings)
        done = saved["epoch"]
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for p, value in zip(weights + biases, saved["params"]):
                p.copy_(value)
        bar.update(per_epoch * done)
    for epoch in range(done, settings.retrain_epochs):
        for images, labels in data.epoch(settings.epochs + epoch):
            optimizer.zero_grad()
            loss_of(images, labels, weights, biases).backward()  # type: ignore[arg-type]
            for w, m in zip(weights, masks):
                assert w.grad is not None
                w.grad.mul_(m)  # Adam leaves an entry with gradient 0 and weight 0 at 0
            optimizer.step()
        bar.update(per_epoch)
        if (epoch + 1) % 200 == 0:
            params = [p.detach() for p in weights + biases]
            save(checkpoint, settings, {"epoch": epoch + 1, "params": params, "optimizer": optimizer.state_dict()})
    return accuracy(data, weights, biases)  # type: ignore[arg-type]


def connected_weights(weights: list[Tensor]) -> list[Tensor]:
    """1 where a weight is not zero and leads to a neuron that feeds something."""
    masks = [(w != 0).float() for w in weights]
    for mask, after in zip(masks, weights[1:]):
        mask *= (after != 0).any(-2)[..., None]
    return masks


def stage(path: Path, settings: Settings, work: Callable[[], dict], count: int, bar: tqdm) -> dict:
    """The tensors of a finished stage from its file, or computed now and written there in one move."""
    if path.exists():
        bar.update(count)
        return load(path, settings)
    start = time.perf_counter(), time.process_time()
    tensors = work()
    took = torch.tensor([time.perf_counter() - start[0], time.process_time() - start[1]])
    return save(path, settings, tensors | {"took": took})


def save(path: Path, settings: Settings, content: dict) -> dict:
    """Write in one move: a file is whole or not there."""
    draft = path.with_suffix(".part")
    torch.save({"settings": plain(settings), "content": content}, draft)
    os.replace(draft, path)
    return content


def load(path: Path, settings: Settings) -> dict:
    """What `save` wrote, if it was under the same settings."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path} is not whole ({error}); delete it, or start over with --fresh") from None
    if saved["settings"] != plain(settings):
        raise SystemExit(f"{path} was written with other settings, {saved['settings']}: choose another --out, or --fresh")
    return saved["content"]


def plain(settings: Settings) -> dict:
    return asdict(settings) | {"curves": list(settings.curves)}


def trainings(framework: str) -> tuple[Callable, Callable]:
    """`search` and `retrain`, of this file or of `digits_ablation_jax`."""
    if framework == "torch":
        return search, retrain
    import digits_ablation_jax

    return digits_ablation_jax.search, digits_ablation_jax.retrain


def run(settings: Settings, out: Path, device: str = "cpu") -> list[dict]:
    """All stages; one record for each curve, strength and seed."""
    data = Data(settings, device)
    search, retrain = trainings(settings.framework)
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
            found[name] = stage(out / f"search-{name}.pt", settings, work, count, bar)
        bar.set_description("retrain all")
        masks = [connected_weights(split(f)[0]) for f in found.values()]
        dense = [torch.ones_like(m[:, :1]) for m in masks[0]]
        joined = [torch.cat(layer, 1) for layer in zip(*masks, dense)]
        checkpoint = out / "retrain-unfinished.pt"
        work = lambda: {"accuracy": retrain(joined, settings, data, bar, checkpoint)}
        retrained = stage(out / "retrain.pt", settings, work, (searched + 1) * per_epoch * settings.retrain_epochs, bar)
        checkpoint.unlink(missing_ok=True)
    *accuracies, dense_accuracy = retrained["accuracy"].split([settings.strengths] * len(names) + [1], dim=1)
    for name, stage_found in [*found.items(), ("retraining", retrained)]:
        wall, cpu = stage_found["took"].tolist()
        print(f"{name:18} {wall:7.1f} s wall, {cpu:7.1f} s CPU")
    before = {name: accuracy(data, *split(f)) for name, f in found.items()}
    return [
        record
        for name, acc in zip(names, accuracies)
        for record in records(CURVES[name], settings, found[name], acc, before[name], dense_accuracy)
    ]


def split(found: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    layers = range(len(SIZES) - 1)
    return [found[f"weight{i}"] for i in layers], [found[f"bias{i}"] for i in layers]


def records(curve: Curve, settings: Settings, found: dict, accuracies: Tensor, before: Tensor, dense: Tensor) -> Iterator[dict]:
    weights, _ = split(found)
    for n, strength in enumerate(settings.strength_grid()):
        for seed in range(settings.seeds):
            own = [w[seed, n] for w in weights]
            nonzero = [int((w != 0).any(0).sum()) for w in own]
            yield {
                "method": curve.method,
                "penalty": curve.penalty,
                "metric": curve.metric,
                "strength": strength,
                "seed": seed,
                "accuracy": float(accuracies[seed, n]),
                "sparsity": sum(int((w == 0).sum()) for w in own) / sum(w.numel() for w in own),
                "features": nonzero[0],
                "neurons": sum(nonzero[1:]),
                "accuracy_before_retraining": float(before[seed, n]),
                "dense_accuracy": float(dense[seed, 0]),
            }


def write(rows: list[dict], out: Path) -> None:
    (out / "ablation.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with (out / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def of_curve(rows: list[dict], curve: Curve) -> dict[float, list[dict]]:
    """The records of a curve, by strength."""
    wanted = (curve.method, curve.penalty, curve.metric)
    own = [r for r in rows if (r["method"], r["penalty"], r["metric"]) == wanted]
    return {s: [r for r in own if r["strength"] == s] for s in sorted({r["strength"] for r in own})}


PANELS = (
    ("accuracy", "validation accuracy, retrained", 100),
    ("features", "selected input features", 1),
    ("neurons", "remaining inner neurons", 1),
    ("sparsity", "zero weights", 100),
)
STYLES = {
    "sgd": ("#9c9c9c", "--"),
    "adam": ("#4d4d4d", "--"),
    "hapg": ("#d95f02", "-"),
    "adamhapg": ("#1b6ca8", "-"),
    "hapg_lasso": ("#e6ab02", ":"),
    "hapg_group_lasso": ("#a6761d", ":"),
    "adamhapg_exact": ("#66a61e", "-"),
    "proxadam": ("#7b3fa0", "-"),
}


def draw(rows: list[dict], path: Path) -> None:
    """Four panels over the strength, a line a curve: mean over the seeds, band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4.4))
    for axis, (key, title, factor) in zip(axes, PANELS):
        for name, curve in CURVES.items():
            points = of_curve(rows, curve)
            if not points:
                continue
            values = [[factor * r[key] for r in group] for group in points.values()]
            mean = [statistics.mean(v) for v in values]
            spread = [statistics.pstdev(v) for v in values]
            color, line = STYLES[name]
            axis.plot(list(points), mean, line, color=color, label=curve.label, marker="o", markersize=3)
            low, high = [m - s for m, s in zip(mean, spread)], [m + s for m, s in zip(mean, spread)]
            axis.fill_between(list(points), low, high, color=color, alpha=0.12, linewidth=0)
        axis.set(xscale="log", xlabel="strength", title=title + (" (%)" if factor == 100 else ""))
        axis.grid(alpha=0.25)
    dense = 100 * statistics.mean(r["dense_accuracy"] for r in rows)
    axes[0].axhline(dense, color="black", linewidth=0.8)
    axes[0].annotate("dense", (min(r["strength"] for r in rows), dense), xytext=(2, 3), textcoords="offset points", fontsize=8)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(rows: list[dict]) -> str:
    """Means and standard deviations over the seeds at the largest strength, as Markdown."""

    def cell(values: list[float], form: str) -> str:
        return f"{statistics.mean(values):{form}} ± {statistics.pstdev(values):{form}}"

    strength = max(r["strength"] for r in rows)
    seeds = len({r["seed"] for r in rows})
    dense = cell([100 * d for d in {r["seed"]: r["dense_accuracy"] for r in rows}.values()], ".2f")
    lines = [
        f"At strength {strength:.3g}, mean ± standard deviation over {seeds} seeds; the dense network reaches {dense} %.",
        "",
        "| curve | accuracy % | features of 64 | neurons of 60 | zero weights % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for curve in CURVES.values():
        group = of_curve(rows, curve).get(strength)
        if group:
            cells = [cell([f * r[key] for r in group], ".2f" if key == "accuracy" else ".1f") for key, _, f in PANELS]
            lines.append(f"| {curve.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    if args.device == "cuda" and (settings.framework == "jax" or not torch.cuda.is_available()):
        parser.error("device must be cpu with --framework jax, and where torch finds no CUDA device, got cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        for file in args.out.glob("*.pt"):
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
