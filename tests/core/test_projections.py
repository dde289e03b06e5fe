"""Sphere: groups rescaled to a radius, in every array library, and HAPG on spheres against a plain transcription."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain import GROUPS, LABELS, along, capped_hapg, labelled, sphere, vector

from proxopt import Groups, NonNegative, SparseGroupLasso, Sphere, updates

ROWS = Groups.along(1)


@pytest.mark.parametrize("case", GROUPS, ids=lambda c: c.name)
def test_every_group_has_the_radius_and_zeros_stay(case, library):
    rng = np.random.default_rng(0)
    z = rng.normal(size=sum(int(np.prod(s)) for s in case.shapes)) * (rng.random(sum(map(np.prod, case.shapes))) < 0.7)
    z[case.sets[0]] = 0
    parts = np.split(z, np.cumsum([int(np.prod(s)) for s in case.shapes])[:-1])
    arrays = [p.reshape(s) for p, s in zip(parts, case.shapes)]
    given = library.give(arrays if len(arrays) > 1 else arrays[0])
    found = library.take(Sphere(case.groups, 2.5).project(given))
    np.testing.assert_allclose(vector(found), sphere(z, case.sets, 2.5), rtol=1e-14)
    np.testing.assert_array_equal(vector(found) == 0, z == 0)


def test_no_entry_is_too_large_or_too_small():
    x = np.array([[1e300, -1e300], [5e-324, 0.0], [3e-200, 4e-200], [0.0, -0.0]])
    p = Sphere(ROWS).project(x)
    np.testing.assert_allclose(p, [[0.5**0.5, -(0.5**0.5)], [1, 0], [0.6, 0.8], [0, 0]], rtol=1e-15)
    assert not np.signbit(p[3]).any()
    np.testing.assert_array_equal(x[0], [1e300, -1e300])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_dtypes_and_strides_are_kept(dtype):
    x = torch.tensor([[3.0, 4.0], [30000.0, 40000.0]]).to(dtype).T
    p = Sphere(Groups.along(0)).project(x)
    assert p.dtype == dtype and p.shape == x.shape
    torch.testing.assert_close(p, torch.tensor([[0.6, 0.6], [0.8, 0.8]]).to(dtype), rtol=1e-2, atol=1e-3)


def test_a_group_that_is_not_finite_becomes_nan_and_the_others_do_not():
    with np.errstate(invalid="ignore"):
        p = Sphere(ROWS).project(np.array([[np.nan, 1.0], [np.inf, 1.0], [3.0, 4.0]]))
    assert np.isnan(p[0]).all() and np.isnan(p[1]).any()
    np.testing.assert_allclose(p[2], [0.6, 0.8])


def test_derivatives_are_those_of_the_normalised_vector():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Sphere(ROWS, 2.0).project, x)
    zero = torch.zeros(2, 2, requires_grad=True)
    Sphere(ROWS).project(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_empty_arrays_and_wrong_arguments():
    assert Sphere().project(np.zeros((0, 3))).shape == (0, 3)
    with pytest.raises(ValueError, match="radius must be finite and > 0, got 0"):
        Sphere(radius=0)
    for several in ([1.0, 2.0], np.array([1.0, 2.0])):
        with pytest.raises(TypeError, match="radius must be a number, got"):
            Sphere(radius=several)
    with pytest.raises(TypeError, match="groups must be a Groups or None, got 3"):
        Sphere(3)
    with pytest.raises(ValueError, match=r"axis of Groups\.along must exist in x with 1 axes, got 1"):
        Sphere(ROWS).project(np.ones(3))
    with pytest.raises(TypeError, match="x must be a floating-point array, got int64"):
        Sphere().project(np.ones(3, np.int64))
    assert Sphere() == Sphere(Groups.whole()) != Sphere(ROWS) and hash(Sphere()) == hash(Sphere(Groups.whole()))


@pytest.mark.parametrize(
    ("groups", "sets", "shape"),
    [(ROWS, along((1,), (6, 2)), (6, 2)), (Groups.labels(LABELS), labelled([LABELS], 0, ((6, 2),)), (6, 2))],
    ids=["rows", "labels"],
)
def test_hapg_on_spheres_is_the_plain_recursion(groups, sets, shape):
    rng = np.random.default_rng(0)
    start, target = rng.random(shape), rng.normal(size=shape)
    penalty, spheres = NonNegative(SparseGroupLasso(0.4, 0.5, groups, weights="none")), Sphere(groups, 2.0)
    x, state = start, updates.HAPGState(start, 0)
    for _ in range(9):
        x, state = updates.hapg(x, x - target, state, penalty, lr=0.3, extrapolation=0.4)
        x, state = spheres.project(x), state._replace(point=spheres.project(state.point))
    search, point = capped_hapg(start.ravel(), lambda z: z - target.ravel(), 9, 0.3, 0.4, 0.2, 0.2, sets, 2.0)
    np.testing.assert_allclose(x.ravel(), search, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(state.point.ravel(), point, rtol=1e-12, atol=1e-14)
    assert (point == 0).any() and ((point == 0) == (state.point.ravel() == 0)).all()
