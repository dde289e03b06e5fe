"""Everything public says what it solves, takes, returns, raises, and where it comes from."""

from __future__ import annotations

import pytest

import proxopt_jax

FUNCTIONS = [n for n in proxopt_jax.__all__ if n not in ("ProximalState", "tree_labels")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_has_every_part(name):
    text = getattr(proxopt_jax, name).__doc__
    for part in ("Args:", "Returns:", "Raises:", "Source:", ">>> "):
        assert part in text, f"{name} lacks {part}"
    for leftover in ("SHARED", "NOTE"):
        assert leftover not in text
