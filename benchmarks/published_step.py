"""Cost of a search step beside the published repositories themselves: python benchmarks/published_step.py --repository FOLDER ...

Each FOLDER is a checkout of one of

    https://github.com/quark0/darts           cnn/: supernet and architecture step of DARTS
    https://github.com/iboing/ISTA-NAS        ista_nas/: the whole training loop of the two-stage search
    https://github.com/cc-hpc-itwm/GSparsity  darts_space/: supernet, parameter groups and ProxSGD

Their files are imported unchanged and run on a CPU with current PyTorch: ``.cuda()`` returns its tensor or module, and packages
that a step does not need (torchvision, cvxpy with MOSEK) are replaced by empty modules. The loop around DARTS' and GSparsity's
step, which their scripts do not separate from the command line, is repeated here. No code of SparseNAS is public: its linear
supernet is DARTS' without ``none`` and without the softmax.

A step is an architecture step and a weight step (GSparsity: a weight step). Three variants take turns in one process of one
thread, in a new order in each round: ours, theirs, and theirs with network and images in channels-last layout, the layout that
ours uses. Output: CPU seconds of a step (median), and the ratio to their step of the same round as median and range.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import platform
import random
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import search_step
import torch
from nas.engine.log import write_csv
from search_cases import PRESETS, Sizes
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[], object]
Batches = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # training and validation, (images, labels) each
OPERATIONS = ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
CASES = {  # the case of search_step.py: (its repository, the file by which a folder is recognised)
    "darts first order": ("darts", "cnn/architect.py"),
    "darts second order": ("darts", "cnn/architect.py"),
    "sparse_supernet first order": ("darts", "cnn/architect.py"),
    "ista": ("ISTA-NAS", "ista_nas/search/inner_trainer.py"),
    "gsparsity": ("GSparsity", "darts_space/model_search_multipath.py"),
}
VARIANTS = ("ours", "published", "published, channels last")
SAFE = 16


# -- their code ------------------------------------------------------------------------------------


def without_cuda() -> None:
    """Let ``.cuda()`` return its tensor or module."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


@contextlib.contextmanager
def importing(folders: list[Path], packages: dict[str, Path | None]) -> Iterator[None]:
    """Context in which modules of these folders can be imported by name, and forgotten modules do not stay.

    packages: names with their folders, whose ``__init__`` is not run; None: an empty module, for what a step does not need.
    """
    before = set(sys.modules)
    sys.path[:0] = map(str, folders)
    for name, folder in packages.items():
        module = types.ModuleType(name)
        module.__path__ = [] if folder is None else [str(folder)]  # type: ignore[attr-defined]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        del sys.path[: len(folders)]
        for name in set(sys.modules) - before:
            origin = str(getattr(sys.modules[name], "__file__", None) or "")
            if name in packages or any(origin.startswith(str(folder)) for folder in folders):
                del sys.modules[name]


def channels_last(model: Any, images: Tensor, on: bool) -> Tensor:
    """The images in the layout of the variant, to which the model is moved.

    Ends the program where oneDNN would write outside of its memory: uxlfoundation/oneDNN#6035, in the gradients of strided 1x1
    convolutions of fewer than 8 channels, or 16 with AVX-512. Ours have none.
    """
    if not on:
        return images
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1)]
    least = min((m.in_channels for m in convolutions), default=SAFE)
    if least < SAFE:
        raise SystemExit(
            f"error: strided 1x1 convolutions must have at least {SAFE} channels in channels-last layout, where oneDNN corrupts "
            f"memory, got {least}: choose a larger --preset"
        )
    model.to(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last)


def published_darts(repository: Path, case: str, sizes: Sizes, batches: Batches, last: bool) -> Step:
    """Architecture step of `Architect.step` and the weight step of `train` in train_search.py."""
    with importing([repository / "cnn"], {}):
        if "sparse" in case:
            importlib.import_module("genotypes").PRIMITIVES = list(OPERATIONS)  # type: ignore[attr-defined]
        search, architect = (importlib.import_module(name) for name in ("model_search", "architect"))
    if "sparse" in case:
        linear = types.SimpleNamespace(**vars(F))
        linear.softmax = lambda alphas, dim: alphas
        search.F = linear  # type: ignore[attr-defined]
    if last:  # its `view` needs the other layout
        architect._concat = lambda xs: torch.cat([x.reshape(-1) for x in xs])  # type: ignore[attr-defined]
    criterion = nn.CrossEntropyLoss()
    model = search.Network(sizes.channels, 10, sizes.layers, criterion)
    if "sparse" in case:
        for alphas in model.arch_parameters():
            alphas.data.add_(1 / len(OPERATIONS))
    options = {"momentum": 0.9, "weight_decay": 3e-4, "arch_learning_rate": 3e-4, "arch_weight_decay": 1e-3}
    searched = architect.Architect(model, types.SimpleNamespace(**options))
    sgd = torch.optim.SGD(model.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    (images, labels), (valid_images, valid_labels) = batches
    images, valid_images = (channels_last(model, x, last) for x in (images, valid_images))

    def step() -> None:
        model.train()
        searched.step(images, labels, valid_images, valid_labels, 0.025, sgd, unrolled="second" in case)
        sgd.zero_grad()
        logits = model(images)
        loss = criterion(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        sgd.step()
        loss.item(), logits.topk(5, 1)

    return step


def published_ista(repository: Path, case: str, sizes: Sizes, batches: Batches, last: bool) -> Step:
    """`InnerTrainer.train_epoch` with a batch of each kind, at the supports of our step."""
    top = repository / "ista_nas"
    packages = {"ista_nas": top, "ista_nas.search": top / "search", "ista_nas.search.models": top / "search" / "models"}
    absent = ("torchvision", "torchvision.transforms", "torchvision.datasets", "ista_nas.recovery")
    with importing([], {**packages, **dict.fromkeys(absent)}):
        network = importlib.import_module("ista_nas.search.models.model_search").NetWork
        sys.modules["ista_nas.search.models"].NetWork = network  # type: ignore[attr-defined]
        inner = importlib.import_module("ista_nas.search.inner_trainer")
        projection = importlib.import_module("ista_nas.trainer").Trainer.sample_and_proj
        options = {"grad_clip": 5.0, "report_freq": 50, "init_channels": sizes.channels, "num_classes": 10, "proj_dims": 7}
        options |= {"layers": sizes.layers, "learning_rate": 0.025, "momentum": 0.9, "weight_decay": 3e-4, "epochs": 50}
        options |= {"learning_rate_min": 0.001, "arch_learning_rate": 3e-4, "arch_weight_decay": 1e-3}
        # two helpers that current NumPy and PyTorch refuse: a sum over a generator, a view across memory
        inner.count_parameters_in_MB, inner.accuracy = (lambda model: 0), accuracies
        trainer = inner.InnerTrainer(types.SimpleNamespace(**options))
    codes = our_codes()
    own = types.SimpleNamespace(steps=4, sparseness=2, num_ops=len(OPERATIONS))
    sides = [projection(own, [torch.from_numpy(A) for A in codes.matrices[c]], codes.codes[c]) for c in codes.cells]
    trainer.model.init_proj_mat(*(matrices for matrices, _ in sides))
    trainer.model.init_bias(*(bias for _, bias in sides))
    for alphas, b in zip(trainer.model.arch_parameters(), codes.parameters):
        alphas.data.copy_(b.detach())
    train, valid = ((channels_last(trainer.model, images, last), labels) for images, labels in batches)

    def step() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train_epoch([train], [valid], 1)

    return step


def accuracies(logits: Tensor, labels: Tensor, topk: tuple[int, ...]) -> list[Tensor]:
    """The accuracies in percent, as their function of this name computes them."""
    correct = logits.topk(max(topk), 1).indices == labels[:, None]
    return [correct[:, :k].float().sum() * (100 / len(labels)) for k in topk]


def our_codes() -> Any:
    """The compressed variables, matrices and codes of our step."""
    from nas.methods import ista, registry
    from nas.space import spaces

    codes = ista.Codes(spaces.get_space("darts"), registry.CIFAR["ista"].presets["paper"], torch.device("cpu"))
    search_step.draw_codes(codes)
    codes.recover()
    return codes


def published_gsparsity(repository: Path, case: str, sizes: Sizes, batches: Batches, last: bool) -> Step:
    """Supernet, groups and optimizer of train_search_group.py, in the loop of its `train`."""
    folder = repository / "darts_space"
    absent = ("matplotlib", "matplotlib.pyplot")
    with importing([folder], {"GSparsity": repository, "GSparsity.darts_space": folder, **dict.fromkeys(absent)}):
        network = importlib.import_module("GSparsity.darts_space.model_search_multipath").Network
        optimizer = importlib.import_module("ProxSGD_for_groups").ProxSGD
        grouped = importlib.import_module("utils_sparsenas").group_model_params_by_cell
        criterion = nn.CrossEntropyLoss()
        spaces = {name: [list(OPERATIONS)] * 14 for name in ("primitives_normal", "primitives_reduct")}
        model = network(sizes.channels, 10, sizes.layers, criterion, spaces)
    reductions = [sizes.layers // 3, 2 * sizes.layers // 3]
    shape = types.SimpleNamespace(num_edges=14, num_ops=len(OPERATIONS), reduce_cell_indices=reductions)
    options = {"lr": 1e-3, "weight_decay": 60, "clip_bounds": (0, 1), "momentum": 0.8}
    prox = optimizer(grouped(model, shape, mu=60), **options, normalization="div", normalization_exponent=0.5)
    images, labels = batches[0]
    images = channels_last(model, images, last)

    def step() -> None:
        model.train()
        prox.zero_grad()
        logits = model(images)
        criterion(logits, labels).backward()
        prox.step()
        logits.topk(5, 1)

    return step


PUBLISHED = {"darts": published_darts, "ISTA-NAS": published_ista, "GSparsity": published_gsparsity}


# -- measurement -----------------------------------------------------------------------------------


def find(folders: list[Path]) -> dict[str, Path]:
    """The folder of each repository. FileNotFoundError if a folder is none of them."""
    out = {}
    for folder in folders:
        names = [name for name, file in dict.fromkeys(CASES.values()) if (folder / file).is_file()]
        if not names:
            known = ", ".join(file for _, file in dict.fromkeys(CASES.values()))
            raise FileNotFoundError(f"--repository must be a folder with one of {known}, got {folder}")
        out[names[0]] = folder.resolve()
    return out


def steps_of(case: str, repository: Path, sizes: Sizes) -> dict[str, Step]:
    """A step of each variant on the same batches."""
    torch.manual_seed(0)
    draw = lambda: (torch.randn(sizes.batch, 3, 32, 32), torch.randint(10, (sizes.batch,)))
    batches = draw(), draw()
    theirs = PUBLISHED[CASES[case][0]]
    return {
        "ours": search_step.build(case, sizes, "cpu"),
        "published": theirs(repository, case, sizes, batches, False),
        "published, channels last": theirs(repository, case, sizes, batches, True),
    }


def seconds(step: Step) -> float:
    """CPU seconds of this process for a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(case: str, repository: Path, sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """Print and return the rows of a case: CPU seconds of each variant, and the ratio to theirs."""
    steps = steps_of(case, repository, sizes)
    for step in steps.values():  # memory and, for second order, the momentum of SGD
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(VARIANTS, len(VARIANTS)):
            found[name].append(seconds(steps[name]))
    rows = []
    for name, own in found.items():
        ratios = [a / b for a, b in zip(own, found["published"])]
        row = {"case": case, "variant": name, "cpu_s": statistics.median(own), "ratio": statistics.median(ratios)}
        row |= {"ratio_min": min(ratios), "ratio_max": max(ratios), "rounds": rounds, "batch": sizes.batch}
        rows.append(row)
        span = "" if name == "published" else f"{row['ratio']:8.3f}   {min(ratios):.3f} - {max(ratios):.3f}"
        print(f"{case:30}{name:28}{row['cpu_s']:9.3f}{span}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, nargs="+", required=True, metavar="FOLDER", help="checkouts of their code")
    parser.add_argument("--only", nargs="*", default=[], help="substrings of the cases to run")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="sizes of supernet and batch")
    parser.add_argument("--batch", type=int, help="images in a batch instead of those of the preset")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each variant, after a warm-up step")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args(argv)
    repositories = find(args.repository)
    cases = [c for c, (name, _) in CASES.items() if name in repositories and (not args.only or any(o in c for o in args.only))]
    sizes = replace(PRESETS[args.preset], **({"batch": args.batch} if args.batch else {}))
    warnings.filterwarnings("ignore", category=UserWarning)  # of signatures and calls that their code has from older PyTorch
    torch.set_num_threads(1)
    without_cuda()
    print(f"{platform.machine()}, torch {torch.__version__}, NumPy {np.__version__}, one thread, batch {sizes.batch}")
    print(f"{'case':30}{'variant':28}{'CPU s':>9}{'ratio':>8}   range")
    rows = [row for case in cases for row in measure(case, repositories[CASES[case][0]], sizes, args.rounds)]
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
