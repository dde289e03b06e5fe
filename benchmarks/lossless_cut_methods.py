"""Training, cutting and training on with each of the methods that `lossless_cut.py` compares.

Each method is trained on the same batches in the same order. `train` runs the first phase, in which a network becomes sparse, or
is prepared for the cut; `cut_and_train` the second, on the smaller network. Only what happens in a step differs:

- ours: an optimizer of proxopt_torch with a penalty on `groups.coupled`, whose strength a `Budget` drives. Cut by `compact`.
- torch_pruning: `GroupNormPruner` with its growing regularisation of groups (Fang et al., DepGraph, CVPR 2023). Cut by the same
  pruner, by the norms of groups, until the budget is reached.
- pat: torchao's `PruneOptimizer` with a group lasso on the filters of each convolution. Its zeros are not removed by a tool of
  torchao: cut as by torch_pruning, to which zero filters are the first.
- magnitude: training without a penalty. Cut as by torch_pruning.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.data.cifar import Augment, Batches, Images, evaluation_batches, load_images
from nas.data.image_sets import crop_padding
from pruning.networks import ResNet

from proxopt import GroupL2, SparseGroupLasso
from proxopt_torch import AdamHAPG, Budget, ProxAdam, ProxSGD, compact, groups

WARMUP = 0.15  # of the first phase, without a penalty, in all methods
MEASUREMENTS = 80  # of the multiply-adds by a Budget until it is due
TUNING_LR = 0.2  # first learning rate of the second phase, as a share of that of the first
CUTS = 400  # small steps in which torch_pruning removes groups
MOMENTUM = 0.9


@dataclass(frozen=True)
class Setting:
    """Network, data and length of all trainings.

    blocks, width: of each stage of the residual network, and channels of its first. pixels: side of the images; 0: 32. images:
    to train on. held_out: of the last training images, to choose between the trial values. epochs, tuning_epochs: of the first
    and second phase. sgd_lr, adam_lr: first learning rates. weight_decay: of SGD.
    """

    data_dir: Path = Path("data")
    device: str = "cpu"
    blocks: int = 1
    width: int = 16
    pixels: int = 16
    images: int = 8000
    held_out: int = 2000
    batch: int = 64
    epochs: int = 5
    tuning_epochs: int = 1
    sgd_lr: float = 0.1
    adam_lr: float = 4e-3
    weight_decay: float = 5e-4
    amp: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and field.name not in ("amp", "pixels", "weight_decay") and value <= 0:
                raise ValueError(f"{field.name} must be > 0, got {value}")

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the settings that the command line has."""
        return ("images", "epochs", "tuning_epochs", "batch", "width", "blocks", "pixels", "held_out")


PRESETS = {
    "small": Setting(),
    "full": Setting(blocks=3, pixels=0, images=45_000, held_out=5000, batch=128, epochs=40, tuning_epochs=10, amp=True),
}


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    knob: what is chosen from the trial values. value_of: the method whose chosen value it takes. by_cost: the option of Budget.
    """

    title: str
    kind: str
    optimizer: str
    knob: str
    values: tuple[Any, ...]
    penalty: str = ""
    value_of: str = ""
    by_cost: bool = True


DUE = ("share of the training at which the budget is due", (0.5, 0.7, 0.9))
LASSO, SPARSE = "group lasso", "sparse group lasso"
METHODS = {
    "magnitude": Method("magnitude pruning", "magnitude", "SGD", "norms are compared", ("in all layers", "in each layer")),
    "torch_pruning": Method("Torch-Pruning, group norm", "torch_pruning", "SGD", "reg", (5e-4, 2e-3, 8e-3)),
    "magnitude_adam": Method("magnitude pruning, Adam", "magnitude", "Adam", "norms are compared", (), value_of="magnitude"),
    "torch_pruning_adam": Method("Torch-Pruning, group norm, Adam", "torch_pruning", "Adam", "reg", (5e-4, 2e-3, 8e-3)),
    "pat": Method("torchao PAT, group lasso", "pat", "SGD", "reg_lambda", (1e-4, 1e-3, 1e-2)),
    "prox_adam": Method("ProxAdam, group lasso", "ours", "ProxAdam", *DUE, LASSO),
    "prox_sgd": Method("ProxSGD, group lasso", "ours", "ProxSGD", *DUE, LASSO),
    "adam_hapg": Method("AdamHAPG, group lasso", "ours", "AdamHAPG", *DUE, LASSO),
    "prox_adam_sgl": Method("ProxAdam, sparse group lasso", "ours", "ProxAdam", *DUE, SPARSE, "prox_adam"),
    "prox_sgd_sgl": Method("ProxSGD, sparse group lasso", "ours", "ProxSGD", *DUE, SPARSE, "prox_sgd"),
    "adam_hapg_sgl": Method("AdamHAPG, sparse group lasso", "ours", "AdamHAPG", *DUE, SPARSE, "adam_hapg"),
    "prox_adam_equal": Method("ProxAdam, group lasso, equal strengths", "ours", "ProxAdam", *DUE, LASSO, "prox_adam", False),
}
PENALTIES = {LASSO: GroupL2, SPARSE: lambda strength: SparseGroupLasso(strength, l1_ratio=0.5)}


class Data:
    """Images to train on, to choose with and to test on."""

    def __init__(self, setting: Setting) -> None:
        read = load_images("cifar10", setting.data_dir, setting.pixels).to(setting.device)
        count = len(read.train.labels)
        if setting.images + setting.held_out > count:
            raise ValueError(f"images + held_out must be <= {count}, got {setting.images} + {setting.held_out}")
        self.train = read.train.select(slice(0, setting.images))
        self.parts = {"held out": read.train.select(slice(count - setting.held_out, count)), "test": read.test}
        side = read.test.images.shape[-1]
        self.augment = Augment(read.mean, read.std, crop_padding(side))
        self.plain = Augment(read.mean, read.std)
        self.example = self.plain(read.test.images[:2])

    def batches(self, setting: Setting, seed: int, stream: int) -> Batches:
        return Batches(self.train, setting.batch, seed, self.augment, stream)


def accuracy(model: nn.Module, images: Images, augment: Augment) -> float:
    """Percent of the images that are classified correctly."""
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in evaluation_batches(images, augment))
    return 100 * right / len(images.labels)


def size(model: nn.Module, example: Tensor) -> tuple[int, int]:
    """Multiply-adds for one image, counted by PyTorch, and parameters."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(example)
    return counter.get_total_flops() // 2 // len(example), sum(p.numel() for p in model.parameters())


def optimizer_for(name: str, params: Any, setting: Setting) -> Any:
    """An optimizer by name. ProxSGD has the steps of SGD with momentum where nothing is penalised."""
    if name == "SGD":
        return torch.optim.SGD(params, setting.sgd_lr, MOMENTUM, weight_decay=setting.weight_decay)
    if name == "ProxSGD":
        return ProxSGD(params, setting.sgd_lr / (1 - MOMENTUM), rho=1 - MOMENTUM, weight_decay=setting.weight_decay)
    if name == "AdamHAPG":
        return AdamHAPG(params, setting.adam_lr / 4)  # it extrapolates, which makes its steps longer
    return {"Adam": torch.optim.Adam, "ProxAdam": ProxAdam}[name](params, setting.adam_lr)


def phase(
    model: nn.Module,
    optimizer: Any,
    batches: Batches,
    epochs: int,
    setting: Setting,
    before_step: Callable[[], object] = lambda: None,
    after_step: Callable[[], object] = lambda: None,
    first_lr: float = 1.0,
) -> None:
    """Train with a cosine schedule of the learning rate to 0, from `first_lr` times that of the optimizer."""
    starts, total, step = [first_lr * group["lr"] for group in optimizer.param_groups], epochs * len(batches), 0
    device, start = torch.device(setting.device).type, time.perf_counter()
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            model.train()
            for group, lr in zip(optimizer.param_groups, starts):
                group["lr"] = lr * (1 + math.cos(math.pi * step / total)) / 2
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16) if setting.amp else nullcontext():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            before_step()
            optimizer.step()
            after_step()
            step += 1
        seconds = (time.perf_counter() - start) / (epoch + 1)
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}, {seconds * (epochs - epoch - 1):.0f} s left", flush=True)


# -- the first phase --------------------------------------------------------------------------------


def train(model: nn.Module, method: Method, value: Any, budget: float, setting: Setting, data: Data, seed: int) -> None:
    """Train for the cut.

    value: the value of the knob of the method. budget: the share of the multiply-adds, for a method that needs it here.
    """
    batches = data.batches(setting, seed, 0)
    steps = setting.epochs * len(batches)
    if method.kind == "ours":
        found = groups.coupled(model, data.example, PENALTIES[method.penalty](1e-3))
        optimizer = optimizer_for(method.optimizer, found, setting)
        due = round(value * steps)
        driver = Budget(
            optimizer,
            model,
            data.example,
            macs=budget,
            steps=due,
            start=WARMUP / value,
            every=max(due // MEASUREMENTS, 1),
            by_cost=method.by_cost,
        )
        phase(model, optimizer, batches, setting.epochs, setting, after_step=driver.step)
        print(driver)
        optimizer.eval()
        if method.optimizer == "AdamHAPG":  # its batch statistics are of the points at which gradients were taken
            update_bn((x for x, _ in batches.epoch(0)), model, setting.device)
    elif method.kind == "torch_pruning":
        pruner, step = pruner_for(model, data.example, value), iter(range(steps))
        before = lambda: pruner.regularize(model) if next(step) >= WARMUP * steps else None
        optimizer = optimizer_for(method.optimizer, model.parameters(), setting)
        phase(model, optimizer, batches, setting.epochs, setting, before_step=before)
    elif method.kind == "pat":
        phase(model, pat(model, value, steps, setting), batches, setting.epochs, setting)
    else:
        phase(model, optimizer_for(method.optimizer, model.parameters(), setting), batches, setting.epochs, setting)


def pat(model: nn.Module, strength: float, steps: int, setting: Setting) -> Any:
    """torchao's optimizer: a group lasso on the filters of the convolutions. Zeros are fixed in the last fifth of the steps."""
    from torchao.prototype.pat.optim import PruneOptimizer

    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    own = {id(p) for p in convolutions}
    pruned = {"params": convolutions, "group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso", "reg_lambda": strength}
    base = optimizer_for("SGD", [pruned, {"params": [p for p in model.parameters() if id(p) not in own]}], setting)
    return PruneOptimizer(base, warmup_steps=round(WARMUP * steps), healing_start_step=round(0.8 * steps))


def pruner_for(model: nn.Module, example: Tensor, reg: float = 0.0, across_layers: bool = True) -> Any:
    """A pruner of Torch-Pruning with the options of its published benchmark on CIFAR-10."""
    import torch_pruning as tp

    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max" if reg else "mean")
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear)]
    options = {"global_pruning": across_layers, "iterative_steps": CUTS, "pruning_ratio": 1.0, "ignored_layers": ignored}
    return tp.pruner.GroupNormPruner(model, example, importance, reg=reg, **options)


# -- the cut and the second phase -------------------------------------------------------------------


def cut(model: nn.Module, method: Method, value: Any, budget: float, data: Data) -> nn.Module:
    """The smaller network."""
    if method.kind == "ours":
        return compact(model, data.example).model
    reg = value if method.kind == "torch_pruning" else 0.0
    pruner = pruner_for(model, data.example, reg, across_layers=value != "in each layer")
    wanted = budget * size(model, data.example)[0]
    for _ in range(CUTS):
        if size(model, data.example)[0] <= wanted:
            break
        pruner.step()
    return model


def run(name: str, value: Any, budgets: tuple[float, ...], setting: Setting, seed: int, part: str) -> dict[str, Any]:
    """One training with a method, and for each budget the cut and the second phase; the program of a worker process.

    name: of METHODS. budgets: several only for methods whose first phase does not depend on them; 1 is the dense network. part:
    of the images, on which accuracies are measured: "held out" or "test".
    """
    torch.set_num_threads(1 if setting.device == "cpu" else torch.get_num_threads())
    warnings.filterwarnings("ignore", module="torch_pruning")
    method, data = METHODS[name], Data(setting)
    torch.manual_seed(seed)
    dense = ResNet(setting.blocks, setting.width).to(setting.device)
    dense_macs, dense_parameters = size(dense, data.example)
    train(dense, method, value, budgets[0], setting, data, seed)
    measured = lambda model: accuracy(model, data.parts[part], data.plain)
    before, rows = measured(dense), []
    state = {key: entry.clone() for key, entry in dense.state_dict().items()}
    for budget in budgets:
        model = dense
        if len(budgets) > 1:  # a pruner changes its model
            model = ResNet(setting.blocks, setting.width).to(setting.device)
            model.load_state_dict(state)
        with torch.no_grad():
            expected = dense(data.example)
        model = cut(model, method, value, budget, data)
        with torch.no_grad():
            gap = (model.eval()(data.example) - expected).abs().max().item() / expected.abs().max().item()
        after = measured(model)
        macs, parameters = size(model, data.example)
        tuned = optimizer_for("SGD" if method.optimizer in ("SGD", "ProxSGD") else "Adam", model.parameters(), setting)
        phase(model, tuned, data.batches(setting, seed, 1), setting.tuning_epochs, setting, first_lr=TUNING_LR)
        sizes = {"macs": macs / dense_macs, "parameters": parameters / dense_parameters}
        accuracies = {"before": before, "after": after, "trained": measured(model)}
        rows.append({"budget": budget, **sizes, **accuracies, "gap": gap})
        print(rows[-1], flush=True)
    return {"rows": rows}
