"""Every public function has a docstring with all its parts, written where it is defined."""

from __future__ import annotations

import inspect
import re

import pytest

import proxopt_jax
from proxopt import schedules, solvers, updates

TRANSFORMATIONS = [n for n in proxopt_jax.__all__ if n not in ("ProximalState", "tree_labels")]
OTHERS = [proxopt_jax.tree_labels, updates.prox_sgd, updates.hapg, updates.prox_adam, updates.adam_hapg, updates.momentum]
OTHERS += [schedules.constant, schedules.linear, schedules.warmup, schedules.cosine, schedules.geometric]
OTHERS += [solvers.ista, solvers.fista, solvers.sparse_code, solvers.LeastSquares]


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_docstring_has_every_part(name):
    text = getattr(proxopt_jax, name).__doc__
    for part in ("Args:", "Returns:", "Raises:", "Source:", ">>> "):
        assert part in text, f"{name} lacks {part}"


@pytest.mark.parametrize("thing", [getattr(proxopt_jax, n) for n in TRANSFORMATIONS] + OTHERS, ids=lambda f: f.__name__)
def test_a_docstring_describes_every_parameter_and_has_an_example(thing):
    text = inspect.getdoc(thing)
    assert ">>> " in text
    described = set(re.findall(r"^  (\w+): ", text.partition("Args:")[2], re.MULTILINE))
    assert set(inspect.signature(thing).parameters) - described == set()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_docstring_is_the_text_in_the_source(name):
    """Editors and Sphinx read the source, so no text may be filled in at import."""
    thing = getattr(proxopt_jax, name)
    source = {line.strip() for line in inspect.getsource(thing).splitlines()}
    assert {line.strip() for line in thing.__doc__.splitlines()[1:]} <= source
