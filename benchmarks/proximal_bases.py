"""Where `Proximal(base, L1(strength))` converges to behind every optimizer of torch.

    python benchmarks/proximal_bases.py         # about three minutes of CPU time; writes benchmarks/results/proximal_bases.csv

The problem is min_w (w - 3)^2 / 2 + strength |w| with exact gradients, whose solution is 3 - strength. Each optimizer starts at
5 and at 1 and takes 6000 steps. The table shows the mean of the last 300 iterates, or its range where the two starts differ.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import tyro
from torch.optim import SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, RAdam, RMSprop, Rprop

from proxopt import L1
from proxopt_torch import ProxAdam, Proximal

STRENGTHS = (0.1, 0.5, 1.0, 2.0)
TARGET = 3.0
BASES = {
    "SGD": lambda p: SGD(p, lr=0.01),
    "SGD(momentum=0.9)": lambda p: SGD(p, lr=0.01, momentum=0.9),
    "SGD(momentum=0.9, nesterov=True)": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "SGD(momentum=0.9, dampening=0.9)": lambda p: SGD(p, lr=0.01, momentum=0.9, dampening=0.9),
    "RMSprop": lambda p: RMSprop(p, lr=0.01),
    "RMSprop(momentum=0.9)": lambda p: RMSprop(p, lr=0.01, momentum=0.9),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW(weight_decay=0)": lambda p: AdamW(p, lr=0.01, weight_decay=0),
    "NAdam": lambda p: NAdam(p, lr=0.01),
    "RAdam": lambda p: RAdam(p, lr=0.01),
    "Adamax": lambda p: Adamax(p, lr=0.01),
    "Adagrad": lambda p: Adagrad(p, lr=0.1),
    "Adadelta": lambda p: Adadelta(p, lr=1.0),
    "Adafactor": lambda p: Adafactor(p, lr=0.01),
    "Rprop": lambda p: Rprop(p, lr=0.01),
    "Muon": lambda p: Muon(p, lr=0.01, weight_decay=0),
}


def converged(make: object, strength: float, start: float, steps: int) -> float:
    """The mean of the last twentieth of the iterates."""
    w = torch.nn.Parameter(torch.full((1, 1), start, dtype=torch.float64))
    optimizer = make([w], L1(strength))  # type: ignore[operator]
    seen = []
    for step in range(steps):
        w.grad = w.detach() - TARGET
        optimizer.step()
        if step >= steps - steps // 20:
            seen.append(float(w.detach()))
    return sum(seen) / len(seen)


def main(out: Path = Path("benchmarks/results/proximal_bases.csv"), steps: int = 6000) -> None:
    """Measure and print.

    Args:
      out: the table, as CSV.
      steps: of each optimizer.
    """
    torch.set_num_threads(1)
    makers = {"solution": None, "ProxAdam": lambda p, penalty: ProxAdam(p, lr=0.01, penalty=penalty)}
    makers |= {name: lambda p, penalty, base=base: Proximal(base(p), penalty) for name, base in BASES.items()}
    rows = []
    print("| base | " + " | ".join(f"strength {s:g}" for s in STRENGTHS) + " |")
    print("| --- |" + " --- |" * len(STRENGTHS))
    for name, make in makers.items():
        cells = []
        for strength in STRENGTHS:
            exact = TARGET - strength
            ends = [exact, exact] if make is None else [converged(make, strength, start, steps) for start in (5.0, 1.0)]
            mean, apart = sum(ends) / 2, abs(ends[1] - ends[0])
            rows.append({"base": name, "strength": strength, "from_5": ends[0], "from_1": ends[1], "solution": exact})
            cells.append(f"{mean:.2f}" if apart < 0.01 else f"{min(ends):.2f} to {max(ends):.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    tyro.cli(main)
