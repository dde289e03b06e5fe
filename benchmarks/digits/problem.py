"""What both frameworks share: settings, curves, data, random draws, and measures of trained networks, in NumPy.

The weights of all networks of a training are arrays (seeds, nets, outputs, inputs), their biases (seeds, nets, outputs, 1); as a
dictionary of arrays, `weight0` to `weight2` and `bias0` to `bias2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from proxopt import L1, GroupL2, Groups, SparseGroupLasso

SIZES = (64, 40, 20, 10)
LAYERS = range(len(SIZES) - 1)
OUTGOING = Groups.along(-2)  # a column of (..., outputs, inputs) holds the outgoing weights of a feature or neuron
LARGEST = 10**-3.7

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Epochs, batch size and rates are those of the paper; `strengths` are spread evenly in the logarithm.

    `drop_last` leaves out the short last batch of each epoch.
    """

    strengths: int = 8
    seeds: int = 5
    epochs: int = 500
    retrain_epochs: int = 3000
    batch: int = 256
    drop_last: bool = False
    curves: tuple[str, ...] = ()
    framework: str = "torch"

    def __post_init__(self) -> None:
        for name in ("strengths", "seeds", "epochs", "retrain_epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.batch > 1347:
            raise ValueError(f"batch must be <= 1347, the size of the training set, got {self.batch}")
        unknown = [c for c in self.curves if c not in CURVES]
        if unknown:
            raise ValueError(f"curves must be among {', '.join(CURVES)}, got {', '.join(unknown)}")

    def strength_grid(self) -> list[float]:
        """From 1e-5 to 10^-3.7."""
        low, high, last = -5.0, -3.7, self.strengths - 1
        if not last:
            return [LARGEST]
        step = (high - low) / last  # counted from the nearer end, as in torch.logspace, which has other last bits than NumPy's
        return [10.0 ** (low + step * i if i < self.strengths // 2 else high - step * (last - i)) for i in range(last + 1)]

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"curves": list(self.curves)}


QUICK = {"strengths": 3, "seeds": 5, "retrain_epochs": 400, "curves": ("sgd", "adam", "hapg", "adamhapg")}


@dataclass(frozen=True)
class Curve:
    """One line of the figure: how it is trained, and below which size a weight counts as zero."""

    method: str
    penalty: str
    label: str
    metric: str | None = None
    cut: float = 0.0

    def build(self, strength: Any) -> Any:
        groups: dict[str, Any] = {"groups": OUTGOING, "metric": self.metric}
        if self.penalty == "lasso":
            return L1(strength)
        if self.penalty == "group_lasso":
            return GroupL2(strength, **groups)
        return SparseGroupLasso(strength, l1_ratio=0.5, **groups)

    @property
    def in_loss(self) -> bool:
        """Whether the penalty is a term of the loss; otherwise the optimizer takes its prox."""
        return self.method in ("sgd", "adam")

    def threshold(self, trained: Arrays) -> Arrays:
        """Set the weights below `cut` to zero."""
        return {k: np.where(np.abs(v) < self.cut, np.float32(0), v) if "weight" in k else v for k, v in trained.items()}


CURVES = {
    "sgd": Curve("sgd", "sgl", "SGD, SGL", cut=1e-3),
    "adam": Curve("adam", "sgl", "Adam, SGL", cut=1e-3),
    "hapg": Curve("hapg", "sgl", "HAPG, SGL"),
    "adamhapg": Curve("adamhapg", "sgl", "AdamHAPG, SGL", metric="median"),
    "hapg_lasso": Curve("hapg", "lasso", "HAPG, lasso"),
    "hapg_group_lasso": Curve("hapg", "group_lasso", "HAPG, group lasso"),
    "adamhapg_exact": Curve("adamhapg", "sgl", "AdamHAPG exact, SGL", metric="exact"),
    "proxadam": Curve("proxadam", "sgl", "ProxAdam, SGL", metric="exact"),
}


# -- random draws -----------------------------------------------------------------------------
# Both frameworks train the same networks on the same batches. All draws come from a Mersenne Twister, and permutations and
# normal numbers are computed from it as `torch.randperm` and `torch.randn` do on a CPU: permutations are equal to torch's, normal
# numbers equal up to rounding.


def seed_of(seed: int, epoch: int = -1) -> int:
    """The seed of the generator of an epoch."""
    return (1_000_003 * (epoch + 1) + seed) % 2**32


def words(generator: np.random.RandomState, count: int) -> np.ndarray:
    """The next outputs of a generator, 32 bits each."""
    return generator.randint(0, 2**32, count, dtype=np.uint32)


@lru_cache(maxsize=4096)  # all curves of a run are searched on the same batches
def permutation(n: int, seed: int, epoch: int = -1) -> np.ndarray:
    """Fisher-Yates shuffle of 0 to n - 1."""
    order, draws = list(range(n)), words(np.random.RandomState(seed_of(seed, epoch)), n).tolist()
    for i in range(n - 1):
        j = i + draws[i] % (n - i)
        order[i], order[j] = order[j], order[i]
    return np.array(order)


def normals(seed: int) -> Callable[[int], np.ndarray]:
    """A function that returns the next `count` standard normal numbers: the Box-Muller transform in blocks of sixteen."""
    generator = np.random.RandomState(seed)

    def blocks(count: int) -> np.ndarray:
        uniform = np.float32(2.0**-24) * (words(generator, count) % 2**24).astype(np.float32)
        first, second = uniform[: count // 16 * 16].reshape(-1, 2, 8).swapaxes(0, 1)
        radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * np.pi) * second
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()

    def draw(count: int) -> np.ndarray:
        drawn = blocks(count)
        return drawn if count % 16 == 0 else np.concatenate([drawn[: count % 16 - 16], blocks(16)])

    return draw


def initial(settings: Settings, nets: int, draw: int = 0, normals: Callable = normals) -> Arrays:
    """Glorot normal weights and zero biases; all networks of a seed and draw start alike."""
    params, sources = {}, [normals(seed_of(seed, 10**6 + draw)) for seed in range(settings.seeds)]
    for i, (inputs, outputs) in enumerate(pairwise(SIZES)):
        scale = np.float32((2 / (inputs + outputs)) ** 0.5)
        start = np.stack([scale * source(outputs * inputs).reshape(outputs, inputs) for source in sources])
        params[f"weight{i}"] = np.repeat(start[:, None], nets, 1)
        params[f"bias{i}"] = np.zeros((settings.seeds, nets, outputs, 1), np.float32)
    return params


class Data:
    """Digits scaled to [0, 1], split 75/25 for each seed; images are columns: `images` is (seeds, 64, images)."""

    def __init__(self, settings: Settings) -> None:
        digits = load_digits()
        x = digits.data.astype(np.float32)
        low, high = x.min(0), x.max(0)
        x = (x - low) / np.where(high > low, high - low, 1)
        cut = round(0.75 * len(x))
        orders = [permutation(len(x), seed) for seed in range(settings.seeds)]
        n = cut if not settings.drop_last else cut // settings.batch * settings.batch
        self.batch, self.shown = settings.batch, n  # images an epoch shows
        self.images, self.valid_images = (np.stack([x[p].T for p in part]) for part in parts(orders, cut))
        self.labels, self.valid_labels = (np.stack([digits.target[p] for p in part]) for part in parts(orders, cut))

    def __len__(self) -> int:
        """Batches of an epoch, the short last one too."""
        return -(-self.shown // self.batch)

    def order(self, epoch: int) -> np.ndarray:
        """(seeds, images shown): each seed has its own order of the images, the same for all its networks."""
        seeds, _, n = self.images.shape
        return np.stack([permutation(n, seed, epoch)[: self.shown] for seed in range(seeds)])


def parts(orders: list[np.ndarray], cut: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [o[:cut] for o in orders], [o[cut:] for o in orders]


# -- trained networks -------------------------------------------------------------------------


def weights_of(params: Arrays) -> list[np.ndarray]:
    return [params[f"weight{i}"] for i in LAYERS]


def accuracy(data: Data, params: Arrays) -> np.ndarray:
    """Validation accuracy, (seeds, nets)."""
    h = data.valid_images[:, None]
    for i in LAYERS:
        h = params[f"weight{i}"] @ h + params[f"bias{i}"]
        h = np.where(h < 0, np.float32(0.01) * h, h) if i < LAYERS[-1] else h
    return (h.argmax(2) == data.valid_labels[:, None]).mean(2, dtype=np.float32)


def connected_weights(weights: list[np.ndarray]) -> list[np.ndarray]:
    """1 where a weight is not zero and leads to a neuron that feeds something."""
    masks = [(w != 0).astype(np.float32) for w in weights]
    for mask, after in zip(masks, weights[1:]):
        mask *= (after != 0).any(-2)[..., None]
    return masks
