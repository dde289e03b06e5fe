"""The search methods in JAX that scripts offer, by name. A new method is a module in this package and a row in a table below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...bilevel.jax.method import Method
from ...bilevel.jax.search import BilevelSearch
from ...bilevel.jax.search_cifar import CifarSearch
from ...bilevel.jax.search_text import TextSearch
from ...bilevel.jax.sweep import sweep
from ...engine.jax.devices import Hosts, first_process
from ...engine.jax.run import launch
from ...nets.jax.image_networks import genotype_size as cifar_size
from ...nets.jax.rnn import cell_size
from ...space.genotype import RecurrentGenotype
from ..search_method import SearchMethod
from ..settings import darts as darts_settings
from ..settings import gsparsity as gsparsity_settings
from ..settings import ista as ista_settings
from ..settings import sparse_supernet as sparse_settings
from . import darts, gsparsity, ista, sparse_supernet

__all__ = ["CIFAR", "ONE_STAGE", "TEXT", "cifar_size", "first_process", "join_hosts", "text_size"]


def bilevel(
    run: type[BilevelSearch], method: type[Method], presets: Mapping[str, Any], sound: Callable[[Any], Any] | None = None
) -> SearchMethod:
    """Register a bilevel method."""

    def search(settings: Any, seed: int, out: Path) -> dict[str, Any]:
        return launch(partial(run, method, settings, seed, out), settings, out)

    together = partial(sweep, method=method) if run is CifarSearch and method is not ista.Ista else None
    return SearchMethod(presets, search, method, sound, together)


CIFAR = {
    "darts": bilevel(CifarSearch, darts.Darts, darts_settings.CIFAR_PRESETS),
    "gsparsity": SearchMethod(gsparsity_settings.CIFAR_PRESETS, gsparsity.search),
    "ista": bilevel(CifarSearch, ista.Ista, ista_settings.CIFAR_PRESETS),
    "sparse_supernet": bilevel(CifarSearch, sparse_supernet.SparseSupernet, sparse_settings.CIFAR_PRESETS, sparse_settings.sound),
}
ONE_STAGE: dict[str, SearchMethod] = {}
TEXT = {
    "darts": bilevel(TextSearch, darts.Darts, darts_settings.TEXT_PRESETS),
    "ista": bilevel(TextSearch, ista.Ista, ista_settings.TEXT_PRESETS),
    "sparse_supernet": bilevel(TextSearch, sparse_supernet.SparseSupernet, sparse_settings.TEXT_PRESETS, sparse_settings.sound),
}


def join_hosts(coordinator: str | None, processes: str | None, process: str | None) -> None:
    """Join the other hosts of a run, if a command line names a coordinator. Arguments as those of `Hosts`, as text."""
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError("--processes and --process belong to --coordinator, which is missing")
        return
    Hosts(coordinator, _count("processes", processes), _count("process", process)).join()


def _count(name: str, word: str | None) -> int | None:
    if word is None:
        return None
    if not word.isdigit():
        raise ValueError(f"--{name} must be a number >= 0, got {word!r}")
    return int(word)


def text_size(found: RecurrentGenotype, vocabulary: int, hidden: int) -> int:
    """The parameters of the language model of a genotype."""
    return cell_size(found, vocabulary, hidden)["parameters"]
