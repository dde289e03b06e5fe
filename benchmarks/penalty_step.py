"""Cost of a step with a penalty of a user beside a built-in one: python benchmarks/penalty_step.py

Many small tensors, as architecture weights are, are stepped with L1 and with the log penalty of ``examples/own_penalty.py``,
with GroupL2 and with the grouped log penalty, and with an operator that has the methods ``value`` and ``prox`` and declares
nothing. The two of a pair step in turn, round after round, in one process on one thread. The table gives CPU milliseconds a step
(median) and the ratio to the built-in penalty of the same round, as median and range.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from optimizer_step import build, seconds_of, write_table
from own_penalty import GroupLog, Log

from proxopt import L1, GroupL2, Groups, ProxOperator
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, ProxSGD

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ProxSGD": ProxSGD,
    "HAPG": HAPG,
    "ProxAdam": ProxAdam,
    "AdamHAPG": AdamHAPG,
}
WHOLE = Groups.whole()


class Undeclared:
    """An operator of which nothing is known: it is applied tensor by tensor."""

    def __init__(self, inner: ProxOperator) -> None:
        self.value, self.prox = inner.value, inner.prox


PAIRS: dict[str, tuple[ProxOperator, ProxOperator]] = {
    "Log / L1": (Log(1e-4), L1(1e-4)),
    "GroupLog / GroupL2, support": (GroupLog(1e-4, groups=WHOLE), GroupL2(1e-4, WHOLE, metric="support")),
    "undeclared L1 / L1": (Undeclared(L1(1e-4)), L1(1e-4)),
}


def optimizer_of(make: Callable[..., torch.optim.Optimizer], penalty: ProxOperator, params: list) -> torch.optim.Optimizer:
    return make([{"params": params, "penalty": penalty}], lr=1e-3)


def measure(make: Callable[..., torch.optim.Optimizer], pair: tuple, tensors: int, entries: int, rounds: int) -> dict[str, float]:
    """Milliseconds a step of two penalties that step in turn, after two rounds of warm-up, and their ratio."""
    optimizers = [build([(entries,)] * tensors, partial(optimizer_of, make, penalty), True, "cpu") for penalty in pair]
    times = [[seconds_of(optimizer.step, "cpu") for optimizer in optimizers] for _ in range(rounds + 2)][2:]
    ratios = [own / built_in for own, built_in in times]
    own_ms, built_in_ms = (1e3 * statistics.median(column) for column in zip(*times))
    return {
        "own_ms": own_ms,
        "built_in_ms": built_in_ms,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=2000, help="number of parameters")
    parser.add_argument("--entries", type=int, default=8, help="entries of each")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{args.tensors} tensors of {args.entries}, one thread")
    print(f"{'optimizer':10} {'penalties':28} {'own ms':>8} {'built-in':>9} {'ratio':>6}   range")
    rows: list[dict[str, Any]] = []
    for name, make in OPTIMIZERS.items():
        for pair, penalties in PAIRS.items():
            row = measure(make, penalties, args.tensors, args.entries, args.rounds)
            rows.append({"optimizer": name, "penalties": pair, **row})
            numbers = "{own_ms:8.2f} {built_in_ms:9.2f} {ratio:6.2f}   {ratio_min:.2f} - {ratio_max:.2f}".format(**row)
            print(f"{name:10} {pair:28} {numbers}", flush=True)
    if args.out:
        write_table(args.out, rows)


if __name__ == "__main__":
    main()
