"""Train small networks under `groups.coupled` and compact them: python benchmarks/coupled_training.py --out runs/coupled_training

Two tasks, without downloads: a residual network on scikit-learn's digits, and a language model of characters (Llama of
transformers, with grouped queries) on the help texts of Python. After some steps without a penalty, the strength of every joint
problem grows until half of its units are zero. It is then lowered, so that the others recover: a unit without any weights gets no
gradient and stays zero.

Reported for each task: the loss on held-out data of the same training without a penalty, that with the zeros and that of the
compact model; the units and parameters before and after `compact`; the largest difference of their outputs on new inputs, over
the largest output; and seconds.

Writes one row for each task and optimizer into coupled_training.csv in --out, as soon as it is there. transformers comes with the
extra `zoo`.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxopt import GroupL2
from proxopt_torch import ProxAdam, ProximalOptimizer, ProxSGD, compact, groups, sparsity_report

WARM_UP = 0.2  # of the steps
GROWTH = 1.1  # of the strength of a problem, from one check to the next, until half of its units are zero
AFTER = 0.02  # what the strength is then multiplied by
SHARE = 0.5


@dataclass
class Task:
    """A model, batches to train on, its loss on a batch, held-out data and an example of its inputs."""

    model: nn.Module
    batches: Iterator[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    held_out: Any
    example: Any
    fresh: Callable[[], Any]  # inputs of another batch size
    strength: float  # from which it grows


@dataclass
class Row:
    """What one training left."""

    task: str
    optimizer: str
    steps: int
    dense_loss: float
    loss: float
    compact_loss: float
    units: int
    units_left: int
    parameters: int
    parameters_left: int
    gap: float
    training_seconds: float
    compact_seconds: float


class Block(nn.Module):
    """Two convolutions, around which their input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def residual() -> Task:
    """A residual network on digits: two stages of two blocks."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    y = torch.as_tensor(digits.target)
    order = torch.as_tensor(np.random.default_rng(0).permutation(len(y)))
    x, y = x[order], y[order]
    layers = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16), Block(16)]
    layers += [nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), Block(32), Block(32)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def batches() -> Iterator[Any]:
        while True:
            picked = torch.randint(0, 1400, (64,))
            yield x[picked], y[picked]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return Task(model, batches(), loss, (x[1400:], y[1400:]), x[:2], lambda: torch.rand(7, 1, 8, 8), 5e-4)


def llama() -> Task:
    """A Llama with four query heads for each of its two heads of keys and values, on characters."""
    from pydoc_data.topics import topics

    from architectures import import_timm

    import_timm()  # transformers imports torchvision where it is installed
    from transformers import LlamaConfig, LlamaForCausalLM

    text = "\n".join(topics[key] for key in sorted(topics))
    characters = sorted(set(text))
    code = {c: i for i, c in enumerate(characters)}
    tokens = torch.tensor([code[c] for c in text])
    train, test = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(characters), num_hidden_layers=2, max_position_embeddings=64, **sizes)
    model = LlamaForCausalLM(config)

    def windows(source: Tensor, starts: Tensor) -> Tensor:
        return torch.stack([source[s : s + 65] for s in starts.tolist()])

    def batches() -> Iterator[Any]:
        while True:
            yield windows(train, torch.randint(0, len(train) - 65, (32,)))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    held_out = windows(test, torch.arange(0, len(test) - 65, 65)[:200])
    example = {"input_ids": held_out[:2, :-1], "use_cache": False}
    fresh = lambda: {"input_ids": torch.randint(0, len(characters), (5, 48)), "use_cache": False}
    return Task(model, batches(), loss, held_out, example, fresh, 1e-4)


TASKS = {"residual net": residual, "grouped-query Llama": llama}
OPTIMIZERS: dict[str, Callable[..., ProximalOptimizer]] = {
    "ProxAdam": lambda found: ProxAdam(found, lr=2e-3),
    "ProxSGD": lambda found: ProxSGD(found, lr=0.1, rho=0.9),
}


def train(task: Task, optimizer: ProximalOptimizer, steps: int, every: int, report: Callable[[str], None]) -> None:
    """Train, and raise the strength of each problem every few steps until half of its units are zero."""
    task.model.train()
    joint = [group for group in optimizer.param_groups if group["joint"]]
    starts, reached = [group["strength"] for group in joint], set[int]()
    for step in range(steps):
        for group, start in zip(joint, starts):
            if step in (0, int(WARM_UP * steps)):
                group["strength"] = 0.0 if step == 0 else start
        optimizer.zero_grad()
        loss = task.loss(task.model, next(task.batches))
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0:
            rows = sparsity_report(optimizer).rows
            for group, row in zip(joint, (r for r in rows if r.groups)):
                if row.living > (1 - SHARE) * row.groups:
                    group["strength"] *= GROWTH
                elif id(group) not in reached:
                    reached.add(id(group))
                    group["strength"] *= AFTER
            report(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {sum(r.living or 0 for r in rows)} units left")
    optimizer.eval()


def measure(task: Task, model: nn.Module) -> float:
    """The loss on held-out data."""
    model.eval()
    with torch.no_grad():
        return task.loss(model, task.held_out).item()


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def run(name: str, optimizer_name: str, steps: int, seed: int, report: Callable[[str], None]) -> Row:
    """One training without a penalty, one with it, and the compact model."""

    def fresh_task() -> Task:
        torch.manual_seed(seed)
        return TASKS[name]()

    dense = fresh_task()
    train(dense, OPTIMIZERS[optimizer_name]([{"params": list(dense.model.parameters())}]), steps, steps, report)
    task = fresh_task()
    found = groups.coupled(task.model, task.example, GroupL2(task.strength))
    report(str(found))
    optimizer = OPTIMIZERS[optimizer_name](found)
    start = time.perf_counter()
    train(task, optimizer, steps, max(steps // 60, 1), report)
    seconds = time.perf_counter() - start
    rows = [row for row in sparsity_report(optimizer).rows if row.groups]
    loss = measure(task, task.model)
    start = time.perf_counter()
    smaller = compact(task.model, task.example)
    compact_seconds = time.perf_counter() - start
    report(str(smaller))
    inputs = task.fresh()
    expected, result = outputs(task.model, inputs), outputs(smaller.model, inputs)
    return Row(
        name,
        optimizer_name,
        steps,
        measure(dense, dense.model),
        loss,
        measure(task, smaller.model),
        sum(row.groups for row in rows if row.groups),
        sum(row.living for row in rows if row.living),
        sum(p.numel() for p in task.model.parameters()),
        sum(p.numel() for p in smaller.model.parameters()),
        ((expected - result).abs().max() / expected.abs().max()).item(),
        seconds,
        compact_seconds,
    )


def write(rows: list[Row], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/coupled_training"), help="folder for the table")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=["ProxAdam"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seed < 0:
        parser.error(f"--steps must be at least 1 and --seed at least 0, got {args.steps} and {args.seed}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for task in args.tasks:
        for optimizer in args.optimizers:
            report = lambda line, prefix=f"{task}, {optimizer}": print(f"{prefix}: {line}", flush=True)
            rows.append(run(task, optimizer, args.steps, args.seed, report))
            write(rows, args.out / "coupled_training.csv")
            report(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in asdict(rows[-1]).items()))
    print(f"written: {args.out}/coupled_training.csv")


if __name__ == "__main__":
    main()
