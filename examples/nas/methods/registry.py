"""The search methods that scripts offer, by name. A new method is a module in this package and a row in a table below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..bilevel.method import Method
from ..bilevel.search import BilevelSearch
from ..bilevel.search_cifar import CifarSearch
from ..bilevel.search_text import TextSearch
from ..engine.command_line import first_process
from ..engine.run import Run, launch
from ..nets.torch.image_networks import genotype_size as cifar_size
from ..nets.torch.rnn import cell_size
from ..space.genotype import RecurrentGenotype
from ..space.spaces import IMAGES
from . import darts, gsparsity, ista, ista_one_stage, pc_darts, sparse_supernet
from .search_method import SearchMethod
from .settings import darts as darts_settings
from .settings import gsparsity as gsparsity_settings
from .settings import ista as ista_settings
from .settings import sparse_supernet as sparse_settings

__all__ = ["CIFAR", "ONE_STAGE", "TEXT", "build", "cifar_size", "first_process", "text_size"]


def bilevel(
    run: type[BilevelSearch], method: type[Method], presets: Mapping[str, Any], sound: Callable[[Any], Any] | None = None
) -> SearchMethod:
    """Register a bilevel method."""

    def search(settings: Any, seed: int, out: Path) -> dict[str, Any]:
        return launch(partial(run, method, settings, seed, out), settings, out)

    return SearchMethod(presets, search, method, sound)


def single_level(run: type[Run], presets: Mapping[str, Any]) -> SearchMethod:
    """Register a method with its own loop, which trains architecture and weights on the same data."""

    def search(settings: Any, seed: int, out: Path) -> dict[str, Any]:
        return launch(partial(run, settings, seed, out), settings, out)

    return SearchMethod(presets, search)


CIFAR = {
    "darts": bilevel(CifarSearch, darts.Darts, darts_settings.CIFAR_PRESETS),
    "gsparsity": SearchMethod(gsparsity_settings.CIFAR_PRESETS, gsparsity.search),
    "ista": bilevel(CifarSearch, ista.Ista, ista_settings.CIFAR_PRESETS),
    "pc_darts": bilevel(CifarSearch, pc_darts.PartialDarts, darts_settings.PARTIAL_PRESETS),
    "sparse_supernet": bilevel(CifarSearch, sparse_supernet.SparseSupernet, sparse_settings.CIFAR_PRESETS, sparse_settings.sound),
}
ONE_STAGE = {"ista": single_level(ista_one_stage.OneStageSearch, ista_one_stage.CIFAR_PRESETS)}
TEXT = {
    "darts": bilevel(TextSearch, darts.Darts, darts_settings.TEXT_PRESETS),
    "ista": bilevel(TextSearch, ista.Ista, ista_settings.TEXT_PRESETS),
    "sparse_supernet": bilevel(TextSearch, sparse_supernet.SparseSupernet, sparse_settings.TEXT_PRESETS, sparse_settings.sound),
}


def build(name: str, net: Any, settings: Any) -> Method:
    """Build the bilevel method of this name for a supernet, on its device."""
    known = CIFAR if net.space.kind in IMAGES else TEXT
    method = known[name].method
    if method is None:
        raise ValueError(f"name must be a bilevel method, got {name!r}")
    return method(net.space, settings, next(net.parameters()).device)


def text_size(found: RecurrentGenotype, vocabulary: int, hidden: int) -> int:
    """The parameters of the language model of a genotype."""
    return cell_size(found, vocabulary, hidden)["parameters"]
