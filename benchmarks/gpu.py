"""Run the commands of this project on a device that is available for minutes: python benchmarks/gpu.py --minutes 8

Runs the parts in `PARTS`, the most important first, each in a process of its own with a share of the remaining time. Each appends
a row to OUT/runs.jsonl (OUT is benchmarks/results/gpu) as soon as it ends: date, machine, command, seconds, peak memory of the
device, and its result, or the last lines of its error, or that its time was over. All output goes to OUT/log.txt. It may be
stopped at any time without losing what is finished; when it is started again, parts that are done with the present code are left
out (--again runs all). `python benchmarks/last_runs.py` then writes the table of the README from the rows. --device cpu measures
the CPU in the same way, with --threads 1 and more minutes; --device tpu runs what is written in JAX. --dry runs all parts on a
CPU in about a minute, with small sizes and random images.

To add a part, add an entry to `PARTS` by its importance: its command line, the options for a small run with --dry, its share of
the time, and the patterns that find its results in the output (`runner.Part`).

A machine without internet needs this checkout, Python 3.12 with torch or JAX, and two things from elsewhere:

1. Images. 16 000 of the 60 000 images of CIFAR-10 are 49 MB (47 MiB): the first 14 000 to train, the first 2 000 to test.

       python benchmarks/gpu.py --pack 16000 --data-dir data cifar10.npz         # here
       python benchmarks/gpu.py --data cifar10.npz                               # there

   Text needs none: without --data-dir the commands read the documentation that comes with Python.

2. Wheels of what is missing there. A machine with SciPy, scikit-learn, matplotlib, tqdm and pytest lacks 0.5 MB:

       fetch() { pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
           --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \\
           -c constraints.txt "$@"; }
       fetch array-api-compat tyro docstring-parser typeguard typing-extensions

   What the tests need is 3 MB more, optax 0.5 MB, and all the rest on top of NumPy and torch or JAX 70 MB, half of it SciPy:

       fetch pytest iniconfig pluggy pygments packaging hypothesis sortedcontainers pytest-xdist execnet
       fetch optax absl-py
       fetch scipy matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil tqdm \\
           scikit-learn joblib threadpoolctl narwhals

   Every part needs SciPy and array-api-compat; searches and trainings need tyro, tqdm and matplotlib as well, the digits
   scikit-learn, tqdm and matplotlib. Where one transfer holds no more than 64 MiB, images and all wheels are two: the wheels that
   came with one of them are installed by `--wheels wheels --minutes 0`.

       python benchmarks/gpu.py --wheels wheels                                  # there

   That unpacks them into runs/site, for these commands alone, and leaves out what that machine has, in whatever version.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import paper_step
from runner import DEVICES, LEAST, ROOT, SITE, Part, Place, append, limit, rows_of, run

IMAGES = ("--data-dir", "{data}", "--out", "{out}", "--device", "{device}")
TEXT = ("--out", "{out}", "--device", "{device}")
STEPS = ("--rounds", "1", "--device", "{device}", "--out", "{out}/search_step.csv")
DRY_IMAGES = tuple("--images 16 --epochs 1 --batch 8 --channels 2 --layers 3".split())
DRY_SEARCH = (*DRY_IMAGES, "--space", "S2")
DRY_TEXT = tuple("--tokens 1000 --epochs 1 --hidden 4 --batch 200 --bptt 10".split())
DRY_CONVNET = tuple("--images 32 --epochs 1 --batch 8 --blocks 1 --width 2 --epoch-images 0".split())
DRY_TRANSFORMER = tuple(
    "--characters 2000 --valid-characters 200 --epoch-characters 0 --epochs 1 --batch 8 --length 16 --layers 1 --width 8"
    " --heads 2 --hidden 8".split()
)
DRY_DIGITS = tuple("--strengths 1 --seeds 1 --epochs 2 --retrain-epochs 2 --curves adam hapg".split())
DRY_STEPS = ("--only", "ista, recovery", "--steps", "1")
CUT_FULL = tuple(
    "--methods magnitude torch_pruning_adam prox_adam prox_sgd --seeds 0 --images 12000 --held-out 2000 "
    "--epochs 20 --tuning-epochs 4 --jobs 4".split()
)
DRY_CUT = tuple(
    "--preset small --methods prox_sgd --no-trials --budgets 0.5 --images 64 --held-out 16 --epochs 1 --tuning-epochs 1 "
    "--batch 16 --width 4 --jobs 1".split()
)
SEARCHED = (
    (r"^\w+: (\d+ paths in the normal cell, \d+ in the reduction cell)", "{0}"),
    (r"^supernet (\S+ %), its nonzero paths alone (\S+ %)", "supernet {0}, nonzero paths alone {1}"),
    (r"^(\d+ nodes frozen by themselves, \d+ stopped, (?:test|validation) accuracy \S+ %)", "{0}"),
)
FOUND_CELL = (
    (r"^\w+: (\d+ paths into \d+ nodes)", "{0}"),
    (r"^perplexity of the supernet (\S+), of its nonzero paths alone (\S+)", "perplexity {0}, nonzero paths alone {1}"),
)
FULL = (
    (r"^supernet of .*: (\S+ s a step), (\S+ s an epoch of \d+ steps, \d+ MiB)$", "{0}, {1}"),
    (r"^search of (.*): supernet (\S+ %), .* alone (\S+ %), (\d+ paths), cell (\S+)$", "{0}: {3}, {1}, nonzero paths {2}; {4}"),
)
TRAINED = ((r"^(validation accuracy \S+ %|perplexity: validation \S+, test \S+)", "{0}"),)
ABLATION = (
    (r"the dense network reaches (\S+ ± \S+ %)", "dense {0}"),
    (r"^\| (HAPG, SGL|AdamHAPG, SGL) \| (\S+ ± \S+) \|.*\| (\S+ ± \S+) \|$", "{0}: {1} %, {2} % zeros"),
)
OPTIMIZERS = (
    (r"^(ResNet-18|\d+ tensors of 8),", "{0}, beside fused Adam"),
    (r"^(ProxSGD|HAPG|ProxAdam \(exact\)|AdamHAPG \(median\)) +\S+ +(\S+) ", "{0} {1}"),
)
OPTIMIZERS_JAX = (
    (r"^(ResNet-18|\d+ leaves of \(4, 2\)),", "{0}, beside optax.adam"),
    (r"^(chain\(adam, link\)|hapg|prox_sgd|prox_adam \(exact\)|adam_hapg \(median\)) +\S+ +(\S+) ", "{0} {1}"),
)
PROXES = (
    (r"^(numpy|torch), (float\d+)$", "{0}, {1}, beside a copy"),
    (r"^(L1|group L2|SGL|exact metric), \de\S+ (?:entries|groups of \d+) +proxopt +\S+ +(\S+) ", "{0} {1}"),
)
TRITON = (
    (r"^(ResNet-18|transformer of 124M),", "{0}, beside fused Adam"),
    (r"^(.*, Triton): first step \S+ s, largest difference (\S+), \d+ zeros, of which (\d+) differ", "{0}: {2} zeros differ"),
    (r"^((?:ProxAdam|AdamHAPG).*\S) +\S+ +(\S+)   \S+ - ", "{0} {1}"),
    (r"^(.*: left out, .*)", "{0}"),
)
STEP = ((r"^((?!transcribed).*): (\S+) s, (\d+) MiB$", "{0} {1} s, {2} MiB"), (r"^(.*: left out, .*)", "{0}"))
STEP_JAX = (
    (r"^((?!jax|transcribed).*): (\S+) s, (\d+) MiB$", "PyTorch, {0} {1} s, {2} MiB"),
    (r"^(jax, .*): (\S+) s, (\d+) MiB, compiled in (\S+) s$", "{0} {1} s, {2} MiB, compiled in {3} s"),
    (r"^(.*: left out, .*)", "{0}"),
)
COMPARED_CUTS = (
    (
        r"^\| ([^|]+) \| (\S+) \| (\S+) \| \S+ \| (\S+) ± \S+ % \| (\S+) ± \S+ % \| (\S+) ± \S+ % \| [^|]+ \|$",
        "{0} at {2}: {3} %, cut {4} %, trained {5} %",
    ),
)
TESTED = ((r"^=+ (.*\d (?:passed|failed|skipped|deselected|error).*) =+$", "{0}"), (r"^FAILED (\S+)", "failed: {0}"))
PRUNED = ((r"^ +\S+ +0 +(\S+%) +(\S+%) +(\S+%) +\S+ *(\S*)$", "pruned {0}: {1} before the cut, {2} after it, retrained {3}"),)
CUT = (
    (
        r"^(dense|compact, after the cut) {2,}(\S+(?: %)?) .*\(([\d.]+ %)\) +[\d ]+ \(([\d.]+ %)\) +(\S+) \(",
        "{0}: {1}, parameters {2}, multiply-adds {3}, {4} ms",
    ),
    (r"^(largest change of an output by the cut: \S+)", "{0}"),
)

PARTS = (
    # what a user runs first
    Part(
        name="nas_cifar10",
        words=("examples/nas_cifar10.py", "--preset", "small"),
        more=IMAGES,
        dry=DRY_SEARCH,
        share=0.3,
        patterns=SEARCHED,
        keeps=("search.csv",),
    ),
    Part(
        name="nas_ptb",
        words=("examples/nas_ptb.py", "--preset", "small"),
        more=TEXT,
        dry=DRY_TEXT,
        share=0.3,
        patterns=FOUND_CELL,
        keeps=("search.csv",),
    ),
    Part(
        name="digits",
        words=("benchmarks/digits_ablation.py", "--quick"),
        more=("--out", "{out}", "--device", "{device}"),
        dry=DRY_DIGITS,
        share=0.3,
        patterns=ABLATION,
        keeps=("ablation.csv",),
    ),
    Part(
        name="prune_convnet",
        words=("examples/prune_convnet.py", "--preset", "small"),
        more=IMAGES,
        dry=DRY_CONVNET,
        share=0.3,
        patterns=CUT,
        keeps=("table.csv",),
    ),
    Part(
        name="prune_transformer",
        words=("examples/prune_transformer.py", "--preset", "small"),
        more=TEXT,
        dry=DRY_TRANSFORMER,
        share=0.3,
        patterns=CUT,
        keeps=("table.csv",),
    ),
    # what it costs at full size
    Part(
        name="paper",
        words=("benchmarks/paper_step.py",),
        more=("--device", "{device}"),
        dry=("--tiny", "--steps", "1", "--only", "images, ista", "text, training"),
        share=0.5,
        shows=tuple(map(paper_step.command, paper_step.CASES)),
    ),
    Part(
        name="triton",
        words=("benchmarks/device_step.py", "--only", "ProxAdam", "AdamHAPG"),
        more=("--device", "{device}", "--out", "{out}/device_step.csv"),
        dry=("--tiny", "--rounds", "1"),
        share=0.4,
        patterns=TRITON,
        keeps=("device_step.csv",),
        devices=("gpu",),
    ),
    Part(
        name="optimizers",
        words=("benchmarks/optimizer_step.py",),
        more=("--device", "{device}", "--out", "{out}/optimizer_step.csv"),
        dry=("--rounds", "1", "--small", "20", "--only", "ProxSGD"),
        share=0.3,
        patterns=OPTIMIZERS,
        keeps=("optimizer_step.csv",),
    ),
    Part(
        name="optimizers jax",
        words=("benchmarks/optimizer_step.py", "--framework", "jax"),
        more=("--device", "{device}", "--out", "{out}/optimizer_step_jax.csv"),
        dry=("--rounds", "1", "--small", "4", "--only", "prox_sgd"),
        share=0.3,
        patterns=OPTIMIZERS_JAX,
        keeps=("optimizer_step_jax.csv",),
    ),
    Part(
        name="proxes",
        words=("benchmarks/prox_speed.py",),
        more=("--device", "{device}", "--out", "{out}/prox_speed.csv"),
        dry=("--rounds", "1", "--scale", "0.01", "--only", "group L2"),
        share=0.2,
        patterns=PROXES,
        keeps=("prox_speed.csv",),
    ),
    Part(
        name="steps",
        words=("benchmarks/search_step.py", "--only", "first order", "ista", "gsparsity"),
        more=STEPS,
        dry=DRY_STEPS,
        share=0.4,
        patterns=STEP,
        keeps=("search_step.csv",),
    ),
    Part(
        name="steps in CUDA graphs",
        words=("benchmarks/search_step.py", "--graphs", "--steps", "20", "--only", "darts first", "ista"),
        more=STEPS,
        dry=DRY_STEPS,
        share=0.3,
        patterns=STEP,
        devices=("gpu",),
    ),
    Part(
        name="steps jax, text",
        words=("benchmarks/search_step.py", "--framework", "jax", "--only", "recurrent first"),
        more=("--rounds", "3", "--device", "{device}", "--out", "{out}/search_step_jax.csv"),
        dry=("--preset", "tiny", "--rounds", "1"),
        share=0.4,
        patterns=STEP_JAX,
        keeps=("search_step_jax.csv",),
        devices=("cpu", "gpu", "tpu"),
    ),
    Part(
        name="steps jax, images",
        words=(
            "benchmarks/search_step.py",
            "--framework",
            "jax",
            "--only",
            "sparse_supernet first",
            "darts second",
            "gsparsity,",
        ),
        more=("--rounds", "3", "--device", "{device}", "--out", "{out}/search_step_jax.csv"),
        dry=("--preset", "tiny", "--rounds", "1", "--only", "weight step, all"),
        share=0.6,
        patterns=STEP_JAX,
        keeps=("search_step_jax.csv",),
        devices=("cpu", "gpu", "tpu"),
    ),
    Part(
        name="steps compiled, text",
        words=("benchmarks/search_step.py", "--compiled", "--only", "recurrent first"),
        more=STEPS,
        dry=DRY_STEPS,
        share=0.4,
        patterns=STEP,
        devices=("gpu",),
    ),
    Part(
        name="tests",
        words=("-m", "pytest", "-m", "gpu"),
        more=("tests/gpu/test_gpu.py", "-o", "addopts=--strict-markers", "-v", "--tb=short", "{workers}"),
        dry=("-k", "scaler"),
        patterns=TESTED,
        counts=("PASSED", "FAILED", "ERROR", "SKIPPED"),
        devices=("gpu",),
    ),
    Part(
        name="triton tests",
        words=("-m", "pytest", "-m", "gpu", "tests/gpu/test_triton_device.py"),
        more=("-o", "addopts=--strict-markers", "-v", "--tb=short", "{workers}"),
        dry=("-k", "nan"),
        patterns=TESTED,
        counts=("PASSED", "FAILED", "ERROR", "SKIPPED"),
        devices=("gpu",),
    ),
    Part(
        name="steps compiled, images",
        words=("benchmarks/search_step.py", "--compiled", "--only", "darts first", "ista"),
        more=STEPS,
        dry=DRY_STEPS,
        patterns=STEP,
        devices=("gpu",),
    ),
    Part(
        name="nasbench201",
        words=("benchmarks/nas_bench_201_full.py",),
        more=(*IMAGES, "--seconds", "{seconds}"),
        dry=("--seconds", "15", "--images", "24", "--valid-images", "8", "--batch", "8", "--channels", "2", "--layers", "3"),
        share=0.4,
        patterns=FULL,
        keeps=("search.csv",),
    ),
    # accuracy before and after a cut, beside others; the machine needs torch-pruning and torchao
    Part(
        name="lossless_cut",
        words=("benchmarks/lossless_cut.py", "--preset", "full"),
        more=(*CUT_FULL, *IMAGES),
        dry=DRY_CUT,
        share=0.5,
        patterns=COMPARED_CUTS,
        keeps=("runs.csv", "summary.csv", "lossless_cut.png"),
    ),
    # the other commands
    Part(
        name="nas_cifar10 ista",
        words=("examples/nas_cifar10.py", "--method", "ista", "--preset", "small"),
        more=IMAGES,
        dry=DRY_SEARCH,
        patterns=SEARCHED,
    ),
    Part(
        name="nas_cifar10 one-stage",
        words=("examples/nas_cifar10.py", "--method", "ista", "--one-stage", "--preset", "small"),
        more=IMAGES,
        dry=(*DRY_SEARCH, "--search-epochs", "1", "--valid-images", "16"),
        patterns=SEARCHED,
    ),
    Part(
        name="nas_cifar10 gsparsity",
        words=("examples/nas_cifar10.py", "--method", "gsparsity", "--preset", "small"),
        more=IMAGES,
        dry=(*DRY_SEARCH, "--valid-images", "16"),
        patterns=SEARCHED,
    ),
    Part(
        name="nas_cifar10 darts",
        words=("examples/nas_cifar10.py", "--method", "darts", "--preset", "small"),
        more=IMAGES,
        dry=DRY_SEARCH,
        patterns=SEARCHED,
    ),
    Part(
        name="train_cifar10",
        words=("examples/train_cifar10.py", "--preset", "small"),
        more=IMAGES,
        dry=DRY_IMAGES,
        patterns=TRAINED,
    ),
    Part(name="train_ptb", words=("examples/train_ptb.py", "--preset", "small"), more=TEXT, dry=DRY_TEXT, patterns=TRAINED),
    Part(
        name="prune_operations",
        words=("examples/prune_operations.py", "--preset", "small"),
        more=IMAGES,
        dry=(*DRY_IMAGES, "--valid-images", "16", "--retrain-epochs", "0"),
        patterns=PRUNED,
    ),
    Part(
        name="digits example",
        words=("examples/digits_pruning.py",),
        more=("--out", "{out}"),
        dry=("--epochs", "2", "--retrain-epochs", "1"),
        patterns=((r"^compact, retrained +(\S+) +(\d+) +(\d+) +(\d+)", "{0}, {1} pixels, {2} neurons, {3} parameters"),),
        devices=("cpu",),
    ),
    Part(
        name="digits jax",
        words=("benchmarks/digits_ablation.py", "--framework", "jax", "--quick"),
        more=("--out", "{out}"),
        dry=DRY_DIGITS[:-1],
        patterns=ABLATION,
        devices=("cpu", "gpu", "tpu"),
    ),
    Part(
        name="digits example jax",
        words=("examples/digits_pruning_jax.py",),
        dry=("--epochs", "2"),
        patterns=((r"^cut, retrained +(\S+) +(\d+) +\d+ +(\S+)", "{2}, layers {0}, {1} weights"),),
        devices=("cpu", "gpu", "tpu"),
    ),
)


def chosen(parts: Iterable[Part], device: str, only: Sequence[str], done: set[str]) -> list[Part]:
    """The parts for a device that are asked for and not done."""
    own = [p for p in parts if device in p.devices and (not only or any(word in p.name for word in only))]
    return [p for p in own if not set(p.commands) <= done]


def run_all(
    parts: Sequence[Part], place: Place, minutes: float, again: bool = False, only: Sequence[str] = (), jobs: int = 1
) -> list[dict[str, Any]]:
    """Run what is asked for and not done, until the time is over; the rows, which are in OUT/runs.jsonl by then.

    jobs: how many parts run at a time; more than one are no measurement.
    """
    place.out.mkdir(parents=True, exist_ok=True)
    file, end = place.out / "runs.jsonl", time.monotonic() + 60 * minutes
    same = [r for r in rows_of(file) if r["state"] == "done" and (r["code"], r["dry"]) == (place.code, place.dry)]
    done = set() if again else {r["command"] for r in same if r["device"] == place.device}
    rows: list[dict[str, Any]] = []
    unreached: list[str] = []
    lock = threading.Lock()

    def one(part: Part) -> None:
        left = end - time.monotonic()
        if left < LEAST:
            unreached.append(part.name)
            return
        seconds = limit(left, part.share)
        print(f"{part.name}: {seconds:.0f} of {left:.0f} s", flush=True)
        for row in run(part, place, seconds):
            with lock:
                append(file, row)
                rows.append(row)
            summary = f"{row['state']}, {row['seconds']} s, {row.get('peak_mib')} MiB: {row['result']}"
            print(f"  {part.name}: {summary}", flush=True)

    waiting = chosen(parts, place.device, only, done)
    if jobs == 1:
        for part in waiting:
            one(part)
    else:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, waiting))
    if unreached:
        print(f"no time was left for: {', '.join(unreached)}")
    return rows


# -- the machine ------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """What the device is called; of a GPU without starting it."""
    if device == "gpu":
        try:
            query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            return "a GPU without nvidia-smi"
    if device == "tpu":
        return "TPU"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {re.sub(r'[(]R[)]|[(]TM[)]', '', names[0]).strip() if names else 'a CPU'}"


def versions() -> dict[str, str]:
    """Of Python and of what computes, as far as it is installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "jax", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint() -> str:
    """Of the code of packages, examples, benchmarks and tests: rows of other code are no reason to leave a part out."""
    digest = hashlib.sha1()
    for folder in ("proxopt", "proxopt_torch", "proxopt_jax", "examples", "benchmarks", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def install(wheels: Path) -> None:
    """Unpack the wheels of distributions that are missing into SITE.

    A virtual environment with access to the packages of this Python would not do: where this one is itself a virtual environment,
    it would see those of the Python behind it.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"error: --wheels must name a folder with wheels, got {wheels}")
    missing = [file for file in files if not installed(file.name.split("-")[0])]
    names = ", ".join(file.name for file in missing) or "none"
    print(f"wheels: {len(files) - len(missing)} of {len(files)} are there already; unpacked: {names}")
    if missing:
        options = "--quiet --no-index --no-deps --no-compile --upgrade --target".split()
        subprocess.run([sys.executable, "-m", "pip", "install", *options, str(SITE), *map(str, missing)], check=True)


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return any(SITE.glob(f"{name}-*.dist-info"))
    return True


def random_images(file: Path, images: int = 64) -> Path:
    """A packed data set of random images."""
    import numpy as np

    cifar, random = nas_data(), np.random.default_rng(0)
    draw = lambda: cifar.Images(random.integers(256, size=(images, 3, 32, 32), dtype=np.uint8), random.integers(10, size=images))
    source = cifar.SOURCES["cifar10"]
    cifar.pack(cifar.Dataset("cifar10", draw(), draw(), source.classes, source.mean, source.std), 2 * images, file, test=images)
    return file


def pack(count: int, data_dir: Path, file: Path) -> None:
    """Write a part of CIFAR-10, an eighth of it test images."""
    cifar = nas_data()
    try:
        cifar.pack(cifar.read_cifar("cifar10", data_dir), count, file, test=count // 8)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{file}: {count - count // 8} images to train and {count // 8} to test, {file.stat().st_size / 2**20:.1f} MiB")


def nas_data() -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    from nas.data import cifar_files

    return cifar_files


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/DEVICE, with --dry runs/dry")
    parser.add_argument("--device", choices=DEVICES, default="gpu")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help=f"substrings of {', '.join(p.name for p in PARTS)}")
    parser.add_argument("--again", action="store_true", help="parts that are done, too")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU for each part; 0 leaves the choice to it")
    parser.add_argument("--data", type=Path, default=Path("data"), help="CIFAR-10, or a file that --pack wrote")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of what is missing")
    parser.add_argument("--dry", action="store_true", help="small, on the CPU, with random images")
    parser.add_argument("--pack", type=int, metavar="IMAGES", help="write so many images to FILE and end")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where --pack finds CIFAR-10")
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="for --pack")
    args = parser.parse_args(argv)
    if (args.pack is None) != (args.file is None):
        parser.error("--pack and FILE belong together")
    if args.minutes < 0 or args.threads < 0:
        parser.error(f"minutes and threads must be >= 0, got {args.minutes} and {args.threads}")
    if args.pack is not None:
        return pack(args.pack, args.data_dir, args.file)
    if args.wheels:
        install(args.wheels)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    device = "cpu" if args.dry else args.device
    out = args.out or ROOT / ("runs/dry" if args.dry else f"benchmarks/results/{device}")
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        data = random_images(Path(work) / "images.npz") if args.dry else args.data.resolve()
        place = Place(device, out.resolve(), data, Path(work), args.threads or int(args.dry), args.dry)
        place.code, place.machine, place.versions = fingerprint(), machine(device), versions()
        parts = [replace(p, devices=tuple(DEVICES)) for p in PARTS] if args.dry else PARTS
        rows = run_all(parts, place, args.minutes, args.again or args.dry, args.only, jobs=2 if args.dry else 1)
    failed = [row for row in rows if row["state"] != "done"]
    print(f"{len(rows)} rows, {len(failed)} of them not done: {out}/runs.jsonl, {out}/log.txt")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
