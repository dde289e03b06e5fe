"""The compiled prox of a row equals that of the array code, and its parts are right for any numbers."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from proxopt import GroupL2, kernels

if not kernels.available():
    pytest.skip("numba is not installed, or PROXOPT_KERNELS=0", allow_module_level=True)

from proxopt.kernels import jit, pool, rows

DTYPES = [np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["exact", "median", "support"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_shrinks_as_in_the_array_code(dtype, metric, scale):
    rng = np.random.default_rng(0)
    eps = np.finfo(dtype).eps
    for n in (1, 2, 7, 100, 5000):
        for spread, step in ((0.3, 1.0), (3.0, 1e-3), (0.3, 1e5)):
            x = (rng.normal(size=n) * scale).astype(dtype)
            h = (np.exp(rng.normal(size=n) * spread) * step).astype(dtype)
            edge = np.linalg.norm(x.astype(float) / h)
            for bound in (0.0, *(edge * np.array([1e-4, 0.3, 0.95, 1.05]))):
                expected = GroupL2(float(bound), weights="none", metric=metric).prox(x, h)
                row = x.copy()
                getattr(rows, f"shrink_{metric}")(row, h, float(bound))
                np.testing.assert_allclose(row, expected, rtol=100 * eps, atol=100 * eps * np.abs(x).max())
                assert ((row == 0) == (expected == 0)).all()
                assert not np.signbit(row[row == 0]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_median_is_the_mean_of_the_two_middle_entries(dtype):
    rng = np.random.default_rng(1)
    draws = [
        lambda n: np.exp(rng.normal(size=n)),
        lambda n: np.exp(20 * rng.normal(size=n)),
        lambda n: rng.integers(0, 3, n),
        lambda n: np.ones(n),
        lambda n: np.where(np.arange(n) == 0, 1e30, rng.random(n) * 1e-30),
    ]
    for n in (*range(1, 68), 128, 129, 1000, 5001):
        for draw in draws:
            h = draw(n).astype(dtype)
            ordered = np.sort(h)
            assert rows.median(h) == (ordered[(n - 1) // 2] + ordered[n // 2]) / dtype(2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_zero_keep_their_entries(dtype):
    h = np.array([0, 1, 1, 0], dtype)
    for x in ([1, 1, 1, 0], [0, 1, 1, 0], [0, 5, 1, 0]):
        row, x = np.array(x, dtype), np.array(x, dtype)
        rows.shrink_exact(row, h, 2.0)
        np.testing.assert_allclose(row, GroupL2(2.0, weights="none").prox(x, h), rtol=1e-6)


def test_sums_of_long_rows_are_right_to_a_few_units():
    x = np.random.default_rng(2).random(1_000_000).astype(np.float32)
    assert abs(rows.norm(x) / np.linalg.norm(x.astype(float)) - 1) < 2 * np.finfo(np.float32).eps


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    real = jit.njit

    def refusing(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(jit, "njit", refusing)
    double = jit.jit(lambda x: 2 * x)
    assert double(3) == 6


def test_the_switch_and_a_missing_numba(monkeypatch):
    assert kernels.available()
    with kernels.enabled(False):
        assert not kernels.available()
        with kernels.enabled():
            assert kernels.available()
    assert kernels.available()
    monkeypatch.setattr(kernels, "_has_numba", lambda: False)
    assert not kernels.available()


def test_a_numba_that_cannot_be_imported_is_done_without(tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('numba needs another NumPy')")
    code = """
import warnings
import numpy as np
from proxopt import L1, kernels
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for _ in range(2):
        assert L1(1.0).prox(np.full(100_000, 3.0)).sum() == 200_000
assert ["another NumPy" in str(w.message) for w in found] == [True]
assert not kernels.calls
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


def test_the_calling_thread_does_all_the_work_where_no_other_can_be_started(monkeypatch):
    def refuse(count):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool, "_workers", refuse)
    done = []
    pool.run(done.append, [(i,) for i in range(5)], 3)
    assert done == list(range(5))


def test_the_pool_runs_every_part_once_and_raises_the_first_error():
    done, lock = [], threading.Lock()

    def work(i):
        with lock:
            done.append(i)

    for threads in (1, 2, 3):
        done.clear()
        pool.run(work, [(i,) for i in range(20)], threads)
        assert sorted(done) == list(range(20))

    def failing(i):
        raise ValueError(f"part {i}")

    with pytest.raises(ValueError, match="part"):
        pool.run(failing, [(0,), (1,)], 2)
