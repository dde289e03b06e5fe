"""The network that a training has left in its folder: `nas.load`, and its evaluation.

The files that are read: settings.json (or, of earlier releases, checkpoint.pt), network.pt, of a one-stage search genotype.json,
of operations that were pruned cells.json, and of a text vocabulary.json.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import cifar_files, image_folder
from ..data.text import Corpus, perplexity, text_columns
from ..engine import checkpoint
from ..engine.distributed import SINGLE_PROCESS
from ..engine.loop import first_sentence
from ..engine.resume import NAME, read_settings
from ..nets.torch import cnn, nasbench201
from ..nets.torch.rnn import LSTM, LanguageModel, RecurrentNetwork, mean_loss
from ..space.genotype import CellGenotype, Genotype, RecurrentGenotype
from ..space.genotype import Path as CellPath
from .settings import CifarTrainSettings, ImageNetTrainSettings, ImageTrainSettings, TextTrainSettings
from .train_cifar import image_network, measures, prepare_data


class ImageClassifier(nn.Module):
    """A convolutional network that returns the logits (N, classes) of images (N, channels, H, W), without its auxiliary head.

    Images are pixels as bytes (uint8, RGB or the channels of own images), or floats that are normalised already,
    (pixel / 255 - mean) / std for each channel, as by `normalised`.

    network: returns (logits, None). mean, std: of each channel, for pixels in [0, 1]. classes: their number.
    """

    def __init__(self, network: cnn.Discrete | nasbench201.Network, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network, self.mean, self.std = network, mean, std
        self.classes = network.classifier.out_features
        scale, shift = torch.tensor(std).mul(255).reciprocal(), -torch.tensor(mean) / torch.tensor(std)
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Normalise pixels in [0, 255]."""
        return pixels * self.scale + self.shift

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalised(images) if images.dtype == torch.uint8 else images)[0]


class LanguageClassifier(nn.Module):
    """A language model that returns the logits (T, batch, vocabulary) of the word after each of the words (T, batch), int64.

    The hidden state before the first word is zero; `continued` carries it from one part of a text to the next.

    network: the recurrent network. vocabulary: the words by their indices; None if the folder does not have them.
    """

    def __init__(self, network: LanguageModel, vocabulary: tuple[str, ...] | None):
        super().__init__()
        self.network, self.vocabulary = network, vocabulary

    def forward(self, words: Tensor) -> Tensor:
        return self.continued(words, self.network.start(words.shape[1]))[0]

    def continued(self, words: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The logits after words that follow others, and the hidden state after the last one. state: the one before them."""
        states, last = self.network(words, state)
        return torch.matmul(states, self.network.embedding.t()) + self.network.bias, last


def load(folder: str | Path, device: str | torch.device = "cpu") -> ImageClassifier | LanguageClassifier:
    """Implementation of `nas.load`."""
    folder = Path(folder)
    about = describe(folder)
    weights = checkpoint.load(_weights_in(folder, about))
    net: ImageClassifier | LanguageClassifier
    try:
        net = _language(folder, about, weights) if "embedding" in weights else _classifier(folder, about, weights)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = first_sentence(error)
        raise ValueError(f"{folder} must contain the network of its settings, but they do not fit: {reason}") from None
    return net.to(device).eval()


def describe(folder: Path) -> dict[str, Any]:
    """What settings.json has, or the identity in the checkpoint of an earlier release, which has no such file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} of a training")
    if (folder / NAME).is_file():
        return read_settings(folder / NAME)
    if (folder / "checkpoint.pt").is_file():
        return checkpoint.load_run(folder / "checkpoint.pt")["identity"]
    below = sorted(str(file.parent) for file in folder.glob("*/network.pt"))
    hint = f"; there are some in {', '.join(below)}" if below else ""
    raise FileNotFoundError(f"{folder} must be the folder of a training, with {NAME} and network.pt{hint}")


def _weights_in(folder: Path, about: dict[str, Any]) -> Path:
    file = folder / "network.pt"
    if file.exists():
        return file
    below = sorted(str(file.parent) for file in folder.glob("*/network.pt"))
    if below:
        raise FileNotFoundError(f"{folder} must contain network.pt; there are such files in {', '.join(below)}")
    method = str(about.get("method", ""))
    if method and not method.endswith("one_stage"):
        script = "train_ptb" if "text" in about else "train_cifar10"
        raise FileNotFoundError(
            f"{folder} is the folder of a search, which trains no network: {script}.py --genotype {folder / 'genotype.json'} does"
        )
    raise FileNotFoundError(f"{folder} must contain network.pt: the training has not ended, and continues with --resume")


def normalisation(about: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels by which the images of a training are normalised, for pixels in [0, 1]."""
    if "statistics" in about:
        mean, std = about["statistics"]
        return tuple(mean), tuple(std)
    source = cifar_files.SOURCES.get(about["data"])  # release 0.1.0
    return (source.mean, source.std) if source is not None else (image_folder.MEAN, image_folder.STD)


def image_settings(about: dict[str, Any]) -> CifarTrainSettings:
    """The settings of a training, of which the network depends on some, from their description."""
    large = about.get("imagenet", "statistics" not in about and about["data"] == "folder")  # release 0.1.0 has no such entry
    kind = ImageNetTrainSettings if large else CifarTrainSettings
    known = {f.name for f in fields(kind)} & {"data", "channels", "layers", "form"}
    form = "one_stage" if "method" in about else about.get("form", "evaluation")
    return kind(**{**{k: about[k] for k in known if k in about}, "form": form, "auxiliary": 0.0})


def _classifier(folder: Path, about: dict[str, Any], weights: dict[str, Tensor]) -> ImageClassifier:
    mean, std = normalisation(about)
    net = image_network(_genotypes(folder, about), image_settings(about), len(weights["classifier.weight"]), len(mean))
    if (folder / "cells.json").is_file():
        keep_paths(net, _read_json(folder / "cells.json"))
    net.load_state_dict({name: value for name, value in weights.items() if not name.startswith("auxiliary.")})
    return ImageClassifier(net, mean, std)


def keep_paths(net: cnn.Discrete, cells: list[list[list[Any]]]) -> None:
    """Remove the paths of each cell that are not listed, [node, source, operation] each. Outputs keep their width."""
    for cell, paths in zip(net.cells, cells, strict=True):
        kept = [cell.paths.index(CellPath(*path)) for path in paths]
        cell.paths = tuple(cell.paths[k] for k in kept)
        cell.operations = nn.ModuleList(cell.operations[k] for k in kept)


def _genotypes(folder: Path, about: dict[str, Any]) -> Any:
    """The genotype of a network, or those of its layers."""
    text = about.get("architecture") or (folder / "genotype.json").read_text(encoding="utf-8")
    found = []
    while text.strip():  # the description of a network with a genotype for each layer has them one after the other
        made, end = json.JSONDecoder().raw_decode(text.lstrip())
        found.append(CellGenotype(**made) if "cell" in made else Genotype(**made))
        text = text.lstrip()[end:]
    return found[0] if len(found) == 1 else found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is not valid JSON: {error}") from None


def _language(folder: Path, about: dict[str, Any], weights: dict[str, Tensor]) -> LanguageClassifier:
    words, hidden = weights["embedding"].shape
    cell = about["architecture"]
    net: LanguageModel
    net = LSTM(words, hidden) if cell == "LSTM" else RecurrentNetwork(RecurrentGenotype(**json.loads(cell)), words, hidden)
    net.load_state_dict(weights)
    file = folder / "vocabulary.json"
    return LanguageClassifier(net, tuple(_read_json(file)) if file.is_file() else None)


def evaluate_images(net: ImageClassifier, settings: ImageTrainSettings, device: torch.device) -> tuple[float, float, float]:
    """Compute loss, accuracy and top-5 accuracy of a trained network, as a training with these settings reports them.

    Images are normalised by the statistics of the training of the network, whatever the data.
    """
    data = prepare_data(settings, 0, device, SINGLE_PROCESS, (net.mean, net.std))
    for name, wanted, found in (("classes", net.classes, data.classes), ("channels", len(net.mean), data.channels)):
        if wanted != found:
            raise ValueError(f"the data must have the {wanted} {name} of the network, got {found}")
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
        return measures(net, data.validation(), device)


def evaluate_text(net: LanguageClassifier, corpus: Corpus, settings: TextTrainSettings) -> dict[str, float]:
    """Compute loss and perplexity on the validation and the test text. Raises ValueError if the words are others."""
    if net.vocabulary is not None and net.vocabulary != corpus.vocabulary:
        raise ValueError(
            f"the text must have the vocabulary of the training, {len(net.vocabulary)} words in the same order, got another of"
            f" {len(corpus.vocabulary)}"
        )
    found, device = {}, net.network.embedding.device
    for part, words, columns in (("valid", corpus.valid, settings.valid_batch), ("test", corpus.test, settings.test_batch)):
        rows = torch.from_numpy(text_columns(words, columns, f"{part}_batch")).to(device)
        loss = mean_loss(net.network, rows, settings.bptt)
        found |= {f"{part}_loss": loss, f"{part}_perplexity": perplexity(loss)}
    return found
