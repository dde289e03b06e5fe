"""Neural architecture search with proximal optimizers, in layers: a package imports from those before it only.

    space     genotypes, search spaces, pictures of cells; files, and numbers as text
    engine    settings, command line, loop over epochs, checkpoints, several processes, tables, curves, reports
    data      images and text
    nets      networks, a package for each deep learning library
    train     training of the network of a genotype
    bilevel   searches with network weights on training data and architecture weights on validation data
    methods   search methods, a file each

Everything is in PyTorch, unless it lies in a file or folder named `jax`, which is in JAX and does not import PyTorch, or is
shared. Shared files import neither of the two:

    space, and all files and folders named settings
    engine: bisection, command_line, console, curves, lock, log, loop, report, results, resume, selection, signals
    data: cifar_files, image_files, image_sets, nats_bench, text
    nets: convolutional, nasbench201, recurrent
    bilevel: early_stopping, outcome
    methods: connected, edges, frameworks, group_sparsity, recovery, search_method, selection, sparse_rules
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load"]


def load(folder: str | PathLike[str], device: str = "cpu") -> nn.Module:
    """Load the network that a training has left in its folder, in evaluation mode.

        net = nas.load("runs/train")
        logits = net(images)                  # images: uint8 (N, 3, 32, 32), RGB; logits: (N, classes)

    Folders of `train_cifar10.py` (CIFAR-10, CIFAR-100, ImageNet and own images), of a one-stage search, and of each mu of
    `prune_operations.py` give an `nas.train.loading.ImageClassifier`, whose result is a tensor of logits. It takes pixels as
    bytes, RGB or with the channels of own images, or floats that are normalised already: (pixel / 255 - mean) / std for each
    channel, with the attributes `mean` and `std`, as `net.normalised(pixels)` computes it. Folders of `train_ptb.py` give an
    `nas.train.loading.LanguageClassifier`: from words (T, batch), indices into `vocabulary`, it computes the logits (T,
    batch, words) of the words that follow.

    The network can be trained further (`net.train()`), and exported by PyTorch's exporter:

        torch.onnx.export(net, (torch.zeros(1, 3, 32, 32),), "network.onnx", dynamo=True)     # pip install onnx onnxscript

    Args:
      folder: --out of the training.
      device: where the network is loaded to, such as "cuda".

    Raises:
      FileNotFoundError: there is no such folder, or no network in it.
      ImportError: PyTorch is not installed.
      ValueError: a damaged file, or a file of something else.
    """
    try:
        from .train import loading
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("nas.load needs PyTorch, in which networks are trained: pip install torch") from None
    return loading.load(folder, device)
