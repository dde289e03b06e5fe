"""The site of docs/: the code of its pages runs, and every public name has a page."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import warnings
from pathlib import Path

import page_code
import pytest

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"
DOCUMENTED = ["proxopt", "proxopt_torch", "proxopt_jax", "proxopt.solvers", "proxopt.kernels", "proxopt_torch.groups"]
# modules without __all__, of which the pages show what does not start with an underscore
MODULES = ["proxopt.schedules", "proxopt.sparsity", "proxopt.updates", "proxopt.testing"]
NOT_SHOWN = {"__version__", "calls", "check_extrapolation", "start", "SCALES"} | {"proxopt.updates.zeros"}


def documented() -> set[str]:
    """The qualified names in the summaries of the API pages."""
    found = set()
    for page in API.glob("*.md"):
        module = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if start := re.match(r"\.\. currentmodule:: ([\w.]+)", line):
                module = start[1]
            elif name := re.match(r"   (\w[\w.]*)$", line):
                found.add(f"{module}.{name[1]}")
    return found


def public() -> list[str]:
    names = [f"{m}.{name}" for m in DOCUMENTED for name in importlib.import_module(m).__all__]
    for module in map(importlib.import_module, MODULES):
        own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        names += [f"{module.__name__}.{name}" for name in own if not name.startswith("_")]
    return names


@pytest.mark.parametrize("name", public())
def test_a_public_name_is_on_a_page_of_the_api(name):
    if name in NOT_SHOWN or name.rpartition(".")[2] in NOT_SHOWN:
        return
    module, _, last = name.rpartition(".")
    thing = getattr(importlib.import_module(module), last)
    if inspect.ismodule(thing):
        assert any(shown.startswith(thing.__name__ + ".") for shown in documented()), f"no page lists the names of {name}"
        return
    home = getattr(thing, "__module__", module)
    same = {f"{m}.{last}" for m in (module, home, home.rpartition(".")[0])}
    if not hasattr(thing, "__module__") or not same & documented():
        assert f"{module}.{last}" in documented(), f"add {name} to a summary in docs/api"


@pytest.mark.parametrize("name", sorted(documented()))
def test_a_name_on_a_page_of_the_api_exists(name):
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part)
        return
    pytest.fail(f"no module of {name}")


@pytest.mark.parametrize("page", page_code.pages(), ids=lambda page: str(page.relative_to(page_code.DOCS)))
def test_the_code_of_a_page_runs(page):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block, printed in page_code.run(page):
            if block.kind == "pycon":
                assert not printed, printed
            elif block.shown is not None:
                assert page_code.masked(printed) == page_code.masked(block.shown), f"{page}:{block.line}"
            else:
                assert not printed, f"{page}:{block.line} prints {printed!r}, which the page must show"


def test_pages_are_found():
    assert len(page_code.pages()) > 8


@pytest.mark.commands
@pytest.mark.parametrize("name", ["1_prox_curves", "2_path", "6_nas_bench_201", "7_recovery", "8_noise"])
def test_a_page_of_the_gallery_that_trains_nothing_runs(name, monkeypatch):
    from matplotlib import pyplot as plt

    monkeypatch.chdir(ROOT)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().canvas.draw()))
    runpy.run_path(str(ROOT / "docs" / "gallery" / f"plot_{name}.py"))
    plt.close("all")
    assert shown
