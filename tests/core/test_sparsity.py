"""What a report prints: zeros are entries that equal 0, living groups have one that does not."""

from __future__ import annotations

import numpy as np
import plain
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain import GROUPS

from proxopt import Groups, sparsity

every_grouping = pytest.mark.parametrize("case", GROUPS, ids=lambda c: c.name)


def sparse_point(case: plain.Case, seed: int) -> tuple[np.ndarray, object]:
    """A vector with zeros and dead groups, and the same as the array or list that the groups take."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=sum(len(i) for i in case.sets)) * (rng.random(sum(len(i) for i in case.sets)) < 0.5)
    for members in case.sets:
        if rng.random() < 0.5:
            x[members] = 0
    return x, plain.Problem("", None, case.shapes).arrays(x)


@every_grouping
@given(seed=st.integers(0, 2**32 - 1))
def test_summary_counts_what_a_loop_counts(case, seed):
    vector, x = sparse_point(case, seed)
    alive = [bool(vector[members].any()) for members in case.sets]
    zeros = int(np.sum(vector == 0))
    assert sparsity.zeros(x) == zeros
    np.testing.assert_array_equal(sparsity.living_groups(x, case.groups).ravel(), alive)
    summary = sparsity.summary(x, case.groups)
    assert summary == (vector.size, zeros, len(alive), sum(alive))
    assert summary.share == zeros / vector.size
    np.testing.assert_array_equal(plain.vector(sparsity.support(x)), vector != 0)


def test_living_groups_have_the_shape_of_the_weights():
    x = np.zeros((2, 3, 4))
    x[1, 2, 0] = 1
    assert sparsity.living_groups(x, Groups.along(0)).shape == (3, 4)
    assert sparsity.living_groups(x, Groups.along((0, -1))).tolist() == [False, False, True]
    assert sparsity.living_groups(x, Groups.labels(["b", "a", "b"], axis=1)).tolist() == [True, False]
    assert sparsity.living_groups(x).tolist() == [True]


def test_reports_read_every_library(library):
    x = library.give(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]))
    assert sparsity.summary(x, Groups.along(0)) == (6, 4, 2, 1)
    assert sparsity.summary([x, x], Groups.labels([[0, 1, 2], [2, 1, 0]])) == (12, 8, 3, 3)
    assert isinstance(sparsity.support(x), np.ndarray)


def test_a_parameter_and_a_half_precision_tensor_are_read_as_they_are():
    torch = pytest.importorskip("torch")
    x = torch.nn.Parameter(torch.tensor([1e-7, 0.0, -0.0], dtype=torch.bfloat16))
    assert sparsity.zeros(x) == 2
    assert sparsity.summary(x).living == 1


def test_small_is_not_zero_and_nan_is_alive():
    x = np.array([5e-324, np.nan, -0.0, 0.0])
    assert sparsity.zeros(x) == 2
    assert sparsity.living_groups(x, Groups.labels([0, 1, 2, 2])).tolist() == [True, True, False]


def test_empty_arrays_have_no_zeros_and_no_living_groups():
    assert sparsity.summary(np.zeros((0, 3)), Groups.along(0)) == (0, 0, 3, 0)
    assert sparsity.summary(np.zeros((0, 3))).share == 0
    assert sparsity.living_groups(np.zeros((3, 0)), Groups.along(1)).tolist() == [False] * 3
