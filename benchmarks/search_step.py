"""Cost of a step of an architecture search, compared with the published loop: python benchmarks/search_step.py

DARTS of first and second order, the linear supernet, ISTA-NAS and GSparsity (C=16, 8 cells, batches of 16 for training and
validation; GSparsity has no validation), and the weight step alone with all paths and with a tenth of them; the recurrent
supernet (hidden size 300, 10 000 words, 64 columns of 35 words), also with a tenth of its paths. One thread; the cases alternate,
each in processes of its own, so that noise affects all of them. Output: CPU seconds of a step (median over the rounds), peak
memory of the process, and the ratio to the published loop and, for ISTA-NAS, to DARTS of first order (its Table 1). The ISTA
cases have the same supports; `recovery` recovers all eight nodes. --compiled adds compiled networks, whose compilation takes
minutes. With --device cuda: seconds and memory of the device, all cases in one process.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
# case: the cases it is compared with
CASES: dict[str, tuple[str, ...]] = {
    "published, darts first order": (),
    "darts first order": ("published, darts first order",),
    "darts first order, compiled": ("published, darts first order", "darts first order"),
    "published, darts second order": (),
    "darts second order": ("published, darts second order",),
    "published, linear first order": (),
    "sparse_supernet first order": ("published, linear first order",),
    "sparse_supernet second order": ("published, darts second order",),
    "published, ista": (),
    "ista": ("published, ista", "darts first order"),
    "ista, recovery": (),
    "published, gsparsity": (),
    "gsparsity": ("published, gsparsity",),
    "gsparsity, half of the operations dead": ("published, gsparsity", "gsparsity"),
    "published, recurrent first order": (),
    "recurrent first order": ("published, recurrent first order",),
    "recurrent first order, compiled": ("published, recurrent first order", "recurrent first order"),
    "recurrent, a tenth of the paths": ("published, recurrent first order", "recurrent first order"),
    "published, recurrent second order": (),
    "recurrent second order": ("published, recurrent second order",),
    "weight step, all paths": (),
    "weight step, a tenth of the paths": ("weight step, all paths",),
}


def build(case: str, batch: int, device: str) -> Callable[[], object]:
    """Return a function that takes one step of the case."""
    import torch

    sys.path.insert(0, str(EXAMPLES))
    from naive_darts import NaiveNetwork, NaiveSearch
    from nas.bilevel.steps import CifarSteps
    from nas.methods import registry
    from nas.nets.torch import cnn
    from nas.space import spaces

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if "recurrent" in case:
        return recurrent_step(case, device)
    draw = lambda: (torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device))
    train, valid = draw(), draw()
    if case == "published, ista":
        return published_ista(train, valid, device)
    if "gsparsity" in case:
        return gsparsity_step(case, train, device)
    if case.startswith("published"):
        loop = NaiveSearch(NaiveNetwork(linear="linear" in case).to(device), second_order="second" in case)
        return lambda: loop.step(*train, *valid)
    name = "darts" if case.startswith("darts") else "ista" if case.startswith("ista") else "sparse_supernet"
    settings = replace(registry.CIFAR[name].presets["paper"], order="second" if "second" in case else "first")
    net = cnn.Supernet(spaces.get_space(settings.space)).to(device)
    if "compiled" in case:
        torch._dynamo.config.recompile_limit = 64  # all cells share the code, but have different shapes and paths
        for cell in net.cells:
            cell.forward = torch.compile(cell.forward, dynamic=False)
    torch.manual_seed(1)
    method = registry.build(name, net, settings)
    method.begin_epoch(0)
    if case == "ista, recovery":
        return method.codes.recover
    steps = CifarSteps(net, method, settings)
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


def published_ista(train: tuple, valid: tuple, device: str) -> Callable[[], object]:
    """A step of the published loop, with the initial supports of our method."""
    import numpy as np
    import torch
    from naive_ista import NaiveIsta, NaiveIstaSearch
    from nas.methods import ista
    from nas.methods.settings import ista as ista_settings
    from nas.space import spaces

    model = NaiveIsta()
    torch.manual_seed(1)
    codes = ista.Codes(spaces.get_space("darts"), ista_settings.IstaSettings(), torch.device("cpu"))
    codes.recover()
    model.matrices = list(codes.matrices.values())
    for b, own in zip(model.b, codes.parameters):
        b.data.copy_(own.data)
    for vectors in codes.codes.values():
        model.codes.append([np.where(np.abs(z) >= np.sort(np.abs(z))[-2], z, 0.0) for z in vectors])
    loop = NaiveIstaSearch(model.to(device))
    return lambda: loop.step(*train, *valid)


def gsparsity_step(case: str, train: tuple, device: str) -> Callable[[], object]:
    """A step of GSparsity, ours or the published one; for `dead` every other operation of each cell is zero."""
    from naive_gsparsity import NaiveGSparsity, NaiveGSparsitySearch
    from nas.methods.gsparsity import OperationGroups
    from nas.methods.settings.gsparsity import GSparsitySettings
    from nas.nets.torch import cnn
    from nas.space import spaces
    from torch.nn import functional as F

    if case.startswith("published"):
        loop = NaiveGSparsitySearch(NaiveGSparsity().to(device))
        return lambda: loop.step(*train)
    operations = OperationGroups(cnn.Supernet(spaces.get_space("darts")).to(device), GSparsitySettings())
    if "half" in case:
        for key in list(operations.flats)[::2]:
            operations.flats[key].clear()
            operations.is_active[key] = False

    def step() -> None:
        operations.optimizer.zero_grad()
        F.cross_entropy(operations.net(train[0], operations.weights(), operations.active_paths()), train[1]).backward()
        operations.step()

    return step


def recurrent_step(case: str, device: str, words: int = 10_000, hidden: int = 300) -> Callable[[], object]:
    """A step of a search on text: architecture and weights."""
    import torch
    from naive_rnn import NaiveLanguageModel, NaiveTextSearch
    from nas.bilevel.steps import TextSteps
    from nas.methods import registry
    from nas.nets.torch import rnn
    from nas.nets.torch.rnn import Drops
    from nas.space import spaces
    from nas.space.genotype import RecurrentGenotype

    draw = lambda: torch.randint(words, (2, 35, 64), device=device).unbind()
    train, valid = draw(), draw()
    order = "second" if "second" in case else "first"
    if case.startswith("published"):
        with torch.device(device):
            loop = NaiveTextSearch(NaiveLanguageModel(words, hidden), 64, second_order=order == "second")
        return lambda: loop.step(train, valid)
    settings = replace(registry.TEXT["sparse_supernet"].presets["paper"], order=order, batch=64, hidden=hidden)
    net = rnn.RecurrentSupernet(spaces.get_space("recurrent", RecurrentGenotype), words, hidden, Drops.of(settings)).to(device)
    if "compiled" in case:
        net.fuse()
    steps = TextSteps(net, registry.build("sparse_supernet", net, settings), settings)
    if "tenth" in case:
        (a,) = steps.method.parameters
        keep = torch.randperm(len(a), generator=torch.Generator().manual_seed(1))[: len(a) // 10].to(device)
        with torch.no_grad():
            a.copy_(a * torch.zeros_like(a).index_fill_(0, keep, 1.0))

    def both() -> None:
        steps.architecture(0, train, valid)
        steps.weights(train)

    return both


def measure(case: str, batch: int, steps: int, device: str) -> dict[str, float]:
    """Measure CPU seconds of a step and peak MiB of this process; with a GPU, seconds and peak MiB of the device."""
    import torch

    gpu = device != "cpu"
    if gpu:
        gc.collect()  # of the previous case
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = build(case, batch, device)
    clock = time.perf_counter if gpu else time.process_time
    step()
    if gpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(steps):
        step()
    if gpu:
        torch.cuda.synchronize()
    seconds = (clock() - start) / steps
    mib = torch.cuda.max_memory_allocated() / 2**20 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu": seconds, "mib": mib}


def apart(case: str, batch: int, steps: int, device: str) -> dict[str, float]:
    """Run `measure` in a new process, whose memory nothing else has used; with a GPU in this one, as starting is slow there."""
    if device != "cpu":
        return measure(case, batch, steps, device)
    command = [sys.executable, __file__, "--case", case, "--batch", str(batch), "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps in a round, after a warm-up step")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the cases to run")
    parser.add_argument("--compiled", action="store_true", help="also the cases with torch.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.batch, args.steps, args.device)))
        return
    cases = [c for c in CASES if args.compiled or "compiled" not in c]
    cases = [c for c in cases if not args.only or any(word in c for word in args.only)]
    found: dict[str, list[dict]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            try:
                run = apart(case, args.batch, args.steps, args.device)
            except RuntimeError as error:  # of a device: the other cases can still be measured
                print(f"{case}: left out, {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                continue
            found[case].append(run)
            print(f"{case}: {run['cpu']:.4g} s, {run['mib']:.0f} MiB", file=sys.stderr, flush=True)
    left_out = [case for case, runs in found.items() if len(runs) < args.rounds]
    for case in left_out:
        del found[case]
    rows = []
    print(f"{'case':36}{'seconds' if args.device == 'cuda' else 'CPU s':>9}{'MiB':>8}{'ratio':>8}   range")
    for case, runs in found.items():
        row = {"case": case, "cpu_s": statistics.median(r["cpu"] for r in runs), "mib": max(r["mib"] for r in runs)}
        text = f"{case:36}{row['cpu_s']:9.4f}{row['mib']:8.0f}"
        bases = [base for base in CASES[case] if base in found]
        for base in bases:
            ratios = [a["cpu"] / b["cpu"] for a, b in zip(runs, found[base])]
            ratio = statistics.median(ratios)
            rows.append(row | {"against": base, "ratio": ratio})
            print(f"{text}{ratio:8.3f}   {min(ratios):.3f} - {max(ratios):.3f}   of {base}")
        if not bases:
            print(text)
            rows.append(row)
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["case", "cpu_s", "mib", "against", "ratio"])
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(bool(left_out))


if __name__ == "__main__":
    main()
