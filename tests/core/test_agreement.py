"""One implementation, four libraries, eager and compiled: the same numbers and the same gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import plain
import pytest
from plain import PROBLEMS, Problem

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, SparseGroupLasso, updates

NAMES = (
    "L1 broadcast",
    "ElasticNet",
    "GroupL2 along 0 sqrt_size",
    "GroupL2 labels, weights",
    "SparseGroupLasso along (0, -1)",
    "SparseGroupLasso joint",
    "SparseGroupLasso batch of strengths",
    "Nested three levels",
)
SOME = [next(p for p in PROBLEMS if p.name == name) for name in NAMES]
some_problem = pytest.mark.parametrize("problem", SOME, ids=lambda p: p.name)


def point_and_steps(problem: Problem, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """A point with dead and living groups and a few zeros, and a step per entry."""
    rng = np.random.default_rng(11)
    x, steps = rng.normal(size=problem.size), np.exp(rng.normal(size=problem.size))
    x[rng.random(problem.size) < 0.2] = 0
    x[problem.sets()[0]] *= 1e-3
    x[problem.sets()[-1]] *= 3
    return x.astype(dtype), steps.astype(dtype)


def cases(problem: Problem, steps: Any, metrics: tuple = ("exact", "median", "support")):
    """Penalties in each metric, each with a number and with an array as step; nested groups take an array only in `median`."""
    for metric in metrics if problem.levels else ("exact",):
        penalty = problem.penalty.with_metric(metric)
        yield penalty, 0.3
        if not (isinstance(penalty, Nested) and metric == "exact"):
            yield penalty, steps


def shaped(problem: Problem, v: Any) -> Any:
    """`problem.arrays` for a torch or JAX vector, with its graph."""
    ends = np.cumsum([0] + [int(np.prod(s)) for s in problem.shapes])
    parts = [v[int(a) : int(b)].reshape(s) for a, b, s in zip(ends, ends[1:], problem.shapes)]
    return parts[0] if len(parts) == 1 else parts


def close(found: Any, expected: Any, dtype: Any = np.float64) -> None:
    double = {"rtol": 1e-12, "atol": 1e-14}
    single = {"rtol": 2e-6, "atol": 2e-7}
    np.testing.assert_allclose(plain.vector(found), plain.vector(expected), **double if dtype == np.float64 else single)


# -- the same numbers -------------------------------------------------------------------------


@some_problem
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("library", ["torch", "array_api_strict"], indirect=True)
def test_every_library_gives_the_numbers_of_numpy(problem, dtype, library):
    x, steps = (problem.arrays(v) for v in point_and_steps(problem, dtype))
    for (penalty, step), (_, given_step) in zip(cases(problem, steps), cases(problem, library.give(steps))):
        found = library.take(penalty.prox(library.give(x), given_step))
        close(found, penalty.prox(x, step), dtype)
        assert all(a.dtype == dtype for a in (found if isinstance(found, list) else [found]))
        close(library.take(penalty.value(library.give(x))), penalty.value(x), dtype)


@some_problem
@pytest.mark.parametrize("library", ["jax"], indirect=True)
def test_jit_gives_the_numbers_of_numpy(problem, library):
    import jax

    x, steps = (problem.arrays(v) for v in point_and_steps(problem))
    for penalty, step in cases(problem, steps, metrics=("exact", "median")):
        both = jax.jit(lambda x, step, penalty=penalty: (penalty.prox(x, step), penalty.value(x)))
        found = both(library.give(x), library.give(step))
        close(library.take(found[0]), penalty.prox(x, step))
        close(library.take(found[1]), penalty.value(x))


@pytest.mark.parametrize("library", ["jax"], indirect=True)
@pytest.mark.parametrize("dtype", [np.float32])
def test_jax_without_jit_gives_the_numbers_of_numpy(library, dtype):
    problem = next(p for p in SOME if p.name == "SparseGroupLasso joint")
    x, steps = (problem.arrays(v) for v in point_and_steps(problem, dtype))
    for penalty, step in cases(problem, steps, metrics=("exact",)):
        found = library.take(penalty.prox(library.give(x), library.give(step)))
        close(found, penalty.prox(x, step), dtype)
        assert all(a.dtype == dtype for a in found)


@pytest.mark.commands
@some_problem
def test_torch_compile_gives_the_eager_numbers_in_one_graph(problem):
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    x, steps = (shaped(problem, torch.from_numpy(v)) for v in point_and_steps(problem))
    for penalty, step in cases(problem, steps, metrics=("exact", "median")):
        compiled = torch.compile(lambda x, step, penalty=penalty: penalty.prox(x, step), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, step), penalty.prox(x, step), rtol=0, atol=0)


@pytest.mark.parametrize("library", ["torch"], indirect=True)
def test_a_learning_rate_that_changes_keeps_the_one_graph(library):
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        pytest.skip("torch before 2.10 cannot trace a prox without graph breaks")
    torch._dynamo.reset()
    x = library.give(np.random.default_rng(0).normal(size=(4, 3)))
    penalty = SparseGroupLasso(0.3, 0.5, Groups.labels([0, 1, 1, 2]))
    compiled = torch.compile(lambda x, lr: penalty.prox(x, lr), backend="eager", fullgraph=True)
    for lr in (0.1, 0.2, 0.3, 0.7):
        torch.testing.assert_close(compiled(x, lr), penalty.prox(x, lr), rtol=0, atol=0)


BATCHED = {
    "L1": lambda s: L1(s),
    "ElasticNet": lambda s: ElasticNet(s, 0.5),
    "GroupL2 whole": lambda s: GroupL2(s),
    "GroupL2 labels": lambda s: GroupL2(s, Groups.labels([0, 1, 0, 2])),
    "SparseGroupLasso labels": lambda s: SparseGroupLasso(s, 0.3, Groups.labels([0, 1, 0, 2])),
    "Nested": lambda s: Nested(L1(0.1), GroupL2(0.2, Groups.along(1)), GroupL2(0.1), strength=s),
}


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("step", ["number", "array", "median"])
def test_vmap_solves_one_problem_per_strength(name, step, autograd_library):
    rng = np.random.default_rng(0)
    x, strengths, steps = rng.normal(size=(3, 4, 3)), np.array([0.0, 0.2, 0.9]), rng.uniform(0.1, 1, (3, 4, 3))
    if name == "Nested" and step == "array":
        pytest.skip("two group levels have no exact prox in a diagonal metric")
    steps = np.full(3, 0.4) if step == "number" else steps
    solve = lambda x, s, step: BATCHED[name](s).with_metric(metric).prox(x, step)
    metric = "median" if step == "median" else "exact"
    if autograd_library.name == "torch":
        import torch

        many = torch.func.vmap(solve)
    else:
        import jax

        many = jax.jit(jax.vmap(solve))
    found = autograd_library.take(many(*autograd_library.give([x, strengths, steps])))
    close(found, np.stack([solve(*args) for args in zip(x, strengths.tolist(), steps)]))


# -- the same gradients -----------------------------------------------------------------------


@some_problem
def test_torch_gradients_are_those_of_finite_differences(problem):
    torch = pytest.importorskip("torch")
    x, steps = (torch.from_numpy(v).requires_grad_() for v in point_and_steps(problem))
    vector = lambda p: torch.cat([a.reshape(-1) for a in (p if isinstance(p, list) else [p])])
    for metric in ("exact", "median", "support") if problem.levels else ("exact",):
        penalty = problem.penalty.with_metric(metric)
        number = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, s, p=penalty: vector(p.prox(shaped(problem, x), s)), (x, number), atol=1e-6)
        if not (isinstance(penalty, Nested) and metric == "exact"):
            joint = lambda x, s, p=penalty: vector(p.prox(shaped(problem, x), shaped(problem, s)))
            assert torch.autograd.gradcheck(joint, (x, steps), atol=1e-6)
        torch.autograd.gradcheck(lambda x, p=penalty: p.value(shaped(problem, x)), (nonzero(x),), atol=1e-6)


def nonzero(x: Any) -> Any:
    """x moved off the kink of the norms, where finite differences see the two sides."""
    return (x.detach() + 0.1 * (x.detach() == 0)).requires_grad_()


@some_problem
@pytest.mark.parametrize("autograd_library", ["jax"], indirect=True)
def test_jax_gradients_are_those_of_torch(problem, autograd_library):
    import jax

    torch = pytest.importorskip("torch")
    x, steps = point_and_steps(problem)
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=shape) for shape in problem.shapes]

    def loss(x, step, penalty, total):
        parts = penalty.prox(shaped(problem, x), shaped(problem, step) if step.ndim else step)
        parts = parts if isinstance(parts, list) else [parts]
        return sum(total(p * w) for p, w in zip(parts, weights_like))

    for penalty, step in cases(problem, steps, metrics=("exact",)):
        step = np.asarray(step)
        weights_like = autograd_library.give(weights)
        found = jax.jit(jax.grad(lambda x, s, p=penalty: loss(x, s, p, jax.numpy.sum), (0, 1)))(*autograd_library.give([x, step]))
        leaves = [torch.from_numpy(np.array(v)).requires_grad_() for v in (x, step)]
        weights_like = [torch.from_numpy(w) for w in weights]
        loss(*leaves, penalty, torch.sum).backward()
        for a, b in zip(found, leaves):
            np.testing.assert_allclose(np.asarray(a), b.grad.numpy(), rtol=1e-9, atol=1e-12)


def jacobian(library: Any, f: Any, x: np.ndarray) -> np.ndarray:
    if library.name == "torch":
        import torch

        return torch.autograd.functional.jacobian(f, library.give(x)).reshape(x.size, x.size).numpy()
    import jax

    return np.asarray(jax.jit(jax.jacrev(f))(library.give(x))).reshape(x.size, x.size)


AT_ZERO = {
    "L1": lambda s: L1(s),
    "ElasticNet": lambda s: ElasticNet(s, 0.3),
    "GroupL2 along": lambda s: GroupL2(s, Groups.along(1)),
    "GroupL2 labels": lambda s: GroupL2(s, Groups.labels([0, 1, 1])),
    "SparseGroupLasso": lambda s: SparseGroupLasso(s, 0.5, Groups.along(1)),
    "Nested": lambda s: Nested(L1(s), GroupL2(s, Groups.along(1)), GroupL2(s)),
}


WITH_ZEROS = np.array([[0.0, 0.0], [1.0, -2.0], [0.0, 3.0]])
at_zero = pytest.mark.parametrize("name", AT_ZERO)


@at_zero
def test_gradients_at_zero_groups_are_finite(name, autograd_library):
    everywhere = () if name == "Nested" else (autograd_library.give(np.ones((3, 2))),)
    for step in (0.5, *everywhere):
        slopes = jacobian(autograd_library, lambda x, step=step: AT_ZERO[name](0.1).prox(x, step), WITH_ZEROS)
        assert np.isfinite(slopes).all()
        assert not slopes[:2].any()  # a dead entry does not move


@at_zero
def test_gradients_at_threshold_0_are_the_identity(name, autograd_library):
    nothing = autograd_library.give(np.zeros((1, 1)))
    for strength, step in ((0.0, 0.5), (0.1, 0.0), (nothing, 0.5), (0.1, nothing)):
        slopes = jacobian(autograd_library, lambda x, s=strength, step=step: AT_ZERO[name](s).prox(x, step), WITH_ZEROS)
        np.testing.assert_array_equal(slopes, np.eye(6))


# -- half precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", AT_ZERO)
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_is_the_float32_result_cast_once(name, half, autograd_library):
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    if autograd_library.name == "torch":
        import torch

        low = torch.from_numpy(x).to(getattr(torch, half))
        back = lambda a: a.float()
    else:
        low = autograd_library.give(x).astype(half)
        back = lambda a: a.astype("float32")
    penalty = AT_ZERO[name](0.1)
    steps = (0.3,) if name == "Nested" else (0.3, back(low) ** 2 + 0.1)
    for step in steps:
        found, wide = penalty.prox(low, step), penalty.prox(back(low), step)
        expected = wide.to(low.dtype) if autograd_library.name == "torch" else wide.astype(half)
        assert found.dtype == low.dtype
        np.testing.assert_array_equal(np.asarray(back(found)), np.asarray(back(expected)))
    assert str(penalty.value(low).dtype).endswith("float32")


# -- updates ----------------------------------------------------------------------------------


UPDATES = {
    "prox_sgd": lambda *args: updates.prox_sgd(*args, lr=0.1),
    "prox_sgd tau": lambda *args: updates.prox_sgd(*args, lr=0.1, tau=2.0),
    "hapg": lambda *args: updates.hapg(*args, lr=0.1),
    "prox_adam": lambda *args: updates.prox_adam(*args, lr=0.1, weight_decay=0.1),
    "adam_hapg": lambda *args: updates.adam_hapg(*args, lr=0.1, extrapolation=0.5),
}


def trajectory(update: Any, x: Any, target: Any, scale: Any, steps: int) -> Any:
    """Steps on the least squares problem 1/2 sum(scale (x - target)^2)."""
    penalty, state = SparseGroupLasso(0.2, 0.3, Groups.along(0)), None
    for _ in range(steps):
        x, state = update(x, scale * (x - target), state, penalty)
    return x


@pytest.mark.parametrize("name", UPDATES)
def test_updates_walk_the_same_path_in_every_library(name, library):
    rng = np.random.default_rng(4)
    start, target, scale = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), rng.uniform(0.1, 2, (4, 3))
    walk = lambda *args: trajectory(UPDATES[name], *args)
    given = library.give([start, target, scale])
    if library.name == "jax":
        import jax

        np.testing.assert_allclose(jax.jit(lambda *args: walk(*args, 4))(*given), walk(start, target, scale, 4), rtol=1e-10)
        return
    expected = walk(start, target, scale, 20)
    np.testing.assert_allclose(library.take(walk(*given, 20)), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.commands
def test_updates_compile_to_one_graph():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    given = [torch.from_numpy(v) for v in (rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), rng.uniform(0.1, 2, (4, 3)))]
    for update in UPDATES.values():
        torch._dynamo.reset()
        walk = lambda *args, update=update: trajectory(update, *args, steps=2)
        compiled = torch.compile(walk, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*given), walk(*given), rtol=0, atol=0)
