"""The smallest strength that zeroes everything: all zeros at it, a nonzero entry just below it."""

from __future__ import annotations

import numpy as np
import plain
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, SparseGroupLasso, max_strength

LABELS = [0, 1, 0, 2]
COLUMNS = Groups.along(0)
PENALTIES = [
    L1(1.0),
    ElasticNet(1.0, 0.3),
    GroupL2(5.0, COLUMNS),
    GroupL2(1.0, Groups.labels(LABELS), weights="inverse_sqrt_size"),
    SparseGroupLasso(1.0, 0.5, COLUMNS),
    SparseGroupLasso(1.0, 0.0),
    SparseGroupLasso(1.0, 1.0),
    Nested(L1(0.1), GroupL2(0.5, COLUMNS), GroupL2(0.2)),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@given(seed=st.integers(0, 2**32 - 1), decade=st.integers(-20, 20))
def test_it_is_where_the_last_entry_becomes_zero(penalty, seed, decade):
    gradient = np.random.default_rng(seed).normal(size=(4, 3)) * 10.0**decade
    found = max_strength(gradient, penalty)
    assert not penalty.with_strength(found).prox(gradient).any()
    assert penalty.with_strength(found * (1 - 1e-12)).prox(gradient).any()


DTYPES = [("numpy", "float16"), ("numpy", "float32"), ("torch", "float16"), ("torch", "bfloat16"), ("torch", "float32")]
DTYPES += [("jax", "bfloat16"), ("jax", "float32")]


@pytest.mark.parametrize("name, dtype", DTYPES)
def test_it_zeroes_in_the_dtype_of_the_gradient(name, dtype):
    module = pytest.importorskip("jax.numpy" if name == "jax" else name)
    dtype = getattr(module, dtype)
    eps = float(module.finfo(dtype).eps)
    for seed in range(1 if name == "jax" else 5):
        values = np.random.default_rng(seed).normal(size=(4, 3))
        gradient = module.tensor(values, dtype=dtype) if name == "torch" else module.asarray(values, dtype=dtype)
        for penalty in PENALTIES:
            found = max_strength(gradient, penalty)
            assert not bool((penalty.with_strength(found).prox(gradient) != 0).any())
            assert bool((penalty.with_strength(found * (1 - 8 * eps)).prox(gradient) != 0).any())


def test_a_complex_gradient_counts_by_its_modulus():
    torch = pytest.importorskip("torch")
    gradient = np.array([3 + 4j, 1j])
    assert max_strength(gradient, L1(1.0)) == max_strength(torch.tensor(gradient), L1(1.0)) == 5
    found = max_strength(torch.tensor(gradient, dtype=torch.complex64), GroupL2(1.0, weights="none"))
    assert np.isclose(found, 26**0.5, rtol=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
def test_it_has_its_closed_forms(seed):
    g = np.random.default_rng(seed).normal(size=(4, 3))
    assert np.isclose(max_strength(g, L1(1.0)), np.abs(g).max(), rtol=1e-14)
    assert np.isclose(max_strength(g, ElasticNet(1.0, 0.25)), 4 * np.abs(g).max(), rtol=1e-14)
    assert np.isclose(max_strength(g, GroupL2(1.0, COLUMNS)), np.linalg.norm(g, axis=0).max() / 2, rtol=1e-14)
    ragged = [np.linalg.norm(g.ravel()[i]) / len(i) ** 0.5 for i in plain.labelled([LABELS], 0, ((4, 3),))]
    assert np.isclose(max_strength(g, GroupL2(1.0, Groups.labels(LABELS))), max(ragged), rtol=1e-14)


def test_zero_is_a_stationary_point_from_there_on():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 12)), rng.normal(size=20)
    penalty = SparseGroupLasso(1.0, 0.5, COLUMNS)
    start = max_strength((-a.T @ b).reshape(4, 3), penalty)

    def minimum(strength):
        x = np.zeros((4, 3))
        step = 1 / np.linalg.norm(a.T @ a, 2)
        for _ in range(500):
            x = penalty.with_strength(strength).prox(x - step * (a.T @ (a @ x.ravel() - b)).reshape(4, 3), step)
        return x

    assert not minimum(start * (1 + 1e-9)).any()
    assert minimum(start * 0.99).any()


def test_it_reads_lists_and_every_library(library):
    pair = [np.array([[3.0, 0.0], [0.0, 1.0]]), np.array([4.0, 1.0])]
    joint = GroupL2(1.0, Groups.labels([[0, 1], [0, 1]]), weights="none")
    assert np.isclose(max_strength(library.give(pair), joint), 5.0)
    assert np.isclose(max_strength(library.give(pair[1]), L1(1.0)), 4.0)


def test_a_zero_gradient_needs_no_strength():
    assert max_strength(np.zeros((4, 3)), L1(1.0)) == 0
    with pytest.raises(ValueError, match="labels must hold one label"):
        max_strength(np.zeros((4, 3)), GroupL2(1.0, Groups.labels([0, 1])))


@pytest.mark.parametrize(
    ("gradient", "penalty", "message"),
    [
        (np.array([1.0, np.nan]), L1(1.0), "gradient must be finite, got nan"),
        (np.array([1.0, np.inf]), L1(1.0), "gradient must be finite, got inf"),
        (np.array([1, 2]), L1(1.0), "gradient must be a floating-point array, got int64"),
        (np.ones(2), ElasticNet(1.0, 0.0), "penalty must zero the gradient at some strength"),
        (np.ones(2), GroupL2(1.0, weights=0.0), "penalty must zero the gradient"),
        (np.ones(2), L1(np.ones(2)), r"penalty must have a number as strength, got an array of shape \(2,\)"),
    ],
)
def test_what_has_no_answer_is_refused(gradient, penalty, message):
    with pytest.raises((ValueError, TypeError), match=message):
        max_strength(gradient, penalty)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=5))
def test_it_scales_with_the_gradient(values):
    g = np.array(values)
    assume(np.abs(g).max() > 1e-300)
    scale = 2.0 ** -np.ceil(np.log2(np.abs(g).max()))
    assert np.isclose(max_strength(g, GroupL2(1.0)) * scale, max_strength(g * scale, GroupL2(1.0)), rtol=1e-9)
