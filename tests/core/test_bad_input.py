"""Bad input meets an error that names the argument, the value and the domain, and leaves x as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, SparseGroupLasso, penalties, soft_threshold, updates

X = np.ones((4, 3))
KINDS = {
    "L1": L1,
    "ElasticNet": ElasticNet,
    "GroupL2": GroupL2,
    "SparseGroupLasso": SparseGroupLasso,
    "Nested": lambda strength: Nested(L1(1.0), strength=strength),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize(
    "strength", [-1.0, -1, math.nan, math.inf, -math.inf, np.float32(-1), np.array([0.1, -1.0, 0.2])], ids=repr
)
def test_a_strength_is_finite_and_not_negative(kind, strength):
    worst = -1.0 if isinstance(strength, np.ndarray) else float(strength)
    with pytest.raises(ValueError, match=f"strength must be finite and >= 0, got {worst}"):
        KINDS[kind](strength)
    with pytest.raises(ValueError, match="strength must be finite"):
        KINDS[kind](0.1).with_strength(strength)


@every_kind
@pytest.mark.parametrize("strength", [None, "0.1", True, [0.1, 0.2, 0.3]], ids=repr)
def test_a_strength_is_a_number_or_an_array(kind, strength):
    with pytest.raises(TypeError, match="strength must be a number"):
        KINDS[kind](strength)


@pytest.mark.parametrize("l1_ratio", [-0.1, 1.1, math.nan, math.inf, 50])
def test_l1_ratio_lies_in_0_1(l1_ratio):
    for kind in (ElasticNet, SparseGroupLasso):
        with pytest.raises(ValueError, match=rf"l1_ratio must lie in \[0, 1\], got {l1_ratio:g}"):
            kind(1.0, l1_ratio=l1_ratio)


@every_kind
@pytest.mark.parametrize("step", [-0.1, math.nan, math.inf, np.float64(-1), np.full((4, 3), -0.1), np.full(3, math.nan)], ids=str)
def test_a_step_is_finite_and_not_negative(kind, step):
    with pytest.raises(ValueError, match=r"step must be finite and >= 0, got (-|nan|inf)"):
        KINDS[kind](0.1).prox(X, step)


@every_kind
@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (None, TypeError, "step must be a number, got None"),
        ("auto", TypeError, "step must be a number, got 'auto'"),
        (np.ones(4), ValueError, r"step must broadcast against x of shape \(4, 3\), got shape \(4,\)"),
        ([0.1, 0.2], ValueError, "step must be a number or one entry per array, 1, got 2"),
    ],
)
def test_a_step_fits_x(kind, step, error, message):
    with pytest.raises(error, match=message):
        KINDS[kind](0.1).prox(X, step)


@every_kind
@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, bool])
def test_an_integer_array_is_refused(kind, dtype):
    penalty, x = KINDS[kind](0.1), np.ones((2, 3), dtype)
    for call in (penalty.prox, penalty.value, soft_threshold_by_1):
        with pytest.raises(TypeError, match=f"x must be a floating-point array, got {np.dtype(dtype).name}"):
            call(x)
    with pytest.raises(TypeError, match=r"x\[1\] must be a floating-point array"):
        penalty.prox([X, x])


def soft_threshold_by_1(x):
    return soft_threshold(x, 1.0)


def test_an_integer_array_of_any_library_is_refused(library):
    with pytest.raises(TypeError, match=r"x must be a floating-point array, got .*int"):
        L1(0.1).prox(library.give(np.arange(3)))


@every_kind
@pytest.mark.parametrize("x", [None, 1.0, "x", {"a": X}, object()], ids=lambda x: type(x).__name__)
def test_what_is_no_array_is_refused(kind, x):
    with pytest.raises(TypeError, match=r"x must be an array or a list of arrays, got \w+"):
        KINDS[kind](0.1).prox(x)
    with pytest.raises(ValueError, match="x must hold at least one array, got an empty list"):
        KINDS[kind](0.1).value([])


@pytest.mark.parametrize("kind", [GroupL2, SparseGroupLasso])
@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("metric", "mean", ValueError, "metric must be one of None, 'exact', 'median', 'support', got 'mean'"),
        ("metric", 1, ValueError, "metric must be one of .*, got 1"),
        ("weights", "size", ValueError, "weights must be one of 'sqrt_size', 'inverse_sqrt_size', 'none', got 'size'"),
        ("weights", -1.0, ValueError, "weights must be finite and >= 0, got -1.0"),
        ("weights", [1.0, -2.0], ValueError, "weights must be finite and >= 0, got -2.0"),
        ("weights", np.array([1.0, np.nan]), ValueError, "weights must be finite and >= 0, got nan"),
        ("weights", None, TypeError, "weights must be a number, got None"),
        ("groups", 0, TypeError, "groups must be a Groups or None, got 0"),
        ("groups", "rows", TypeError, "groups must be a Groups or None, got 'rows'"),
    ],
)
def test_group_options_come_from_their_domains(kind, option, value, error, message):
    with pytest.raises(error, match=message):
        kind(1.0, **{option: value})


def test_nested_takes_leaves_first():
    with pytest.raises(ValueError, match="penalties must hold at least one level, got none"):
        Nested()
    with pytest.raises(TypeError, match=r"penalties\[1\] must be radial, as every level but the first, got SparseGroupLasso"):
        Nested(L1(1.0), SparseGroupLasso(1.0))
    with pytest.raises(ValueError, match=r"L1 must come first: .* got it as level 1"):
        Nested(GroupL2(1.0), L1(1.0))


def test_an_unknown_kind_of_penalty_is_refused():
    with pytest.raises(ValueError, match=r"penalty kind must be one of 'L1', .*, got 'Lasso'"):
        penalties.from_dict({"kind": "Lasso"}, 0.1)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.ones((3, 4)), ValueError, r"out must have shape \(4, 3\) and dtype float64, got \(3, 4\) and float64"),
        (np.ones((4, 3), np.float32), ValueError, "out must have .* dtype float64, got .* float32"),
        (np.ones((4, 3), int), TypeError, "out must be a floating-point array, got int64"),
        ([np.ones((4, 3))] * 2, ValueError, "out must hold 1 arrays, got 2"),
        ("here", TypeError, "out must be an array or a list of arrays, got str"),
    ],
    ids=str,
)
def test_out_fits_the_result(out, error, message):
    with pytest.raises(error, match=message):
        L1(0.1).prox(X, out=out)


def test_nothing_is_written_where_one_of_several_outs_does_not_fit():
    x = [np.ones(3), np.ones(2)]
    out = [np.zeros(3), np.zeros(3)]
    with pytest.raises(ValueError, match="out must have shape"):
        L1(0.1).prox(x, out=out)
    assert not np.any(out)


def test_out_of_a_library_without_mutation_is_refused():
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match="immutable"):
        L1(0.1).prox(jax.numpy.ones(3), out=jax.numpy.ones(3))


@pytest.mark.parametrize("threshold", [-1.0, math.nan, np.array([1.0, -1.0, 0.0])], ids=str)
def test_a_threshold_is_finite_and_not_negative(threshold):
    with pytest.raises(ValueError, match="threshold must be finite and >= 0"):
        soft_threshold(X, threshold)


@pytest.mark.parametrize("update", [updates.hapg, updates.adam_hapg])
def test_extrapolation_comes_from_its_domain(update):
    with pytest.raises(ValueError, match="extrapolation must be one of 'nesterov', 'as_printed', got 'fista'"):
        update(X, X, None, None, lr=0.1, extrapolation="fista")
    for cap in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"extrapolation must lie in \[0, 1\], got"):
            update(X, X, None, None, lr=0.1, extrapolation=cap)


def test_an_error_leaves_x_as_it_was():
    x = X.copy()
    for penalty in (GroupL2(1.0, Groups.labels([0, 1])), GroupL2(1.0, Groups.along(5)), L1(np.ones(4))):
        with pytest.raises(ValueError):
            penalty.prox(x, out=x)
    np.testing.assert_array_equal(x, X)


def test_tensors_and_tracers_are_not_read_for_a_check():
    """A negative strength in a tensor passes: reading it would stall the device."""
    torch = pytest.importorskip("torch")
    meta = torch.empty((4, 3), device="meta")  # holds no values that could be read
    for penalty in (L1(0.1), GroupL2(torch.empty((), device="meta"), Groups.labels([0, 1, 1, 0])), SparseGroupLasso(0.1)):
        assert penalty.prox(meta, torch.empty((4, 3), device="meta")).device.type == "meta"
