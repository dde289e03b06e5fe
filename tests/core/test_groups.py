"""How arrays split into groups: order, sizes, weights, plain data, and every refusal."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import plain
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxopt import L1, GroupL2, Groups, Nested, SparseGroupLasso, penalties

X = np.arange(1.0, 13.0).reshape(4, 3)


def norms_by_weights(groups: Groups, x, count: int) -> list[float]:
    """||x_g|| of each group in the order of the weights, read from the values of penalties with a single weight."""
    return [float(GroupL2(1.0, groups, weights=np.eye(count)[i]).value(x)) for i in range(count)]


# -- order and sizes --------------------------------------------------------------------------


def test_names_stand_in_order_of_first_occurrence():
    assert Groups.labels(["b", "a", "b", "c"]).names == ("b", "a", "c")
    assert Groups.labels([7, -2, 7, 0]).names == (7, -2, 0)
    assert Groups.labels([[3, 1], [2, 3]]).names == (3, 1, 2)
    assert Groups.labels(np.array([[3, 1], [2, 3]]), axis=None).names == (3, 1, 2)


def test_names_are_plain_ints_and_strings():
    assert all(type(n) is int for n in Groups.labels(np.array([2, 1], dtype=np.int16)).names)
    assert all(type(n) is str for n in Groups.labels(np.array(["a", "b"])).names)


def test_weights_of_labels_follow_the_names():
    groups = Groups.labels(["b", "a", "b", "c"])
    expected = [np.linalg.norm(X[[0, 2]]), np.linalg.norm(X[1]), np.linalg.norm(X[3])]
    np.testing.assert_allclose(norms_by_weights(groups, X, 3), expected)


def test_weights_of_along_have_the_reduced_shape():
    weights = np.array([[0.5, 1.0, 0.0]])
    x = X.reshape(1, 4, 3)
    expected = np.sum(weights * np.linalg.norm(x, axis=1))
    assert np.isclose(GroupL2(1.0, Groups.along(1), weights).value(x), expected)
    assert np.isclose(GroupL2(1.0, Groups.along(1), weights[0]).value(x), expected)
    assert np.isclose(GroupL2(1.0, Groups.along((0, 1)), [0.5, 1.0, 0.0]).value(x), expected)


def test_a_zero_weight_frees_its_group():
    p = GroupL2(100.0, Groups.along(0), weights=np.array([1.0, 0.0, 1.0])).prox(X)
    np.testing.assert_array_equal(p[:, 1], X[:, 1])
    assert not p[:, [0, 2]].any()


@given(labels=st.lists(st.integers(-2, 3), min_size=1, max_size=8), width=st.integers(1, 3), axis=st.sampled_from([0, 1, -1]))
def test_ragged_labels_are_the_sets_that_a_loop_collects(labels, width, axis):
    shape = (len(labels), width) if axis == 0 else (width, len(labels))
    groups, sets = Groups.labels(labels, axis), plain.labelled([labels], axis, (shape,))
    x = np.random.default_rng(0).normal(size=shape)
    assert groups.count([x]) == len(sets)
    sizes = np.broadcast_to(groups.sizes([x]), len(sets))
    np.testing.assert_array_equal(sizes, [len(s) for s in sets])
    np.testing.assert_allclose(groups.total([x]), [x.ravel()[s].sum() for s in sets], atol=1e-14)
    np.testing.assert_allclose(groups.largest([abs(x)]), [abs(x).ravel()[s].max() for s in sets])
    np.testing.assert_allclose(groups.median([x]), [np.median(x.ravel()[s]) for s in sets])


@given(st.data())
def test_labels_that_span_arrays_are_the_sets_that_a_loop_collects(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4))
    labels = [data.draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n)) for n, _ in shapes]
    groups, sets = Groups.labels(labels), plain.labelled(labels, 0, shapes)
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=s) for s in shapes]
    flat = plain.vector(xs)
    np.testing.assert_array_equal(np.broadcast_to(groups.sizes(xs), len(sets)), [len(s) for s in sets])
    np.testing.assert_allclose(groups.total(xs), [flat[s].sum() for s in sets], atol=1e-14)
    np.testing.assert_allclose(groups.median(xs), [np.median(flat[s]) for s in sets])


def test_each_array_of_a_list_may_have_its_own_axis():
    x = [X, X.T.copy()]
    groups = Groups.labels([[0, 1, 0, 2], [2, 1, 1, 0]], axis=(0, 1))
    sets = [np.r_[X[[0, 2]].ravel(), X[3]], np.r_[X[1], X[1], X[2]], np.r_[X[3], X[0]]]
    np.testing.assert_allclose(norms_by_weights(groups, x, 3), [np.linalg.norm(s) for s in sets])


def test_one_array_in_a_list_is_one_array():
    for groups in (Groups.labels([[0, 1, 0, 2]]), Groups.labels([0, 1, 0, 2])):
        np.testing.assert_array_equal(GroupL2(1.0, groups).prox([X])[0], GroupL2(1.0, groups).prox(X))
    grid = np.arange(12).reshape(4, 3) % 5
    np.testing.assert_array_equal(
        GroupL2(1.0, Groups.labels([grid], axis=None)).prox([X])[0], GroupL2(1.0, Groups.labels(grid, axis=None)).prox(X)
    )


def test_equal_shapes_in_a_list_are_not_mistaken_for_one_array():
    x = [X[0], X[1]]
    by_entry = Groups.labels([[0, 1, 2], [2, 1, 0]], axis=None)
    by_slice = Groups.labels([[0, 1, 2], [2, 1, 0]])
    for groups in (by_entry, by_slice):
        np.testing.assert_allclose(norms_by_weights(groups, x, 3), np.hypot(X[0], X[1][::-1]))


def test_a_tuple_of_arrays_comes_back_as_a_tuple():
    assert isinstance(GroupL2(1.0).prox((X, X)), tuple)
    assert isinstance(GroupL2(1.0).prox([X, X]), list)


@pytest.mark.parametrize("kind", [list, tuple, np.array, "torch", "jax"])
def test_labels_come_as_sequences_arrays_or_tensors(kind):
    values = [3, 1, 3, 0]
    if isinstance(kind, str):
        module = pytest.importorskip(kind)
        labels = module.tensor(values) if kind == "torch" else module.numpy.asarray(values)
    else:
        labels = kind(values)
    assert Groups.labels(labels) == Groups.labels(values)
    assert Groups.labels([labels, labels]) == Groups.labels([values, values])


# -- plain data -------------------------------------------------------------------------------

EVERY = [
    Groups.whole(),
    Groups.along(0),
    Groups.along(-1),
    Groups.along((0, -1)),
    Groups.labels([3, 1, 3]),
    Groups.labels(["x", "y", "x"], axis=1),
    Groups.labels([["x", "y"], ["y"]]),
    Groups.labels([["x", "y"], ["y", "z"]], axis=(0, 1)),
    Groups.labels([[1, 2], [2, 3]], axis=None),
    Groups.labels(np.array([[1, 2], [2, 3]]), axis=None),
    Groups.labels(np.arange(24).reshape(2, 3, 4) % 5, axis=None),
]


@pytest.mark.parametrize("groups", EVERY, ids=repr)
def test_groups_survive_plain_data_json_pickle_and_deepcopy(groups):
    data = json.loads(json.dumps(groups.to_dict()))
    for twin in (Groups.from_dict(data), pickle.loads(pickle.dumps(groups)), copy.deepcopy(groups)):
        assert twin == groups and hash(twin) == hash(groups) and repr(twin) == repr(groups)
        assert twin.to_dict() == groups.to_dict()


def test_different_groups_are_not_equal():
    for i, a in enumerate(EVERY):
        for j, b in enumerate(EVERY):
            alike = {i, j} == {8, 9}  # two ways to write the same labels
            assert (a == b) == (i == j or alike)
    assert Groups.whole() != "whole"


ALL = [
    L1(0.3),
    GroupL2(0.3, Groups.along(0), weights=np.array([1.0, 2.0, 0.5]), metric="median"),
    SparseGroupLasso(0.3, 0.25, Groups.labels([0, 1, 0, 2])),
    Nested(L1(0.1), GroupL2(0.2, Groups.along(1)), GroupL2(np.array(0.1), weights="none"), strength=0.3),
    Nested(L1(np.array([1.0, 0.0, 2.0])), GroupL2(0.2), strength=0.3),
]


@pytest.mark.parametrize("penalty", ALL, ids=repr)
def test_penalties_survive_plain_data_json_pickle_and_deepcopy(penalty):
    data = json.loads(json.dumps(penalty.to_dict()))
    for twin in (penalties.from_dict(data, 0.3), pickle.loads(pickle.dumps(penalty)), copy.deepcopy(penalty)):
        assert twin == penalty and hash(twin) == hash(penalty)
        np.testing.assert_array_equal(twin.prox(X), penalty.prox(X))
        assert twin.value(X) == penalty.value(X)
    assert penalty.with_strength(0.4) != penalty
    assert penalty != "penalty"


# -- refusals ---------------------------------------------------------------------------------

REFUSED = {
    "too few labels": (lambda: GroupL2(1.0, Groups.labels([0, 1, 0])).prox(X), r"labels must hold one label .* of x, 4, got 3"),
    "too many labels": (
        lambda: GroupL2(1.0, Groups.labels([0, 1, 0, 1], 1)).value(X),
        r"labels must hold .* axis 1 of x, 3, got 4",
    ),
    "labels in a list": (
        lambda: GroupL2(1.0, Groups.labels([[0, 1, 0, 1], [0]])).prox([X, X]),
        r"labels must hold .* of x\[1\], 4, got 1",
    ),
    "labels of another shape": (
        lambda: GroupL2(1.0, Groups.labels(np.zeros((3, 4), int), None)).prox(X),
        r"labels with axis=None must have the shape of x, \(4, 3\), got \(3, 4\)",
    ),
    "one labelling for two arrays": (
        lambda: GroupL2(1.0, Groups.labels([0, 1, 0, 1])).prox([X, X]),
        r"labels must come as one sequence per array, 2, got 1",
    ),
    "two labellings for one array": (
        lambda: GroupL2(1.0, Groups.labels([[0, 1, 0, 1], [0, 1, 2]])).prox(X),
        r"labels must come as one sequence per array, 1, got 2",
    ),
    "two axes for three arrays": (
        lambda: GroupL2(1.0, Groups.labels([[0] * 4] * 3, (0, 0))).prox([X, X, X]),
        r"axis of the labels must name one axis per array, 3, got 2",
    ),
    "unknown labelled axis": (lambda: GroupL2(1.0, Groups.labels([0], 2)).prox(X), r"axis of the labels must exist in x .*got 2"),
    "along on a list": (lambda: GroupL2(1.0, Groups.along(0)).prox([X, X]), r"Groups.along\(0\) .* list of 2: use labels"),
    "unknown axis": (lambda: GroupL2(1.0, Groups.along(2)).prox(X), r"axis of Groups.along must exist in x with 2 axes, got 2"),
    "the same axis twice": (lambda: GroupL2(1.0, Groups.along((1, -1))).prox(X), r"must name each axis once, got \(1, -1\)"),
    "weights of another shape": (
        lambda: GroupL2(1.0, Groups.along(0), np.ones(4)).prox(X),
        r"weights must have the reduced shape \(3,\), got \(4,\)",
    ),
    "a weight too many": (
        lambda: GroupL2(1.0, Groups.labels([0, 1, 0, 1]), np.ones(3)).prox(X),
        r"weights must hold one number per group, 2, got shape \(3,\)",
    ),
    "weights of the whole": (lambda: GroupL2(1.0, None, np.ones(3)).prox(X), r"weights must be one number .*got shape \(3,\)"),
    "strength inside along": (
        lambda: GroupL2(np.arange(4.0).reshape(4, 1), Groups.along(0)).prox(X),
        r"strength must be constant inside each group \(axis -2\), got shape \(4, 1\)",
    ),
    "strength inside labels": (
        lambda: SparseGroupLasso(np.arange(4.0).reshape(4, 1), 0.5, Groups.labels([0, 0, 1, 1])).prox(X),
        r"strength must be constant inside each group",
    ),
    "strength inside the whole": (lambda: GroupL2(np.arange(3.0)).value(X), r"strength must be constant inside each group"),
    "strength inside nested": (
        lambda: Nested(GroupL2(1.0, Groups.along(0)), strength=np.arange(4.0).reshape(4, 1)).prox(X),
        r"strength must be constant inside each group",
    ),
    "strengths for a list": (lambda: GroupL2(np.ones(3)).prox([X, X]), r"strength must be one number for a list of arrays"),
    "strength of another shape": (
        lambda: L1(np.ones(4)).prox(X),
        r"strength must broadcast against x of shape \(4, 3\), got .*\(4,\)",
    ),
    "a batch of labels": (
        lambda: SparseGroupLasso(np.ones((4, 1, 1)), 0.5, Groups.labels([0, 1, 2, 3])).prox(X),
        r"strength of shape \(4, 1, 1\) must broadcast to x of shape \(4, 3\)",
    ),
    "a batch of wholes": (
        lambda: Nested(L1(np.ones((2, 1, 1))), GroupL2(1.0)).prox(X),
        r"strength must not repeat the entries of a group.*\(2, 1, 1\)",
    ),
    "a batch of steps on labels": (
        lambda: GroupL2(1.0, Groups.labels([0, 1, 2, 3])).prox(X, np.ones((4, 1, 1))),
        r"step must not repeat the entries of a group: x has shape \(4, 3\), got step of shape \(4, 1, 1\)",
    ),
    "a step that widens a group": (
        lambda: GroupL2(1.0, Groups.along(0)).prox(X[:1], np.ones((4, 3))),
        r"step must not repeat the entries of a group",
    ),
    "not nested": (
        lambda: Nested(GroupL2(1.0, Groups.along(0)), GroupL2(1.0, Groups.along(1))).prox(X),
        r"groups must be nested, leaves first: Groups.along\(0\) does not lie inside Groups.along\(1\)",
    ),
    "labels not nested": (
        lambda: Nested(GroupL2(1.0, Groups.labels([0, 0, 1, 1])), GroupL2(1.0, Groups.labels([0, 1, 1, 1]))).value(X),
        r"groups must be nested",
    ),
    "float labels": (lambda: Groups.labels([0.5, 1.0]), r"labels must be ints or strings, got float64"),
    "mixed labels": (lambda: Groups.labels([1, "a"]), r"labels must be all ints or all strings, got both"),
    "mixed labels in a list": (lambda: Groups.labels([[1, 2], ["a"]]), r"labels must be all ints or all strings, got both"),
    "no axis": (lambda: Groups.along(()), r"axis must be an int or a tuple of ints, got \(\)"),
    "axis as float": (lambda: Groups.along(0.5), r"axis must be an int or a tuple of ints, got 0.5"),
    "axis as string": (lambda: Groups.labels([0, 1], "rows"), r"axis must be an int, one int per array, or None, got 'rows'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name_value_and_domain(name):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_levels_that_are_nested_are_accepted():
    pairs = [
        (Groups.along(0), Groups.along((0, 1))),
        (Groups.labels([0, 0, 1, 2]), Groups.labels(["a", "a", "a", "b"])),
        (Groups.along(1), Groups.labels([0, 0, 1, 2])),
        (Groups.labels(np.arange(12).reshape(4, 3), None), Groups.along(0)),
        (Groups.labels([0, 1, 2]), Groups.whole()),
    ]
    for inner, outer in pairs[:-1]:
        assert Nested(GroupL2(1.0, inner), GroupL2(1.0, outer)).prox(X).shape == X.shape
    assert Nested(GroupL2(1.0, pairs[-1][0]), GroupL2(1.0)).prox(X[:3]).shape == (3, 3)


def test_a_numpy_strength_that_is_constant_in_each_label_serves_every_library(library):
    strength = np.array([[0.1], [0.3], [0.1], [0.2]])
    penalty = SparseGroupLasso(strength, 0.5, Groups.labels([0, 1, 0, 2]))
    np.testing.assert_allclose(library.take(penalty.prox(library.give(X))), penalty.prox(X))
