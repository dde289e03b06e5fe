"""Cost of a step of an architecture search, ours beside the published loop: python benchmarks/search_step.py

DARTS first and second order and the linear supernet (C=16, 8 cells, batch 16 and 16 for validation), and the weight step alone
with all paths and with a tenth of them. One thread; every case in processes of its own, in turn, so that noise meets all
alike. CPU seconds a step (median over the rounds), peak memory of the process, and the ratio to the published loop.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
# case: the case it is compared with
CASES = {
    "published, darts first order": None,
    "darts first order": "published, darts first order",
    "published, darts second order": None,
    "darts second order": "published, darts second order",
    "published, linear first order": None,
    "sparse_supernet first order": "published, linear first order",
    "sparse_supernet second order": "published, darts second order",
    "weight step, all paths": None,
    "weight step, a tenth of the paths": "weight step, all paths",
}


def build(case: str, batch: int) -> Callable[[], object]:
    """A function that takes one step of the case."""
    import torch

    sys.path.insert(0, str(EXAMPLES))
    from naive_darts import NaiveNetwork, NaiveSearch
    from nas import cnn, methods, spaces
    from nas.steps import Steps

    torch.manual_seed(0)
    torch.set_num_threads(1)
    draw = lambda: (torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))
    train, valid = draw(), draw()
    if case.startswith("published"):
        loop = NaiveSearch(NaiveNetwork(linear="linear" in case), second_order="second" in case)
        return lambda: loop.step(*train, *valid)
    name = "darts" if case.startswith("darts") else "sparse_supernet"
    settings = methods.registry()[name][1](order="second" if "second" in case else "first")
    net = cnn.Supernet(spaces.get(settings.space))
    method = methods.build(name, net, settings)
    steps = Steps(net, method, settings)
    if case.startswith("weight step"):
        if "tenth" in case:
            for a in method.parameters:
                keep = torch.randperm(len(a), generator=torch.Generator().manual_seed(1))[: len(a) // 10]
                with torch.no_grad():
                    a.copy_(a * torch.zeros_like(a).index_fill_(0, keep, 1.0))
        return lambda: steps.weights(train)

    def both() -> None:
        steps.architecture(0, train, valid)
        steps.weights(train)

    return both


def measure(case: str, batch: int, steps: int) -> dict[str, float]:
    """CPU seconds of a step and peak MiB of this process."""
    step = build(case, batch)
    step()
    start = time.process_time()
    for _ in range(steps):
        step()
    cpu = (time.process_time() - start) / steps
    return {"cpu": cpu, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps a round, after one to warm up")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the cases to run")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.batch, args.steps)))
        return
    cases = [c for c in CASES if not args.only or any(word in c for word in args.only)]
    found: dict[str, list[dict]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            command = [sys.executable, __file__, "--case", case, "--batch", str(args.batch), "--steps", str(args.steps)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[case].append(json.loads(done.stdout))
    rows = []
    print(f"{'case':36}{'CPU s':>8}{'MiB':>8}{'ratio':>8}   range")
    for case, runs in found.items():
        row = {"case": case, "cpu_s": statistics.median(r["cpu"] for r in runs), "mib": max(r["mib"] for r in runs)}
        text = f"{case:36}{row['cpu_s']:8.2f}{row['mib']:8.0f}"
        base = found.get(CASES[case] or "")
        if base:
            ratios = [a["cpu"] / b["cpu"] for a, b in zip(runs, base)]
            row |= {"against": CASES[case], "ratio": statistics.median(ratios)}
            text += f"{row['ratio']:8.2f}   {min(ratios):.2f} - {max(ratios):.2f}"
        print(text)
        rows.append(row)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["case", "cpu_s", "mib", "against", "ratio"])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
