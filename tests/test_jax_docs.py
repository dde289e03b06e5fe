"""Docstrings run, and everything public says what it solves, takes, returns, raises, and where it comes from."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import proxopt_jax

MODULES = ["proxopt_jax", *(f"proxopt_jax.{m.name}" for m in pkgutil.iter_modules(proxopt_jax.__path__))]
FUNCTIONS = [n for n in proxopt_jax.__all__ if n not in ("ProximalState", "tree_labels")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_has_every_part(name):
    text = getattr(proxopt_jax, name).__doc__
    for part in ("Args:", "Returns:", "Raises:", "Source:", ">>> "):
        assert part in text, f"{name} lacks {part}"
    for leftover in ("SHARED", "NOTE"):
        assert leftover not in text
