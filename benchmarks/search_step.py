"""Cost of a step of an architecture search, beside transcriptions of the published code or JAX: python benchmarks/search_step.py

The transcriptions are naive_darts.py, naive_ista.py, naive_gsparsity.py and naive_rnn.py: the authors' supernets and loops,
rewritten operation by operation for current PyTorch. `published_step.py` measures their repositories themselves.

DARTS of first and second order, the linear supernet, ISTA-NAS and GSparsity (C=16, 8 cells, batches of 16 for training and
validation; GSparsity has no validation), and the weight step alone with all paths and with a tenth of them; the recurrent
supernet (hidden size 300, 10 000 words, 64 columns of 35 words), also with a tenth of its paths. One thread; the cases alternate,
each in processes of its own, so that noise affects all of them. Output: CPU seconds of a step (median over the rounds), peak
memory of the process, and the ratio to the transcription and, for ISTA-NAS, to DARTS of first order (its Table 1). The ISTA
cases have the same supports; `recovery` recovers all eight nodes. --compiled adds compiled networks, whose compilation takes
minutes, and --graphs whole steps as CUDA graphs. With --device cuda: seconds and memory of the device, all cases of PyTorch in
one process.

--framework jax compares each step in JAX with the same step in PyTorch, where that is installed, in place of transcriptions
(search_step_jax.py), and reports seconds of compilation without a cache, and the memory of the arrays of the largest program. The
step in JAX includes drawing and augmenting its batch. --preset small has the sizes of the small presets of the searches (C=8,
5 cells, batch 32; hidden size 96, 10 words), and reports the compilation of a whole search, evaluations included.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
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
from typing import Any

import search_step_jax
from jax_step import on_one_thread
from search_cases import PRESETS, Sizes, compressed, tenth

EXAMPLES = Path(__file__).parent.parent / "examples"
# case: the cases it is compared with
CASES: dict[str, tuple[str, ...]] = {
    "transcribed, darts first order": (),
    "darts first order": ("transcribed, darts first order",),
    "darts first order, compiled": ("transcribed, darts first order", "darts first order"),
    "darts first order, CUDA graph": ("darts first order",),
    "transcribed, darts second order": (),
    "darts second order": ("transcribed, darts second order",),
    "transcribed, linear first order": (),
    "sparse_supernet first order": ("transcribed, linear first order",),
    "sparse_supernet second order": ("transcribed, darts second order",),
    "transcribed, ista": (),
    "ista": ("transcribed, ista", "darts first order"),
    "ista, compiled": ("ista",),
    "ista, CUDA graph": ("ista",),
    "ista, recovery": (),
    "transcribed, gsparsity": (),
    "gsparsity": ("transcribed, gsparsity",),
    "gsparsity, half of the operations dead": ("transcribed, gsparsity", "gsparsity"),
    "transcribed, recurrent first order": (),
    "recurrent first order": ("transcribed, recurrent first order",),
    "recurrent first order, compiled": ("transcribed, recurrent first order", "recurrent first order"),
    "recurrent, a tenth of the paths": ("transcribed, recurrent first order", "recurrent first order"),
    "transcribed, recurrent second order": (),
    "recurrent second order": ("transcribed, recurrent second order",),
    "weight step, all paths": (),
    "weight step, a tenth of the paths": ("weight step, all paths",),
}
JAX = "jax, "
JAX_CASES = {f"{JAX}{case}": (case,) for case in search_step_jax.CASES}
DEVICES = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}


def build(case: str, sizes: Sizes, device: str) -> Callable[[], object]:
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
        return recurrent_step(case, sizes, device)
    draw = lambda: (
        torch.randn(sizes.batch, 3, 32, 32, device=device),
        torch.randint(10, (sizes.batch,), device=device),
    )
    train, valid = draw(), draw()
    if case == "transcribed, ista":
        return transcribed_ista(train, valid, device)
    if "gsparsity" in case:
        return gsparsity_step(case, sizes, train, device)
    if case.startswith("transcribed"):
        loop = NaiveSearch(NaiveNetwork(linear="linear" in case).to(device), second_order="second" in case)
        return lambda: loop.step(*train, *valid)
    name = "darts" if case.startswith("darts") else "ista" if case.startswith("ista") else "sparse_supernet"
    settings = replace(registry.CIFAR[name].presets["paper"], order="second" if "second" in case else "first")
    net = cnn.Supernet(spaces.get_space(settings.space), sizes.channels, sizes.layers).to(device)
    if "compiled" in case:
        torch._dynamo.config.recompile_limit = 64  # all cells share the code, but have different shapes and paths
        for cell in net.cells:
            cell.forward = torch.compile(cell.forward, dynamic=False)
    torch.manual_seed(1)
    method = registry.build(name, net, settings)
    if case.startswith("ista"):
        draw_codes(method.codes)
    method.begin_epoch(0)
    if case == "ista, recovery":
        return method.codes.recover
    steps = CifarSteps(net, method, settings)
    if case.startswith("weight step"):
        if "tenth" in case:
            for a in method.parameters:
                keep_only(a, tenth(len(a)))
        return lambda: steps.weights(train)

    def both() -> None:
        steps.architecture(0, train, valid)
        steps.weights(train)

    if "graph" in case:
        for group in method.optimizer.param_groups:
            group["capturable"] = True
        return captured(both)
    return both


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph: its kernels, recorded once, which the host launches as one. It repeats the same batches.

    A step can be recorded as long as its paths are the same: in ISTA-NAS within an epoch, in DARTS always.
    """
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # allocates what the step keeps: the state of the optimizers
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def keep_only(a: Any, keep: Any) -> None:
    """Set all weights to zero but these."""
    import torch

    with torch.no_grad():
        a.copy_(a * torch.zeros_like(a).index_fill_(0, torch.from_numpy(keep).to(a.device), 1.0))


def draw_codes(codes: Any) -> None:
    """Give ISTA-NAS the matrices and variables that the case in JAX has, and with them the same supports."""
    import torch

    shapes = {cell: [(codes.settings.rows, len(own)) for own in members] for cell, members in codes.members.items()}
    matrices, variables = compressed(shapes)
    codes.matrices = {cell: [torch.from_numpy(a).double().numpy() for a in own] for cell, own in matrices.items()}
    with torch.no_grad():
        for cell, b in zip(codes.cells, codes.parameters):
            b.copy_(torch.from_numpy(variables[cell]))


def transcribed_ista(train: tuple, valid: tuple, device: str) -> Callable[[], object]:
    """A step of the transcription of ISTA-NAS, with the initial supports of our method."""
    import numpy as np
    import torch
    from naive_ista import NaiveIsta, NaiveIstaSearch
    from nas.methods import ista
    from nas.methods.settings import ista as ista_settings
    from nas.space import spaces

    model = NaiveIsta()
    torch.manual_seed(1)
    codes = ista.Codes(spaces.get_space("darts"), ista_settings.IstaSettings(), torch.device("cpu"))
    draw_codes(codes)
    codes.recover()
    model.matrices = list(codes.matrices.values())
    for b, own in zip(model.b, codes.parameters):
        b.data.copy_(own.data)
    for vectors in codes.codes.values():
        model.codes.append([np.where(np.abs(z) >= np.sort(np.abs(z))[-2], z, 0.0) for z in vectors])
    loop = NaiveIstaSearch(model.to(device))
    return lambda: loop.step(*train, *valid)


def gsparsity_step(case: str, sizes: Sizes, train: tuple, device: str) -> Callable[[], object]:
    """A step of GSparsity, ours or the transcription; for `dead` every other operation of each cell is zero."""
    from naive_gsparsity import NaiveGSparsity, NaiveGSparsitySearch
    from nas.methods.gsparsity import OperationGroups
    from nas.methods.settings.gsparsity import GSparsitySettings
    from nas.nets.torch import cnn
    from nas.space import spaces
    from torch.nn import functional as F

    if case.startswith("transcribed"):
        loop = NaiveGSparsitySearch(NaiveGSparsity().to(device))
        return lambda: loop.step(*train)
    net = cnn.Supernet(spaces.get_space("darts"), sizes.channels, sizes.layers)
    operations = OperationGroups(net.to(device), GSparsitySettings())
    if "half" in case:
        for key in list(operations.flats)[::2]:
            operations.flats[key].clear()
            operations.is_active[key] = False

    def step() -> None:
        operations.optimizer.zero_grad()
        F.cross_entropy(operations.net(train[0], operations.weights(), operations.active_paths()), train[1]).backward()
        operations.step()

    return step


def recurrent_step(case: str, sizes: Sizes, device: str) -> Callable[[], object]:
    """A step of a search on text: architecture and weights."""
    import torch
    from naive_rnn import NaiveLanguageModel, NaiveTextSearch
    from nas.bilevel.steps import TextSteps
    from nas.methods import registry
    from nas.nets.torch import rnn
    from nas.nets.torch.rnn import Drops
    from nas.space import spaces
    from nas.space.genotype import RecurrentGenotype

    words, hidden, columns = sizes.words, sizes.hidden, sizes.columns
    draw = lambda: torch.randint(words, (2, sizes.bptt, columns), device=device).unbind()
    train, valid = draw(), draw()
    order = "second" if "second" in case else "first"
    if case.startswith("transcribed"):
        with torch.device(device):
            loop = NaiveTextSearch(NaiveLanguageModel(words, hidden), columns, second_order=order == "second")
        return lambda: loop.step(train, valid)
    settings = replace(
        registry.TEXT["sparse_supernet"].presets["paper"], order=order, batch=columns, hidden=hidden, bptt=sizes.bptt
    )
    net = rnn.RecurrentSupernet(spaces.get_space("recurrent", RecurrentGenotype), words, hidden, Drops.of(settings)).to(device)
    if "compiled" in case:
        net.fuse()
    steps = TextSteps(net, registry.build("sparse_supernet", net, settings), settings)
    if "tenth" in case:
        (a,) = steps.method.parameters
        keep_only(a, tenth(len(a)))

    def both() -> None:
        steps.architecture(0, train, valid)
        steps.weights(train)

    return both


def measure(case: str, sizes: Sizes, steps: int, device: str) -> dict[str, float]:
    """Measure CPU seconds of a step and peak MiB of this process; with a GPU, seconds and peak MiB of the device."""
    import torch

    gpu = device != "cpu"
    if gpu:
        gc.collect()  # of the previous case
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = build(case, sizes, device)
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


class Apart:
    """A case in processes of its own, whose memory nothing else has used.

    PyTorch starts one for each measurement, and with a GPU none, as starting is slow there. JAX has one for all measurements,
    each of which is a line of its input and of its output: compilation takes much longer than a step.
    """

    def __init__(self, case: str, preset: str, steps: int, device: str) -> None:
        self.case, self.preset, self.steps, self.device = case, preset, steps, device
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        options = {"--case": self.case, "--preset": self.preset, "--steps": str(self.steps), "--device": self.device}
        command = [sys.executable, __file__, *(word for pair in options.items() for word in pair)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def measure(self) -> dict[str, float]:
        """Take a measurement. RuntimeError if the process fails, whose error is printed."""
        if self.case in CASES and self.device != "cpu":
            return measure(self.case, PRESETS[self.preset], self.steps, self.device)
        self.process = self.process or self.start()
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended
            pass
        line = self.process.stdout.readline()
        if not line or self.case in CASES:
            self.close()
        if not line:
            raise RuntimeError("its process has failed")
        return json.loads(line)

    def close(self) -> None:
        if self.process:
            self.process.communicate()
            self.process = None


def serve(case: str, preset: str, steps: int, device: str) -> None:
    """Print a measurement of a case for each line of the input; the work of the process of an `Apart`."""
    if case in CASES:
        print(json.dumps(measure(case, PRESETS[preset], steps, device)))
        return
    on_one_thread(device)
    for _, found in zip(sys.stdin, search_step_jax.measurements(case.removeprefix(JAX), PRESETS[preset], steps, device)):
        print(json.dumps(found), flush=True)


def chosen(
    framework: str, preset: str, only: list[str], compiled: bool, device: str, graphs: bool = False
) -> dict[str, tuple[str, ...]]:
    """The cases to measure, each with those it is compared with."""
    cases = CASES
    if framework == "jax":
        with_torch = importlib.util.find_spec("torch") is not None and device != "tpu"
        cases = {name: () for pair in JAX_CASES.items() for name in (*(pair[1] if with_torch else ()), pair[0])}
        cases |= {case: bases for case, bases in JAX_CASES.items() if with_torch}
    elif preset != "paper":  # the transcriptions have one size
        cases = {c: tuple(b for b in bases if "transcribed" not in b) for c, bases in CASES.items() if "transcribed" not in c}
    cases = {c: bases for c, bases in cases.items() if (compiled or "compiled" not in c) and (graphs or "graph" not in c)}
    return {c: bases for c, bases in cases.items() if not only or any(word in c for word in only)}


def measured(cases: list[Apart], rounds: int) -> dict[str, list[dict[str, float]]]:
    """The measurements of each case, in rounds in which the cases take turns."""
    found: dict[str, list[dict[str, float]]] = {one.case: [] for one in cases}
    try:
        for number in range(rounds):
            for one in cases:
                if len(found[one.case]) < number:  # it has failed
                    continue
                try:
                    run = one.measure()
                except RuntimeError as error:  # the other cases can still be measured
                    print(f"{one.case}: left out, {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                    continue
                found[one.case].append(run)
                line = f"{one.case}: {run['cpu']:.4g} s, {run['mib']:.0f} MiB"
                line += f", compiled in {run['compile_wall']:.1f} s" if "compile_wall" in run else ""
                print(line, file=sys.stderr, flush=True)
    finally:
        for one in cases:
            one.close()
    return found


COMPILATION = {  # column of the file: (column of the printed table, key of a measurement)
    "buffers_mib": ("arrays MiB", "buffers_mib"),
    "compile_cpu_s": ("compile CPU s", "compile_cpu"),
    "compile_wall_s": ("wall s", "compile_wall"),
    "search_compile_cpu_s": ("search CPU s", "search_cpu"),
    "search_compile_wall_s": ("wall s", "search_wall"),
}
COLUMNS = ["case", "cpu_s", "mib", "against", "ratio", "ratio_min", "ratio_max"]


def table(found: dict[str, list[dict]], cases: dict[str, tuple[str, ...]], device: str) -> list[dict[str, Any]]:
    """Print the medians of the measurements; return them as rows, one for each comparison."""
    shown = {name: key for name, key in COMPILATION.items() if any(key[1] in runs[0] for runs in found.values())}
    head = f"{'case':43}{'CPU s' if device == 'cpu' else 'seconds':>9}{'MiB':>8}"
    print(head + "".join(f"{title:>15}" for title, _ in shown.values()) + f"{'ratio':>8}   range")
    rows = []
    for case, runs in found.items():
        row = {"case": case, "cpu_s": statistics.median(r["cpu"] for r in runs), "mib": max(r["mib"] for r in runs)}
        text = f"{case:43}{row['cpu_s']:9.4f}{row['mib']:8.0f}"
        for name, (_, key) in shown.items():
            if key in runs[0]:
                row[name] = statistics.median(r[key] for r in runs)
            text += f"{row[name]:15.1f}" if name in row else f"{'':15}"
        bases = [base for base in cases[case] if base in found]
        for base in bases:
            ratios = [a["cpu"] / b["cpu"] for a, b in zip(runs, found[base])]
            ratio = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
            rows.append(row | {"against": base} | ratio)
            print(f"{text}{ratio['ratio']:8.3f}   {min(ratios):.3f} - {max(ratios):.3f}   of {base}")
        if not bases:
            print(text)
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch", help="jax: JAX beside PyTorch")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="sizes; other than paper without transcriptions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps in a round, after a warm-up step")
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the cases to run")
    parser.add_argument("--compiled", action="store_true", help="also the cases with torch.compile")
    parser.add_argument("--graphs", action="store_true", help="also the cases with a CUDA graph")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="tpu: of JAX alone")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--case", choices=(*CASES, *JAX_CASES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = DEVICES[args.device]
    if args.case:
        return serve(args.case, args.preset, args.steps, device)
    if device == "tpu" and args.framework == "torch":
        parser.error("--device tpu needs --framework jax")
    if args.graphs and device != "cuda":
        print(f"CUDA graphs: left out, they need --device cuda, got {args.device}", file=sys.stderr)
    cases = chosen(args.framework, args.preset, args.only, args.compiled, device, args.graphs and device == "cuda")
    apart = [Apart(case, args.preset, args.steps, device) for case in cases]
    # each step in JAX takes turns with its equal in PyTorch, all cases of PyTorch with each other
    turns = [apart] if args.framework == "torch" else [[a for a in apart if a.case.removeprefix(JAX) == c] for c in CASES]
    found = {case: runs for group in turns for case, runs in measured(group, args.rounds).items()}
    left_out = [case for case, runs in found.items() if len(runs) < args.rounds]
    for case in left_out:
        del found[case]
    rows = table(found, cases, device)
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            columns = [*COLUMNS, *(name for name in COMPILATION if any(name in row for row in rows))]
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(bool(left_out))


if __name__ == "__main__":
    main()
