"""The search loop: weights on one half of the images, architecture on the other, epoch by epoch, from any stop onwards.

    result = run("sparse_supernet", settings, seed=0, out=Path("runs/search"), resume=False)

Writes into `out`: checkpoint.pt, search.csv, genotype.json, settings.json and the pictures of `nas.report`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import bilevel, checkpoint, cnn, data, report, spaces
from .genotype import CELLS
from .log import Log
from .methods import Method, build
from .operations import frozen_statistics
from .processes import Processes, join
from .settings import SearchSettings
from .spaces import Masks

TRAIN, VALID = 1, 2  # streams of random numbers


class Search:
    """All state of a search. `run()` trains to the end and returns the last row of the table."""

    def __init__(self, method: str, settings: SearchSettings, seed: int, out: Path, processes: Processes, device: torch.device):
        self.name, self.settings, self.seed, self.out = method, settings, seed, out
        self.processes, self.device = processes, device
        torch.manual_seed(seed)
        dataset = data.load(settings.data, settings.data_dir)
        if settings.images > len(dataset.train.labels):
            raise ValueError(f"images must be at most {len(dataset.train.labels)}, got {settings.images}")
        half = settings.images // 2
        parts = [dataset.train.take(slice(half)), dataset.train.take(slice(half, 2 * half))]
        self.train_set, self.valid_set = (part.to(device) for part in parts)
        self.plain = data.Augment(dataset.mean, dataset.std)
        augment = data.Augment(dataset.mean, dataset.std, padding=4)
        share = processes.share
        self.train_batches = data.Batches(self.train_set, settings.batch, seed, augment, TRAIN, share)
        self.valid_batches = data.Batches(self.valid_set, settings.batch, seed, augment, VALID, share)

        self.net = cnn.Supernet(spaces.get(settings.space), settings.channels, settings.layers, dataset.classes).to(device)
        self.method: Method = build(method, self.net, settings)
        self.params = list(self.net.parameters())
        self.sgd = torch.optim.SGD(
            self.params, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=True
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.sgd, settings.epochs, settings.lr_min)
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images of this epoch
        self.rows: list[dict[str, Any]] = []
        self.points: list[dict[str, Tensor]] = []  # the prox point after every epoch

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.settings.amp else nullcontext()

    def loss(self, batch: tuple[Tensor, Tensor], weights: Any, alive: Masks | None) -> tuple[Tensor, Tensor]:
        """Mean cross entropy, and the logits."""
        images, labels = batch
        with self.autocast():
            logits = self.net(images, weights, alive)
        return F.cross_entropy(logits.float(), labels), logits

    # -- one step -----------------------------------------------------------------------------

    def architecture_step(self, train: tuple, valid: tuple) -> None:
        s, method = self.settings, self.method
        alive = None if method.probes(self.step) else method.alive()
        on = lambda batch: lambda: self.loss(batch, method.weights(), alive)[0]
        average = self.processes.average
        with frozen_statistics(self.net):
            if s.order == "first":
                grads = bilevel.first_order(method.parameters, on(valid), average)
            else:
                lr = self.sgd.param_groups[0]["lr"]
                grads = bilevel.second_order(
                    method.parameters, self.params, on(train), on(valid), lr, self.direction, s.hessian, average
                )
        method.update(grads)

    def direction(self, grads: Any) -> list[Tensor]:
        """Where SGD would go: with its weight decay and momentum."""
        out = list(torch._foreach_add(list(grads), self.params, alpha=self.settings.weight_decay))
        for i, p in enumerate(self.params):
            buffer = self.sgd.state[p].get("momentum_buffer") if p in self.sgd.state else None
            if buffer is not None:
                out[i] = out[i] + self.settings.momentum * buffer
        return out

    def weight_step(self, batch: tuple) -> None:
        with torch.no_grad():
            weights = dict(self.method.weights())
        loss, logits = self.loss(batch, weights, self.method.alive())
        self.sgd.zero_grad()
        loss.backward()
        live = [p for p in self.params if p.grad is not None]
        self.processes.average([p.grad for p in live])  # type: ignore[misc]
        nn.utils.clip_grad_norm_(live, self.settings.clip)
        self.sgd.step()
        n = len(batch[1])
        self.sums += torch.stack([loss.detach().double() * n, (logits.argmax(1) == batch[1]).sum(), torch.full_like(loss, n)])

    # -- epochs -------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        steps, first = len(self.train_batches), self.processes.first
        total, done = steps * self.settings.epochs, self.epoch * steps + self.step
        log = Log(self.out) if first else None
        patience = 0.5 if os.isatty(2) else 30.0
        with tqdm(total=total, initial=done, unit="step", disable=not first, mininterval=patience, smoothing=0.05) as bar:
            while self.epoch < self.settings.epochs:
                self._epoch(bar)
                self._finish_epoch(bar, log)
        if first:
            report.write(self.out, self.name, self.rows, self.points, self.net.space, self.settings, self.seed)
        self.processes.wait()
        return self.rows[-1]

    def _epoch(self, bar: tqdm) -> None:
        if self.step == 0:
            self.method.begin_epoch(self.epoch)
        self.net.train()
        last = saved = time.monotonic()
        for train, valid in self._pairs():
            self.architecture_step(train, valid)
            self.weight_step(train)
            self.step += 1
            bar.update()
            now = time.monotonic()
            self.seconds += now - last
            last = now
            if now - saved > 60 * self.settings.checkpoint_minutes:
                self.save()
                saved = now

    def _pairs(self) -> Iterator[tuple[tuple, tuple]]:
        return zip(self.train_batches.epoch(self.epoch, self.step), self.valid_batches.epoch(self.epoch, self.step))

    def _finish_epoch(self, bar: tqdm, log: Log | None) -> None:
        self.processes.check_same("the architecture", self.method.parameters)
        self.processes.average_buffers(self.net)
        self.processes.total([self.sums])
        loss, correct, images = self.sums.tolist()
        point, genotype = self.method.point(), self.method.genotype()
        masks = self.net.space.masks(genotype)
        valid_loss, valid_accuracy = self.evaluate(self.method.weights(), self.method.alive())
        restricted_loss, restricted_accuracy = self.evaluate(point, masks)
        row = {
            "epoch": self.epoch,
            "seconds": round(self.seconds, 1),
            "lr": self.sgd.param_groups[0]["lr"],
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "restricted_loss": restricted_loss,
            "restricted_accuracy": restricted_accuracy,
        }
        for cell in CELLS:
            living = [path.operation for path in genotype.paths(cell)]
            row[f"zeros_{cell}"] = int((point[cell] == 0).sum())
            row[f"paths_{cell}"] = len(living)
            row[f"nodes_{cell}"] = len(genotype.living(cell))
            row[f"skips_{cell}"] = living.count("skip_connect")
        self.rows.append(row | self.method.log())
        self.points.append({cell: p.cpu() for cell, p in point.items()})
        self.sums.zero_()
        self.scheduler.step()
        self.epoch, self.step = self.epoch + 1, 0
        self.save()
        if log is not None:
            log.write(self.rows)
            genotype.save(self.out / "genotypes" / f"epoch-{self.epoch:03d}.json")
            genotype.save(self.out / "genotype.json")
            paths = "+".join(str(row[f"paths_{cell}"]) for cell in CELLS)
            bar.set_postfix_str(f"valid {100 * valid_accuracy:.1f} %, paths {paths}", refresh=False)

    @torch.no_grad()
    def evaluate(self, weights: Any, alive: Masks | None) -> tuple[float, float]:
        """Loss and accuracy of the supernet on the validation half, running statistics in the batch norms."""
        self.net.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for images, labels in data.whole(self.valid_set, self.plain, share=self.processes.share):
            with self.autocast():
                logits = self.net(images, weights, alive).float()
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            sums += torch.stack([loss, (logits.argmax(1) == labels).sum(), torch.full_like(loss, len(labels))])
        self.net.train()
        self.processes.total([sums])
        loss_sum, correct, images_seen = sums.tolist()
        return loss_sum / images_seen, correct / images_seen

    # -- stopping and going on ----------------------------------------------------------------

    def settings_dict(self) -> dict[str, Any]:
        return {"method": self.name, "seed": self.seed, "processes": self.processes.world, **self.settings.plain()}

    def save(self) -> None:
        if not self.processes.first:
            return
        state = {
            "settings": self.settings_dict(),
            "net": self.net.state_dict(),
            "sgd": self.sgd.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "method": self.method.state_dict(),
            "progress": {"epoch": self.epoch, "step": self.step, "seconds": self.seconds},
            "sums": self.sums,
            "rows": self.rows,
            "points": self.points,
            "random": checkpoint.random_state(self.device),
        }
        checkpoint.save(self.out / "checkpoint.pt", state)

    def load(self) -> None:
        state = checkpoint.load(self.out / "checkpoint.pt", self.device)
        checkpoint.refuse_other("search", self.settings_dict(), state["settings"])
        self.net.load_state_dict(state["net"])
        self.sgd.load_state_dict(state["sgd"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.method.load_state_dict(state["method"])
        self.epoch, self.step, self.seconds = (state["progress"][k] for k in ("epoch", "step", "seconds"))
        self.sums.copy_(state["sums"])
        self.rows = state["rows"]
        self.points = [{cell: p.cpu() for cell, p in point.items()} for point in state["points"]]
        checkpoint.restore_random_state(state["random"], self.device)


def run(method: str, settings: SearchSettings, seed: int, out: Path, resume: bool = False) -> dict[str, Any]:
    """One search; the last row of its table.

    Raises:
      FileExistsError: `out` holds a search and `resume` is off.
      ValueError: a setting out of its domain; with `resume`, a checkpoint of other settings or a damaged one.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes, device = join(settings.device)
    there = (out / "checkpoint.pt").exists()
    if there and not resume:
        raise FileExistsError(f"{out} holds a search already: continue it with --resume, or choose another --out")
    search = Search(method, settings, seed, out, processes, device)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "settings.json").write_text(json.dumps(search.settings_dict(), indent=1) + "\n")
    if there:
        search.load()
    processes.wait()
    return search.run()
