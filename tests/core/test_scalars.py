"""Arrays without axes, and the scalars that NumPy makes of them, are arrays like any other."""

from __future__ import annotations

import numpy as np
import pytest
from every_penalty import Log, Ridge

from proxopt import (
    L1,
    ElasticNet,
    GroupL2,
    Groups,
    Nested,
    NonNegative,
    SparseGroupLasso,
    Sphere,
    max_strength,
    soft_threshold,
    sparsity,
    updates,
)
from proxopt.solvers import fista
from proxopt.testing import check_prox

PENALTIES = [
    L1(0.3),
    ElasticNet(0.3, 0.4),
    GroupL2(0.3),
    GroupL2(0.3, Groups.whole(), metric="median"),
    SparseGroupLasso(0.3, 0.4),
    Nested(L1(0.1), GroupL2(0.2)),
    NonNegative(SparseGroupLasso(0.3)),
    Ridge(0.5),
    Log(0.1),
]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
SCALARS = (np.float64, np.float32, np.float16, np.complex64)


@every_penalty
def test_an_array_without_axes_is_one_with_a_single_entry(penalty, library):
    for number in (-2.5, 0.0, 0.1, 2.5):
        x, flat = library.give(np.array(number)), library.give(np.array([number]))
        for step in (0.0, 0.7, library.give(np.array(0.7))):
            p = penalty.prox(x, step)
            assert type(p) is type(x) and p.dtype == x.dtype and tuple(p.shape) == ()
            np.testing.assert_array_equal(library.take(p), library.take(penalty.prox(flat, step))[0])
            (of_list,) = penalty.prox([x], step)
            assert type(of_list) is type(x) and tuple(of_list.shape) == ()
        assert float(penalty.value(p)) == float(penalty.value(penalty.prox(flat, 0.7)))
    check_prox(penalty, library.give(np.array(2.5)))


@every_penalty
def test_the_prox_of_a_numpy_scalar_is_a_scalar(penalty):
    for kind in SCALARS[: 3 if isinstance(penalty, NonNegative) else 4]:
        x = kind(2.5)
        p = penalty.prox(x, 0.7)
        assert type(p) is kind and p == penalty.prox(np.array([x]), 0.7)[0]
        pair = penalty.prox([x, np.ones(2, kind)], 0.7)
        same = penalty.prox([np.array([x]), np.ones(2, kind)], 0.7)
        assert type(pair[0]) is kind
        for a, b in zip(pair, same):
            np.testing.assert_allclose(a, b, rtol=4 * np.finfo(kind).eps)
    check_prox(penalty, np.float64(2.5), np.float64(0.7))


@every_penalty
@pytest.mark.parametrize("name", ["prox_sgd", "prox_adam", "hapg", "adam_hapg"])
def test_updates_take_arrays_without_axes(name, penalty, library):
    update, ends = getattr(updates, name), []
    for make in (np.array, lambda v: np.array([v]), *([np.float64] if library.name == "numpy" else [])):
        x = start = library.give(make(2.5))
        state = None
        for _ in range(5):
            x, state = update(x, x - 1, state, penalty, lr=0.1)
        assert type(x) is type(start) and tuple(x.shape) == tuple(start.shape)
        ends.append(float(library.take(x).reshape(())))
    assert len(set(ends)) == 1


def test_what_else_takes_an_array_takes_a_scalar(library):
    array = library.give(np.array(3.0))
    for x in (array, np.float64(3.0)):
        assert float(soft_threshold(x, 1.0)) == 2.0
        assert float(Sphere(radius=2.0).project(x)) == 2.0
        assert max_strength(x, L1(1.0)) == 3.0
        assert bool(sparsity.support(x)) and sparsity.zeros(x) == 0
        for step in (None, 0.1) if library.name != "array_api_strict" else ():  # which the solvers do not take
            found = fista(lambda z: ((z - 3) ** 2, 2 * (z - 3)), L1(1.0), x, step=step).x
            assert tuple(found.shape) == () and float(found) == pytest.approx(2.5)
    assert type(soft_threshold(np.float32(3.0), 1.0)) is type(Sphere().project(np.float32(3.0))) is np.float32


def test_a_scalar_cannot_be_written_and_a_list_has_no_threshold():
    with pytest.raises(TypeError, match="out must be an array that can be written, got float64"):
        L1(1.0).prox(np.array(3.0), out=np.float64(0.0))
    with pytest.raises(TypeError, match=r"out\[1\] must be an array that can be written, got float64"):
        L1(1.0).prox([np.array(3.0), np.array(3.0)], out=[kept := np.array(0.0), np.float64(0.0)])
    assert kept == 0
    with pytest.raises(TypeError, match="x must be one array, got a list of 2"):
        soft_threshold([np.ones(2), np.ones(2)], 1.0)
    with pytest.raises(TypeError, match="x must be a floating-point array, got int64"):
        L1(1.0).prox(np.int64(3))
