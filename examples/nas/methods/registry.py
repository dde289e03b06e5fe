"""The methods that a script can choose, by name. A new one is a file beside this one and a row in a table below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..bilevel.method import Method
from ..bilevel.search import BilevelSearch
from ..bilevel.search_cifar import CifarSearch
from ..bilevel.search_text import TextSearch
from ..engine.run import carry_out
from . import darts, gsparsity, ista, ista_one_stage, sparse_supernet


class SearchMethod(NamedTuple):
    """How a method searches: its presets by name, and a function of (settings, seed, folder) that returns the last row."""

    presets: Mapping[str, Any]
    search: Callable[[Any, int, Path], dict[str, Any]]
    method: type[Method] | None = None  # of a search on two levels


def bilevel(run: type[BilevelSearch], method: type[Method], presets: Mapping[str, Any]) -> SearchMethod:
    """A method whose architecture variables are trained on data of their own."""

    def search(settings: Any, seed: int, out: Path) -> dict[str, Any]:
        return carry_out(partial(run, method, settings, seed, out), settings, out)

    return SearchMethod(presets, search, method)


CIFAR = {
    "darts": bilevel(CifarSearch, darts.Search, darts.PRESETS),
    "gsparsity": SearchMethod(gsparsity.PRESETS, gsparsity.search),
    "ista": bilevel(CifarSearch, ista.Search, ista.PRESETS),
    "sparse_supernet": bilevel(CifarSearch, sparse_supernet.Search, sparse_supernet.PRESETS),
}
ONE_STAGE = {"ista": SearchMethod(ista_one_stage.PRESETS, ista_one_stage.search)}
TEXT = {
    "darts": bilevel(TextSearch, darts.Search, darts.TEXT_PRESETS),
    "ista": bilevel(TextSearch, ista.Search, ista.TEXT_PRESETS),
    "sparse_supernet": bilevel(TextSearch, sparse_supernet.Search, sparse_supernet.TEXT_PRESETS),
}


def build(name: str, net: Any, settings: Any) -> Method:
    """The bilevel method of this name for a supernet, on its device."""
    known = CIFAR if net.space.layout.name == "convolutional" else TEXT
    method = known[name].method
    if method is None:
        raise ValueError(f"name must be that of a search on two levels, got {name!r}")
    return method(net.space, settings, next(net.parameters()).device)
