"""Small data and networks for the tests of the architecture search."""

import csv
import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nas.data import cifar_files
from nas.engine import checkpoint
from nas.nets.torch import cnn
from nas.space import spaces


def drawn(name: str, count: int) -> np.ndarray:
    """uint8 (count,): a function of the name, the same with every version of Python and NumPy."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(count), np.uint8)


def fake_images(name: str, images: int) -> dict[bytes, Any]:
    """A file of CIFAR-10: noise, with a brightness that depends on the label."""
    labels = drawn(f"{name} labels", images) % 10
    pixels = drawn(f"{name} pixels", images * 3072).reshape(images, -1) // 4 + 18 * labels[:, None]
    return {b"data": pixels.astype(np.uint8), b"labels": labels.tolist()}


def fake_cifar(root: Path, images: int = 32) -> None:
    """Write a small data set in the layout of CIFAR-10, and register its checksums in `nas.data.cifar_files`."""
    source = cifar_files.SOURCES["cifar10"]
    folder = root / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    known = {}
    for name, _ in source.train + source.test:
        file = folder / name
        if not file.exists():
            # Several processes may write this file at once; none must read one that is only partly written.
            partial = folder / f"{name}.{os.getpid()}"
            partial.write_bytes(pickle.dumps(fake_images(name, images)))
            os.replace(partial, file)
        known[name] = hashlib.md5(file.read_bytes()).hexdigest()
    own = lambda files: tuple((name, known[name]) for name, _ in files)
    cifar_files.SOURCES["cifar10"] = replace(
        source, train=own(source.train), test=own(source.test), url="http://localhost:9/none.tar.gz"
    )


def fake_text(folder: Path) -> None:
    """Write a small text in three parts that can be learnt: four words in a line, each determined by the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in (("train", 300), ("valid", 60), ("test", 60)):
        starts = drawn(part, lines).tolist()
        (folder / f"{part}.txt").write_text("".join(" ".join(f"w{(s + i) % 10}" for i in range(4)) + "\n" for s in starts))


TINY = "--preset small --images 32 --epochs 2 --batch 8 --channels 2 --layers 3 --threads 1 --device cpu".split()
TINY_TEXT = "--preset small --hidden 6 --batch 6 --bptt 9 --epochs 2 --tokens 300 --threads 1 --device cpu".split()
TINY_CONVNET = (
    "--preset small --images 32 --epochs 2 --batch 8 --blocks 1 --width 4 --epoch-images 8 --valid-images 16 --latency-runs 1"
    " --threads 1 --device cpu".split()
)
TINY_TRANSFORMER = (
    "--preset small --characters 800 --epoch-characters 40 --epochs 3 --batch 8 --length 16 --layers 1 --width 8 --heads 4"
    " --hidden 16 --latency-runs 1 --threads 1 --device cpu".split()
)
without_threads = lambda words: [*words[: words.index("--threads")], *words[words.index("--threads") + 2 :]]
TINY_JAX, TINY_TEXT_JAX = (["--framework", "jax", *without_threads(words)] for words in (TINY, TINY_TEXT))


TIMES = ("seconds", "latency_ms", "latency_low", "latency_high")


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a table without times."""
    with Path(file).open() as opened:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(opened)]


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit, apart from times."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in TIMES)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def stopped(main: Callable[[list[str]], Any], argv: list[str], saves: int) -> None:
    """Run a command, and stop it after so many checkpoints, as if it were killed."""

    class Stop(Exception):
        pass

    save, left = checkpoint.save, saves

    def counting(path: Path, content: dict[str, Any]) -> None:
        nonlocal left
        save(path, content)
        left -= path.name == "checkpoint.pt"
        if not left:
            raise Stop

    checkpoint.save = counting
    try:
        main(argv)
    except Stop:
        return
    finally:
        checkpoint.save = save
    raise AssertionError(f"it ended before it had written {saves} checkpoints: {' '.join(argv)}")


def supernet(space: str = "darts", channels: int = 4, layers: int = 3) -> cnn.Supernet:
    torch.manual_seed(0)
    return cnn.Supernet(spaces.get_space(space), channels, layers)


def random_weights(net: cnn.Supernet, active: float = 1.0) -> dict[str, torch.Tensor]:
    """Random weights of all paths, a share `active` of them nonzero."""
    out = {}
    for cell in ("normal", "reduce"):
        n = len(net.space.paths(cell))
        out[cell] = (torch.randn(n) * (torch.rand(n) < active)).to(net.classifier.weight.dtype)
    return out


def copy_weights(naive: torch.nn.Module, ours: cnn.Supernet) -> None:
    """Copy the weights of the published supernet to ours."""
    pairs = [(ours.stem, naive.stem), (ours.classifier, naive.classifier)]
    for cell, other in zip(ours.cells, naive.cells):
        pairs += [(cell.preprocess0, other.preprocess0), (cell.preprocess1, other.preprocess1)]
        flat = [op for edge in other._ops for op in edge._ops]
        pairs += [(cell.operation(i), op) for i, op in enumerate(flat)]
    with torch.no_grad():
        for a, b in pairs:
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                p.copy_(q)
