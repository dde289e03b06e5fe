"""The compiled prox of arrays equals that of the array code, for every layout, and runs only where it should."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxopt import L1, GroupL2, Groups, Nested, Penalty, Shrinkage, SparseGroupLasso, kernels, soft_threshold
from proxopt.penalties import compiled

if not kernels.available():
    pytest.skip("numba is not installed, or PROXOPT_KERNELS=0", allow_module_level=True)

METRICS = (None, "exact", "support", "median")
EPS = {"float32": 2e-6, "float64": 4e-15}


@pytest.fixture(autouse=True, scope="module")
def every_size() -> Iterator[None]:
    """The compiled loops take small arrays too, and their threads little work."""
    patch = pytest.MonkeyPatch()
    for name in ("SMALLEST", "SMALLEST_IN_METRIC"):
        patch.setattr(compiled, name, 1)
    patch.setattr(compiled, "LEAST", 16)
    yield
    patch.undo()


def both(penalty: Any, x: Any, step: Any = 1.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The prox by the compiled loops, which must run, and by the array code."""
    before = sum(kernels.calls.values())
    fast = penalty.prox(x, step)
    assert sum(kernels.calls.values()) > before
    with kernels.enabled(False):
        slow = penalty.prox(x, step)
    if not isinstance(x, list):
        fast, slow, x = [fast], [slow], [x]
    for f, own in zip(fast, x):
        assert type(f) in (type(own), type(own.data)) and f.dtype == own.dtype and f.shape == own.shape
    return [np.asarray(f) for f in fast], [np.asarray(s) for s in slow]


def check(penalty: Any, x: Any, step: Any = 1.0) -> None:
    """Equal up to rounding, with the same zeros, none of them -0."""
    arrays = [np.asarray(a).copy() for a in (x if isinstance(x, list) else [x])]
    for f, s, before in zip(*both(penalty, x, step), arrays):
        finite = np.abs(before[np.isfinite(before)])
        atol = max(EPS[f.dtype.name] * finite.max(initial=0), 2 * np.finfo(f.dtype).smallest_subnormal)
        np.testing.assert_allclose(f, s, rtol=50 * EPS[f.dtype.name], atol=atol)
        np.testing.assert_array_equal(f == 0, s == 0)
        assert not np.signbit(f[f == 0]).any()
    for a, before in zip(x if isinstance(x, list) else [x], arrays):
        np.testing.assert_array_equal(np.asarray(a), before)


# -- random layouts ---------------------------------------------------------------------------------


def some_layout(rng: np.random.Generator, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array in some order of memory, perhaps not dense, perhaps read-only."""
    order = rng.permutation(len(shape))
    gaps = rng.choice([1, 1, 2], len(shape))
    memory = rng.normal(size=[shape[a] * gaps[a] for a in order]).astype(dtype)
    x = memory.transpose(np.argsort(order))[tuple(slice(None, None, g) for g in gaps)]
    if rng.random() < 0.2:
        x = np.flip(x, int(rng.integers(len(shape))))
    if rng.random() < 0.2:
        x = np.broadcast_to(x[:1], x.shape)
    x.flags.writeable = x.flags.writeable and rng.random() < 0.8
    return x


def some_groups(rng: np.random.Generator, shape: tuple[int, ...]) -> Groups:
    kind = rng.integers(5)
    if kind == 0:
        return Groups.whole()
    if kind == 1:
        return Groups.labels(rng.integers(0, 5, shape), axis=None)
    axis = int(rng.integers(len(shape)))
    if kind == 2:
        codes = rng.integers(0, 4, shape[axis])
        return Groups.labels(np.sort(codes) if rng.random() < 0.5 else codes, axis)
    axes = rng.permutation(len(shape))[: rng.integers(1, len(shape) + 1)]
    return Groups.along(tuple(map(int, axes)))


def some_strength(rng: np.random.Generator, shape: tuple[int, ...], groups: Groups) -> Any:
    """A number, or an array that is constant in each group."""
    if groups.kind != "along" or rng.random() < 0.5:
        return float(rng.uniform(0.1, 0.5))
    axes = groups.axes(len(shape))
    return rng.uniform(0, 0.5, [1 if a - len(shape) in axes else n for a, n in enumerate(shape)])


def some_step(rng: np.random.Generator, x: np.ndarray) -> Any:
    """A number, or an array that may vary along some of the axes, in any order of memory, with some zeros."""
    if rng.random() < 0.4:
        return float(rng.uniform(0.2, 2))
    step = np.exp(rng.normal(size=x.shape)).astype(x.dtype) * (rng.random(x.shape) > 0.02)
    step = np.asfortranarray(step) if rng.random() < 0.5 else step
    return step[(slice(None, 1),) * int(rng.integers(x.ndim)) + (slice(None),)]


def beside(x: Any, library: str) -> Any:
    """NumPy arrays in a library, in the same layout."""
    if library == "numpy" or not isinstance(x, np.ndarray):
        return x
    torch = pytest.importorskip("torch")
    x = x if x.flags.writeable else x.copy(order="K")
    return torch.from_numpy(x if min((0, *x.strides)) >= 0 else x.copy())


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), library=st.sampled_from(["numpy", "torch"]), dtype=st.sampled_from([np.float32, float]))
def test_any_layout_groups_steps_and_metric(seed, library, dtype):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, rng.integers(1, 5)))
    x = some_layout(rng, shape, dtype)
    step = some_step(rng, x)
    groups, metric = some_groups(rng, shape), METRICS[rng.integers(4)]
    weights = ["sqrt_size", "inverse_sqrt_size", "none"][rng.integers(3)]
    strength = some_strength(rng, shape, groups)
    penalties = [L1(float(rng.uniform(0.1, 1))), L1(rng.uniform(0, 1, shape[-1:]))]
    penalties += [GroupL2(strength, groups, weights, metric), SparseGroupLasso(strength, 0.4, groups, weights, metric)]
    for penalty in penalties:
        check(penalty, beside(x, library), beside(step, library))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), library=st.sampled_from(["numpy", "torch"]), dtype=st.sampled_from([np.float32, float]))
def test_groups_across_arrays(seed, library, dtype):
    rng = np.random.default_rng(seed)
    shapes = [tuple(rng.integers(1, 6, rng.integers(1, 4))) for _ in range(rng.integers(1, 4))]
    xs = [some_layout(rng, shape, dtype) for shape in shapes]
    labels = Groups.labels([rng.integers(0, 4, shape[0]) for shape in shapes])
    steps = [np.exp(rng.normal(size=x.shape)).astype(dtype) for x in xs]
    for groups in (Groups.whole(), labels):
        for step in (0.7, [beside(s, library) for s in steps]):
            metric = METRICS[rng.integers(4)]
            check(SparseGroupLasso(0.3, 0.4, groups, metric=metric), [beside(x, library) for x in xs], step)


@pytest.mark.parametrize("dtype", [np.float32, float])
def test_large_groups(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9000)).astype(dtype)
    step = np.exp(rng.normal(size=x.shape)).astype(dtype)
    for groups in (None, Groups.along(1), Groups.along(0), Groups.labels(rng.integers(0, 3, 9000), axis=1)):
        for metric in METRICS:
            check(SparseGroupLasso(0.6, groups=groups, metric=metric), x, step)
            check(SparseGroupLasso(0.6, groups=groups, metric=metric), x)


def test_weights_of_labels_and_strengths_of_groups():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5))
    codes = rng.integers(0, 6, 40)
    groups = Groups.labels(codes)
    check(GroupL2(0.3, groups, weights=rng.uniform(0, 3, len(groups.names))), x)
    check(GroupL2(rng.uniform(0, 2, 6)[codes][:, None], groups), x)
    check(GroupL2(0.3, Groups.along(1), weights=rng.uniform(0, 3, 40)), x)


# -- values at the edges ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups", [Groups.along(1), Groups.along(0), Groups.labels([0, 1, 0, 1, 2, 2]), Groups.whole()], ids=repr
)
@pytest.mark.parametrize("metric", METRICS)
def test_magnitudes_at_the_limits(groups, metric):
    rng = np.random.default_rng(0)
    for dtype, decades in ((np.float32, (-42, -30, -15, 15, 30, 37)), (float, (-310, -200, 200, 306))):
        for decade in decades:
            x = (rng.uniform(0.2, 1, (6, 6)) * 10.0**decade).astype(dtype)
            check(GroupL2(float(0.4 * 10.0**decade), groups, "none", metric), x)
            check(GroupL2(float(0.4 * 10.0**decade), groups, "none", metric), x, rng.uniform(0.5, 1, x.shape).astype(dtype))


@pytest.mark.parametrize("groups", [Groups.along(1), Groups.along(0), Groups.labels([0, 1, 0, 1, 2, 2]), None], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(groups, bad):
    x = np.random.default_rng(0).normal(size=(6, 6))
    x[2, 3] = bad
    penalty = L1(0.3) if groups is None else SparseGroupLasso(0.3, groups=groups)
    fast, slow = both(penalty, x)
    np.testing.assert_array_equal(fast, slow) if groups is None else np.testing.assert_allclose(fast, slow)


def test_steps_strengths_and_groups_of_zeros():
    x = np.random.default_rng(0).normal(size=(6, 4))
    x[2] = 0
    for groups in (Groups.along(1), Groups.along(0), Groups.labels([0, 1, 0, 1, 2, 2]), Groups.labels([0, 0, 1, 1, 1, 2])):
        for penalty in (SparseGroupLasso(0.3, groups=groups), SparseGroupLasso(0.0, groups=groups), GroupL2(0.3, groups)):
            for step in (0.0, 0.5, np.zeros_like(x), (x > 0) * 0.5):
                check(penalty, x, step)
    check(L1(0.0), x)
    check(L1(0.3), x, 0.0)
    check(L1(1e300), x.astype(np.float32), 1e300)


def test_empty_arrays():
    for shape in ((0,), (3, 0), (0, 3)):
        assert SparseGroupLasso(0.1, groups=Groups.along(0)).prox(np.zeros(shape)).shape == shape
    check(SparseGroupLasso(0.1), [np.zeros((0, 3)), np.ones(4)])
    check(SparseGroupLasso(0.1, groups=Groups.labels([[], [0, 1, 0]])), [np.zeros((0, 3)), np.ones(3)])


# -- the same interface -----------------------------------------------------------------------------


def test_the_soft_threshold_of_an_array():
    x = np.random.default_rng(0).normal(size=(6, 5))
    for threshold in (0.3, np.linspace(0, 1, 5)):
        kernels.calls.clear()
        np.testing.assert_array_equal(soft_threshold(x, threshold), L1(threshold).prox(x))
        assert kernels.calls["prox_entries"] == 2


def test_out_takes_the_result():
    x = np.random.default_rng(0).normal(size=(8, 8)).T
    expected = SparseGroupLasso(0.3).prox(x)
    out = np.empty_like(x)
    assert SparseGroupLasso(0.3).prox(x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    SparseGroupLasso(0.3).prox(x, out=x)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(
    ("penalty", "step", "message"),
    [
        (GroupL2(0.1, Groups.along(2)), 1.0, "axis of Groups.along must exist"),
        (GroupL2(0.1, Groups.labels([0, 1])), 1.0, "labels must hold one label per slice"),
        (GroupL2(np.arange(3.0), Groups.along(1)), 1.0, "strength must be constant inside each group"),
        (L1(0.1), -1.0, "step must be finite and >= 0"),
        (L1(0.1), np.array([1.0, np.nan, 1.0]), "step must be finite and >= 0"),
        (GroupL2(0.1, Groups.along(1), weights=np.ones(2)), 1.0, "weights must have the reduced shape"),
    ],
)
def test_errors_are_those_of_the_array_code(penalty, step, message):
    for flag in (True, False):
        with kernels.enabled(flag), pytest.raises(ValueError, match=message):
            penalty.prox(np.ones((4, 3)), step)


@dataclass(frozen=True, eq=False)
class OwnForm(Penalty):
    strength: float

    def shrinkage(self) -> Shrinkage:
        return Shrinkage(l2=self.strength, weights="none", groups=Groups.along(0))


@dataclass(frozen=True, eq=False)
class OwnProx(OwnForm):
    def _prox(self, xs: list, steps: list) -> list:
        return [x * 2 for x in xs]


def test_penalties_take_part_by_the_form_that_they_declare():
    x = np.random.default_rng(0).normal(size=(8, 8))
    check(OwnForm(0.4), x)
    check(Nested(L1(0.2), GroupL2(0.3, Groups.along(1))), x)
    np.testing.assert_array_equal(OwnProx(0.4).prox(x), 2 * x)


@pytest.mark.parametrize("groups", [None, Groups.along(1), Groups.along(0), Groups.labels(np.arange(60) % 7)], ids=repr)
def test_the_number_of_threads_changes_no_bit(groups):
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    x, step = torch.randn(60, 40), torch.rand(60, 40)
    penalty = L1(0.2) if groups is None else SparseGroupLasso(0.2, groups=groups)
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found += [penalty.prox(x), penalty.prox(x, step)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


# -- when the loops run -----------------------------------------------------------------------------


def test_what_torch_may_differentiate_or_trace_takes_the_array_code():
    torch = pytest.importorskip("torch")
    x = torch.randn(30, 4, requires_grad=True)
    penalty = SparseGroupLasso(0.2, groups=Groups.along(1))
    kernels.calls.clear()
    penalty.prox(x).sum().backward()
    penalty.prox(x.detach(), torch.ones(4, requires_grad=True)).sum().backward()
    L1(torch.tensor(0.1, requires_grad=True)).prox(x.detach()).sum().backward()
    torch.func.vmap(lambda row: GroupL2(0.2).prox(row))(x.detach())
    torch.func.jvp(penalty.prox, (x.detach(),), (x.detach(),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(penalty.prox(dual)).tangent is not None
    for other in (x.detach().half(), x.detach().to(torch.complex64), x.detach().to_sparse().to_dense().to("meta")):
        L1(0.1).prox(other)
    if torch.__version__ >= (2, 10):  # Dynamo of torch 2.9 does not trace a prox, with or without loops
        traced = torch.compile(penalty.prox, backend="eager", fullgraph=True)
        torch.testing.assert_close(traced(x.detach()), penalty.prox(x).detach())
    assert not kernels.calls
    with torch.no_grad():
        check(penalty, x.detach())
        assert not penalty.prox(x).requires_grad
        assert not penalty.prox(torch.nn.Parameter(x.detach())).requires_grad
    assert kernels.calls["shrink_rows"] == 3


def test_other_numbers_and_classes_of_numpy_take_the_array_code():
    kernels.calls.clear()
    for dtype in (np.float16, complex, ">f4", np.longdouble):
        assert L1(0.1).prox(np.ones(20, dtype)).dtype == dtype
    assert isinstance(L1(0.1).prox(np.ma.ones(20)), np.ndarray)
    assert L1(np.ones((2, 1))).prox(np.ones(3)).shape == (2, 3)  # a batch
    assert not kernels.calls


def test_negative_thresholds_of_tensors_take_the_array_code():
    torch = pytest.importorskip("torch")
    x = torch.randn(20)
    kernels.calls.clear()
    torch.testing.assert_close(L1(torch.tensor(-1.0)).prox(x), x)
    torch.testing.assert_close(L1(0.5).prox(x, torch.full((20,), -1.0)), x)
    assert not kernels.calls


WITHOUT = """
import sys
{}
import numpy as np
import proxopt
from proxopt import SparseGroupLasso, kernels, soft_threshold
small, large = np.ones(10), np.ones(2**16)
SparseGroupLasso(0.1).prox(small)
assert "numba" not in sys.modules or sys.modules["numba"] is None
assert SparseGroupLasso(0.01, groups=proxopt.Groups.labels(np.arange(2**16))).prox(large).shape == large.shape
print(sum(kernels.calls.values()), sys.modules.get("numba") is None)
"""


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("", "1 False"),
        ("import os; os.environ['PROXOPT_KERNELS'] = '0'", "0 True"),
        ("sys.modules['numba'] = None", "0 True"),
    ],
    ids=["with numba", "switched off", "without numba"],
)
def test_numba_is_imported_by_large_arrays_only(first, expected):
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(first)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_the_benchmark_measures_every_case(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import prox_speed

    monkeypatch.setattr(prox_speed, "keep_memory", lambda: None)
    table, picture = tmp_path / "speed.csv", tmp_path / "speed.png"
    prox_speed.main(["--library", "numpy", "--rounds", "1", "--scale", "1e-3", "--out", str(table), "--picture", str(picture)])
    rows = list(csv.DictReader(table.open()))
    assert len({row["case"] for row in rows if row["program"] == "proxopt"}) == 12
    assert picture.exists() and all(float(row["ratio"]) > 0 for row in rows)
