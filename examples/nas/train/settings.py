"""Settings of trainings, and of the language models in searches. A preset is an instance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from ..engine.settings import CheckedSettings, RunSettings, check, cosine

Schedule = Literal["cosine", "linear", "exponential", "linear_tail"]


@dataclass(frozen=True)
class ImageTrainSettings(RunSettings):
    """The training recipe of DARTS. The defaults are published for CIFAR-10 (SparseNAS trains for 1200 epochs)."""

    out: Path = Path("runs/train")
    data: Literal["cifar10", "cifar100", "folder"] = "cifar10"
    """Data set. folder: own images of one size with sides divisible by 4, in DATA_DIR/train/CLASS and DATA_DIR/val/CLASS;
    without val, one in ten of each class of train is for validation."""
    data_dir: Path = Path("data")
    """Folder of the data set; CIFAR is downloaded to it if it is missing."""
    images: int = 0
    """Number of training images to use; 0: all."""
    valid_images: int = 0
    """Number of validation images to use; 0: all."""
    hold_out: float = 0.0
    """Share of the training images that are held out and validated on, so that the test images stay unseen; 0: validate on the
    test images (or val)."""
    channels: int = 36
    """Number of channels of the first cell; each reduction cell doubles it."""
    layers: int = 20
    """Number of cells of the network; those at one and two thirds of the depth are reduction cells, which halve the sides of the
    image."""
    epochs: int = 600
    """Number of epochs, passes over the training images."""
    batch: int = 96
    """Batch size, in images."""
    lr: float = 0.025
    """Initial learning rate."""
    schedule: Schedule = "cosine"
    """Schedule of the learning rate, by epoch: cosine or linear from --lr to --lr-min; exponential: times --decay in each epoch;
    linear_tail: linear towards 0 five epochs before the end, then by a fifth of that slope (P-DARTS, PC-DARTS, ISTA-NAS)."""
    lr_min: float = 0.0
    """Final learning rate of the cosine and linear schedules."""
    decay: float = 0.97
    """Factor of the learning rate in each epoch of the exponential schedule."""
    warmup_epochs: int = 0
    """In the first epochs, so many, the learning rate grows linearly up to lr, whatever the schedule; 0: no warm-up."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov's momentum, which needs --momentum > 0."""
    weight_decay: float = 3e-4
    """Weight decay: this multiple of each weight is added to its gradient."""
    clip: float = 5.0
    """Gradient clipping threshold (norm of the gradient of all weights); 0: no clipping."""
    cutout: int = 16
    """Side in pixels of a square at a random place that is masked in training images (cutout); 0: no cutout."""
    auxiliary: float = 0.4
    """Weight of the loss of the auxiliary head, a second classifier after two thirds of the cells; 0: no such head. It needs
    images with sides of 32, 36 or 40 pixels."""
    drop_path: float = 0.2
    """Drop path: the probability with which a path is left out for a sample, reached linearly from 0 over the epochs."""
    smoothing: float = 0.0
    """Label smoothing, in [0, 1): the share of the target probability that is spread over all classes; 0: none."""
    amp: bool = False
    """Compute the network in bfloat16, which is faster on GPUs; weights stay in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            counts=("channels", "layers", "epochs", "batch"),
            amounts=(
                *("lr", "lr_min", "decay", "warmup_epochs", "momentum", "weight_decay", "clip"),
                *("auxiliary", "cutout", "images", "valid_images"),
            ),
            shares=("drop_path", "smoothing", "hold_out"),
        )
        if self.nesterov and not self.momentum:
            raise ValueError(f"momentum must be > 0 with nesterov, got {self.momentum}")

    def schedules(self) -> list[str]:
        # the exponential schedule has no end that the epochs determine
        end = {"exponential": self.lr, "linear_tail": 0.0}.get(self.schedule, self.lr_min)
        lr = [f"lr from {self.lr:g} to {end:g}"] if self.lr != end else []
        return [*super().schedules(), *lr, *(["drop_path"] if self.drop_path else [])]

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1) / self.warmup_epochs
        if self.schedule == "exponential":
            return self.lr * self.decay**epoch
        if self.schedule == "linear_tail":
            return self.lr * _linear_tail(epoch, self.epochs)
        done = epoch / self.epochs
        share = cosine(done) if self.schedule == "cosine" else 1 - done
        return self.lr_min + (self.lr - self.lr_min) * share


def _linear_tail(epoch: int, epochs: int) -> float:
    """The share of the learning rate in the schedule linear_tail."""
    left, slope = epochs - epoch, max(epochs - 5, 1)
    return (left - 5) / slope if left > 5 else left / (5 * slope)


@dataclass(frozen=True)
class GenotypeTrainSettings(ImageTrainSettings):
    """The training of the network of a genotype."""

    genotype: str = "DARTS_V2"
    """Genotype: a published name (DARTS_V1, DARTS_V2, PDARTS, PC_DARTS, ISTA, ...), a file that a search wrote, or a genotype as
    the published code prints it, in quotes. Cells of NAS-Bench-201 are such files, and strings, '|nor_conv_3x3~0|+|...|'."""
    not_identifying: ClassVar[tuple[str, ...]] = ("data_dir", "genotype", "count", "workers")
    form: Literal["evaluation", "one_stage", "gsparsity"] = "evaluation"
    """Form of the network. evaluation: the published one. one_stage: batch norms after pools and identities too, as in the
    network of a one-stage search. gsparsity: batch norms after pools, drop path on the sum of the operations of each edge, skip
    connections included, and nodes without paths as zero channels behind the others, as in the published code of GSparsity."""
    start: Path | None = None
    """Folder of a training whose final weights this one starts with, or a network.pt; without it weights are random. The
    classifier starts with random weights where the number of classes is another."""


@dataclass(frozen=True)
class CifarTrainSettings(GenotypeTrainSettings):
    """The training of a genotype on CIFAR."""

    count: bool = False
    """Print the numbers of parameters and multiply-adds as JSON, and train nothing."""
    classes: int = 0
    """Number of classes for --count; 0: as in the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 0:
            raise ValueError(f"classes must be >= 0, got {self.classes}")


@dataclass(frozen=True)
class ImageNetTrainSettings(CifarTrainSettings):
    """The mobile setting: 224x224 images from a folder with `train` and `val`, 14 cells, 48 channels."""

    data: Literal["folder"] = "folder"  # type: ignore[assignment]
    """Data set: images of any size in DATA_DIR/train/CLASS and DATA_DIR/val/CLASS."""
    channels: int = 48
    layers: int = 14
    epochs: int = 250
    batch: int = 512
    lr: float = 0.4
    schedule: Schedule = "linear"
    weight_decay: float = 3e-5
    cutout: int = 0
    drop_path: float = 0.0
    smoothing: float = 0.1
    pixels: int = 224
    """Side of the crops that are trained on, in pixels."""
    workers: int = 4
    """Number of processes that decode images; 0: the training itself decodes them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutout:
            raise ValueError(f"cutout must be 0 for folders of images, got {self.cutout}")
        for name in ("images", "valid_images", "hold_out"):
            if getattr(self, name):
                raise ValueError(f"{name} must be 0 with --imagenet, got {getattr(self, name)}")
        if self.form != "evaluation":
            raise ValueError(f"form must be evaluation for folders of images, got {self.form}")


_NASBENCH201 = CifarTrainSettings(  # Dong and Yang, 2020, Table 1
    channels=16,
    layers=17,
    epochs=200,
    batch=256,
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    clip=0.0,
    cutout=0,
    auxiliary=0.0,
    drop_path=0.0,
)
CIFAR_TRAIN_PRESETS = {
    "paper": CifarTrainSettings(),
    "long": CifarTrainSettings(epochs=1200),
    "gsparsity": CifarTrainSettings(layers=14, batch=80, drop_path=0.3, form="gsparsity"),
    "gsparsity_subspaces": CifarTrainSettings(layers=17, batch=80, drop_path=0.3, form="gsparsity"),  # S1, S2, S4
    "small": CifarTrainSettings(channels=12, layers=8, epochs=15, batch=64, images=10_000, drop_path=0.1, cutout=8),
    "nasbench201": _NASBENCH201,
    "nasbench201_small": replace(_NASBENCH201, layers=5, epochs=10, batch=64, images=10_000),
}
IMAGENET_TRAIN_PRESETS = {
    "paper": ImageNetTrainSettings(),  # SparseNAS
    "darts": ImageNetTrainSettings(batch=128, lr=0.1, schedule="exponential"),
    "ista": ImageNetTrainSettings(batch=1024, lr=0.5, schedule="linear_tail", warmup_epochs=5),  # and PC-DARTS, P-DARTS
    "small": ImageNetTrainSettings(channels=16, layers=8, epochs=30, batch=64, lr=0.05),
}


@dataclass(frozen=True)
class LanguageSettings(CheckedSettings):
    """A recurrent language model and its input, in searches and trainings."""

    data_dir: Path | None = None
    """Folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt, or with train.txt, valid.txt and test.txt. Without it the
    text is the documentation of Python's language topics, which comes with Python."""
    tokens: int = 0
    """Number of words of the training text to use; 0: all."""
    hidden: int = 300
    """Size of the hidden state and of word embeddings, which are equal, because the decoder is the embedding."""
    bptt: int = 35
    """Length of backpropagation through time, in words."""
    drop_words: float = 0.0
    """Dropout probability of whole words of the vocabulary, drawn for each batch."""
    drop_embedding: float = 0.2
    """Dropout probability of the entries of embedded words."""
    drop_input: float = 0.75
    """Dropout probability of the input of the cell."""
    drop_hidden: float = 0.25
    """Dropout probability of hidden states before each product; one mask for all nodes and words of a batch."""
    drop_output: float = 0.75
    """Dropout probability of the output."""
    temporal: float = 1e-3
    """Weight of temporal activation regularisation, the mean squared change of the hidden state from word to word."""
    compiled: bool = False
    """Compile the nodes with torch.compile. Compiling takes minutes, which long runs save again, especially on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            counts=("hidden",),
            amounts=("tokens", "temporal"),
            shares=("drop_words", "drop_embedding", "drop_input", "drop_hidden", "drop_output"),
        )
        if self.bptt < 2:
            raise ValueError(f"bptt must be >= 2, got {self.bptt}")


@dataclass(frozen=True)
class TextTrainSettings(LanguageSettings, RunSettings):
    """The training recipe of DARTS with the epochs of SparseNAS. The defaults are published for Penn Treebank."""

    out: Path = Path("runs/train_ptb")
    not_identifying: ClassVar[tuple[str, ...]] = ("data_dir", "genotype", "count")
    genotype: str = "DARTS_V2"
    """Cell: a published name (DARTS_V1, DARTS_V2), a file that a search wrote, a cell as the published code prints it, in quotes,
    or LSTM."""
    count: bool = False
    """Print the number of parameters as JSON, and train nothing."""
    epochs: int = 4000
    """Number of epochs, passes over the training text."""
    batch: int = 64
    """Batch size of the training text, in columns."""
    valid_batch: int = 10
    """Batch size of the validation text, in columns."""
    test_batch: int = 1
    """Batch size of the test text, in columns."""
    hidden: int = 850
    drop_words: float = 0.1
    lr: float = 20.0
    """Learning rate of SGD for windows of --bptt words; it is scaled with the length of the window."""
    weight_decay: float = 8e-7
    """Weight decay: this multiple of each weight is added to its gradient."""
    clip: float = 0.25
    """Gradient clipping threshold (norm of the gradient of all weights); 0: no clipping."""
    start: Path | None = None
    """Folder of a training whose final weights this one starts with, or a network.pt; without it weights are random."""
    patience: int = 5
    """Number of epochs before averaging: SGD is averaged once the validation loss is above the best one of all epochs but the
    last so many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            counts=("epochs", "batch", "valid_batch", "test_batch", "patience"),
            amounts=("lr", "weight_decay", "clip"),
        )


TEXT_TRAIN_PRESETS = {
    "paper": TextTrainSettings(),
    "small": TextTrainSettings(
        hidden=128, epochs=12, batch=32, tokens=300_000, test_batch=10, drop_input=0.2, drop_output=0.3, drop_words=0.0, lr=10.0
    ),
}
