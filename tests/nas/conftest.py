"""Fixtures of the tests of architecture search."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def fast_compilation() -> Iterator[None]:
    """XLA without optimisation, as compilation takes most of the time of tests in JAX."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
