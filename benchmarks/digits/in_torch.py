"""The two trainings of the DIGITS ablation in torch: all networks of a training are one batch of matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from digits import problem, stages
from digits.problem import LAYERS, Arrays, Curve, Data, Settings
from proxopt_torch import HAPG, AdamHAPG, ProxAdam


def optimizer_of(curve: Curve, weights: list[nn.Parameter], biases: list[nn.Parameter], penalty: Any) -> torch.optim.Optimizer:
    if curve.method == "sgd":
        return torch.optim.SGD(weights + biases, lr=0.025, momentum=0.9)
    if curve.method == "adam":
        return torch.optim.Adam(weights + biases, lr=3e-4, betas=(0.5, 0.999))
    groups = [{"params": weights, "penalty": penalty}, {"params": biases}]
    if curve.method == "hapg":
        return HAPG(groups, lr=0.05, extrapolation="nesterov")
    if curve.method == "adamhapg":
        return AdamHAPG(groups, lr=3e-4, betas=(0.5, 0.999), extrapolation="nesterov")
    return ProxAdam(groups, lr=3e-4, betas=(0.5, 0.999))


class Batches:
    """The training images and labels on a device, epoch by epoch."""

    def __init__(self, data: Data, device: str = "cpu") -> None:
        self.data, self.device = data, device
        self.images, self.labels = (torch.from_numpy(a).to(device) for a in (data.images, data.labels))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (seeds, 64, batch) and labels (seeds, batch) of the batches of one epoch."""
        order = torch.from_numpy(self.data.order(epoch)).to(self.device)
        images = self.images.gather(2, order[:, None].expand(-1, self.images.shape[1], -1))
        labels = self.labels.gather(1, order)
        for i in range(len(self.data)):
            part = slice(i * self.data.batch, (i + 1) * self.data.batch)
            yield images[:, :, part], labels[:, part]


def normals(seed: int) -> Callable[[int], np.ndarray]:
    """`problem.normals` to the last bit of `torch.randn`, with which the results in this repository were measured."""
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.randn(count, generator=generator).numpy()


def initial(settings: Settings, nets: int, draw: int = 0, device: str = "cpu") -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights and biases at the start."""
    start = problem.initial(settings, nets, draw, normals)
    weights, biases = (
        [nn.Parameter(torch.from_numpy(start[f"{kind}{i}"]).to(device)) for i in LAYERS] for kind in ("weight", "bias")
    )
    return weights, biases


def arrays(weights: list[nn.Parameter], biases: list[nn.Parameter]) -> Arrays:
    named = {f"weight{i}": w for i, w in enumerate(weights)} | {f"bias{i}": b for i, b in enumerate(biases)}
    return {name: p.detach().cpu().numpy() for name, p in named.items()}


def logits(images: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """(seeds * nets, 10, batch). The first layer of all networks of a seed is one matrix product."""
    nets = weights[0].shape[1]
    h = torch.bmm(weights[0].flatten(1, 2), images).unflatten(1, (nets, -1)).flatten(0, 1)
    h = F.leaky_relu(h + biases[0].flatten(0, 1), 0.01, inplace=True)
    for w, b in zip(weights[1:-1], biases[1:-1]):
        h = F.leaky_relu(torch.baddbmm(b.flatten(0, 1), w.flatten(0, 1), h), 0.01, inplace=True)
    return torch.baddbmm(biases[-1].flatten(0, 1), weights[-1].flatten(0, 1), h)


def loss_of(images: Tensor, labels: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Mean cross entropy of each network, summed: the networks are independent."""
    nets = weights[0].shape[1]
    target = labels[:, None].expand(-1, nets, -1).flatten(0, 1)
    return F.cross_entropy(logits(images, weights, biases), target, reduction="sum") / labels.shape[1]


def search(curve: Curve, settings: Settings, data: Data, bar: tqdm, device: str = "cpu") -> Arrays:
    """Train all strengths and seeds of a curve with the penalty; weights below `curve.cut` become zero."""
    batches = Batches(data, device)
    strengths = torch.tensor(settings.strength_grid(), device=device)
    weights, biases = initial(settings, len(strengths), device=device)
    penalty = curve.build(strengths.reshape(1, -1, 1, 1))
    optimizer = optimizer_of(curve, weights, biases, penalty)
    cosine = curve.method in ("sgd", "hapg")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs) if cosine else None
    for epoch in range(settings.epochs):
        for images, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            loss = loss_of(images, labels, weights, biases)  # type: ignore[arg-type]
            if curve.in_loss:
                loss = loss + sum(penalty.value(w) for w in weights)
            loss.backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        bar.update(len(strengths) * settings.seeds * len(data))
    if not curve.in_loss:
        optimizer.eval()  # type: ignore[attr-defined]
    return curve.threshold(arrays(weights, biases))


def retrain(masks: list[np.ndarray], settings: Settings, data: Data, bar: tqdm, checkpoint: Path, device: str = "cpu") -> Arrays:
    """Train the networks that the masks leave from fresh weights.

    The state is written to `checkpoint` every 200 epochs; a stopped run continues from it bit for bit.
    """
    batches = Batches(data, device)
    weights, biases = initial(settings, masks[0].shape[1], draw=1, device=device)
    kept = [torch.from_numpy(m).to(device) for m in masks]
    with torch.no_grad():
        for w, m in zip(weights, kept):
            w.mul_(m)
    optimizer = torch.optim.Adam(weights + biases, lr=3e-4, betas=(0.5, 0.999), fused=True)
    per_epoch = weights[0].shape[1] * settings.seeds * len(data)
    done = restore(optimizer, stages.load(checkpoint, settings)) if checkpoint.exists() else 0
    bar.update(per_epoch * done)
    for epoch in range(done, settings.retrain_epochs):
        for images, labels in batches.epoch(settings.epochs + epoch):
            optimizer.zero_grad()
            loss_of(images, labels, weights, biases).backward()  # type: ignore[arg-type]
            for w, m in zip(weights, kept):
                assert w.grad is not None
                w.grad.mul_(m)  # Adam leaves an entry with gradient 0 and weight 0 at 0
            optimizer.step()
        bar.update(per_epoch)
        if (epoch + 1) % 200 == 0:
            stages.save(checkpoint, settings, state(optimizer) | {"epoch": np.array(epoch + 1)})
    return arrays(weights, biases)


def state(optimizer: torch.optim.Optimizer) -> Arrays:
    """Parameters and optimizer state, named `index.key`."""
    found = {}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors = {"value": p.detach(), **optimizer.state[p]}
        found |= {f"{i}.{key}": tensor.cpu().numpy() for key, tensor in tensors.items()}
    return found


def restore(optimizer: torch.optim.Optimizer, saved: Arrays) -> int:
    """Load what `state` returned; the epochs that were done then."""
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        own = {k.partition(".")[2]: torch.from_numpy(v).to(p.device) for k, v in saved.items() if k.startswith(f"{i}.")}
        with torch.no_grad():
            p.copy_(own.pop("value"))
        optimizer.state[p] = own
    return int(saved["epoch"])
