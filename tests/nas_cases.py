"""Small data and networks for the tests of the architecture search."""

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from nas import cnn, data, spaces


def fake_cifar(root: Path, images: int = 64) -> None:
    """Files in the layout of CIFAR-10 with few images that a network can learn, known to `nas.data` under their own checksums."""
    source = data.SOURCES["cifar10"]
    folder = root / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    known = {}
    for name, _ in source.train + source.test:
        labels = rng.integers(10, size=images)
        pixels = rng.integers(256, size=(images, 3, 1024)) // 4 + 18 * labels[:, None, None]
        batch = {b"data": pixels.astype(np.uint8).reshape(images, -1), b"labels": labels.tolist()}
        file = folder / name
        if not file.exists():
            file.write_bytes(pickle.dumps(batch))
        known[name] = hashlib.md5(file.read_bytes()).hexdigest()
    own = lambda files: tuple((name, known[name]) for name, _ in files)
    data.SOURCES["cifar10"] = replace(
        source, train=own(source.train), test=own(source.test), url="http://localhost:9/none.tar.gz"
    )


TINY = "--preset small --images 96 --epochs 3 --batch 16 --channels 4 --layers 3 --threads 1 --device cpu".split()


def supernet(space: str = "darts", channels: int = 4, layers: int = 3) -> cnn.Supernet:
    torch.manual_seed(0)
    return cnn.Supernet(spaces.get(space), channels, layers)


def random_weights(net: cnn.Supernet, living: float = 1.0) -> dict[str, torch.Tensor]:
    """One weight for each path; about a share `living` of them not zero."""
    out = {}
    for cell in ("normal", "reduce"):
        n = len(net.space.paths(cell))
        out[cell] = torch.randn(n) * (torch.rand(n) < living)
    return out


def copy_weights(naive: torch.nn.Module, ours: cnn.Supernet) -> None:
    """Give our supernet the weights of the published one."""
    pairs = [(ours.stem, naive.stem), (ours.classifier, naive.classifier)]
    for cell, other in zip(ours.cells, naive.cells):
        pairs += [(cell.preprocess0, other.preprocess0), (cell.preprocess1, other.preprocess1)]
        flat = [op for edge in other._ops for op in edge._ops]
        pairs += [(cell.operation(i), op) for i, op in enumerate(flat)]
    with torch.no_grad():
        for a, b in pairs:
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                p.copy_(q)
