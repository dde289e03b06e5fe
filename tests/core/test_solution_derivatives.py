"""Derivatives of solved problems: those of the optimal value are right, those of the solution raise instead of being zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from libraries import jax_precision

from proxopt import L1, GroupL2, Groups, sparse_code
from proxopt.solvers import LeastSquares, fista

REFUSED = "has no derivative here: differentiate `fun`"


def problem() -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 5)), rng.normal(size=4), 0.3


def by_differences(f: Callable[..., float], at: tuple, i: int) -> np.ndarray:
    """The derivative of f with respect to argument i."""
    x = np.asarray(at[i], float)
    out = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        shift = np.zeros(x.shape)
        shift[place] = 1e-6
        ends = [f(*at[:i], x + sign * shift, *at[i + 1 :]) for sign in (1, -1)]
        out[place] = (ends[0] - ends[1]) / 2e-6
    return out


def codes(A: Any, b: Any, strength: Any) -> Any:
    return sparse_code(A, b, strength, tol=1e-12, method="homotopy")


def by_fista(A: Any, b: Any, strength: Any) -> Any:
    return fista(LeastSquares(A, b), L1(strength), 0 * b @ A, tol=1e-13)


def quartic(A: Any, b: Any, strength: Any) -> Any:
    """A smooth function of a user's own, and a penalty with a tensor in it."""

    def f(x: Any) -> tuple[Any, Any]:
        residual = A @ x - b
        return (residual**2).sum() / 2 + (x**4).sum() / 4, A.T @ residual + x**3

    return fista(f, L1(strength), 0 * b @ A, tol=1e-9)


SOLVERS = [codes, by_fista, quartic]
EXPECTED = {solve: [by_differences(lambda *a, s=solve: s(*a).fun, problem(), i) for i in range(3)] for solve in SOLVERS}


# -- torch ------------------------------------------------------------------------------------


def tensors(grad: bool = True) -> list:
    torch = pytest.importorskip("torch")
    return [torch.tensor(v, dtype=torch.float64, requires_grad=grad) for v in problem()]


@pytest.mark.parametrize("solve", SOLVERS)
def test_torch_differentiates_the_value_and_refuses_the_solution(solve: Any) -> None:
    parts = tensors()
    found = solve(*parts)
    found.fun.backward()
    for part, expected in zip(parts, EXPECTED[solve]):
        np.testing.assert_allclose(part.grad, expected, atol=1e-6)
    assert not found.get("gap", found.get("residual")).requires_grad
    for i in range(3):
        alone = [p if j == i else p.detach() for j, p in enumerate(parts)]
        for x in (solve(*alone).x, dict(solve(*alone))["x"], solve(*alone).pop("x"), {**solve(*alone)}["x"]):
            with pytest.raises(NotImplementedError, match=REFUSED):
                x.sum().backward()
    assert not found.x.detach().requires_grad


@pytest.mark.parametrize("solve", SOLVERS)
def test_torch_refuses_second_derivatives(solve: Any) -> None:
    torch = pytest.importorskip("torch")
    A, b, strength = tensors()
    with pytest.raises(NotImplementedError, match="derivative"):
        (first,) = torch.autograd.grad(solve(A, b, strength).fun, b, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize("solve", SOLVERS)
def test_the_transformations_of_torch(solve: Any) -> None:
    torch = pytest.importorskip("torch")
    parts = tensors(grad=False)
    found = torch.func.grad(lambda *a: solve(*a).fun, argnums=(0, 1, 2))(*parts)
    for one, expected in zip(found, EXPECTED[solve]):
        np.testing.assert_allclose(one, expected, atol=1e-6)
    _, along = torch.func.jvp(lambda b: solve(parts[0], b, parts[2]).fun, (parts[1],), (parts[1],))
    np.testing.assert_allclose(along, EXPECTED[solve][1] @ problem()[1], atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(parts[1], parts[1])
        carried = torch.autograd.forward_ad.unpack_dual(solve(parts[0], dual, parts[2]).fun).tangent
        np.testing.assert_allclose(carried, along, atol=1e-12)
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.grad(lambda b: solve(parts[0], b, parts[2]).x.sum())(parts[1])
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.jvp(lambda b: solve(parts[0], b, parts[2]).x, (parts[1],), (parts[1],))


def test_constants_stay_constants_in_torch() -> None:
    torch = pytest.importorskip("torch")
    constants = tensors(grad=False)
    with torch.no_grad():
        assert not codes(*tensors()).x.requires_grad
    for solve in SOLVERS:
        assert not solve(*constants).x.requires_grad and not solve(*constants).fun.requires_grad
    start = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match=REFUSED):
        fista(LeastSquares(*constants[:2]), L1(0.3), start).x.sum().backward()


def test_a_function_may_differentiate_itself_in_torch() -> None:
    torch = pytest.importorskip("torch")
    A, b, _ = tensors()

    def f(x: Any, create_graph: bool) -> tuple[Any, Any]:
        x = x.requires_grad_()
        value = ((A @ x - b) ** 2).sum() / 2
        return value, torch.autograd.grad(value, x, create_graph=create_graph, retain_graph=True)[0]

    for create_graph in (False, True):
        A.grad = None
        found = fista(lambda x, c=create_graph: f(x, c), L1(0.3), torch.zeros(5, dtype=torch.float64), tol=1e-10)
        found.fun.backward(retain_graph=True)
        np.testing.assert_allclose(A.grad, EXPECTED[by_fista][0], atol=1e-6)
        with pytest.raises((NotImplementedError, RuntimeError), match=f"{REFUSED}|does not require grad"):
            found.x.sum().backward()


def test_levels_and_weights_of_a_penalty_are_seen() -> None:
    torch = pytest.importorskip("torch")
    A, b, _ = tensors(grad=False)
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fista(LeastSquares(A, b), GroupL2(0.3, Groups.labels([0, 0, 1, 1, 1]), weights), 0 * b @ A, max_iter=30)
    with pytest.raises(NotImplementedError, match=REFUSED):
        found.x.sum().backward()


# -- JAX --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jax64() -> Iterator[Any]:
    jax = pytest.importorskip("jax")
    with jax_precision():
        yield jax


@pytest.mark.parametrize("solve", SOLVERS)
def test_jax_differentiates_the_value_in_both_modes(jax64: Any, solve: Any) -> None:
    at = tuple(jax64.numpy.asarray(v) for v in problem())

    def all_at_once(A: Any, b: Any, strength: Any, signals: Any) -> Any:
        value = lambda A, b, strength: solve(A, b, strength).fun
        return (
            jax64.grad(value, argnums=(0, 1, 2))(A, b, strength),
            jax64.jvp(lambda b: value(A, b, strength), (b,), (b,))[1],
            jax64.vmap(jax64.grad(lambda b: value(A, b, strength)))(signals),
        )

    slopes, along, batch = jax64.jit(all_at_once)(*at, jax64.numpy.stack([at[1], -at[1]]))
    for slope, expected in zip(slopes, EXPECTED[solve]):
        np.testing.assert_allclose(slope, expected, atol=1e-6)
    np.testing.assert_allclose(along, EXPECTED[solve][1] @ problem()[1], atol=1e-6)
    np.testing.assert_allclose(batch, np.stack([EXPECTED[solve][1], -EXPECTED[solve][1]]), atol=1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
def test_jax_refuses_the_solution_in_both_modes(jax64: Any, solve: Any) -> None:
    at = tuple(jax64.numpy.asarray(v) for v in problem())
    asked = [
        lambda x, i: jax64.grad(lambda v: x(v).sum())(at[i]),
        lambda x, i: jax64.jacrev(x)(at[i]),
        lambda x, i: jax64.grad(lambda v: jax64.jit(x)(v).sum())(at[i]),
        lambda x, i: jax64.grad(lambda v: jax64.vmap(x)(v).sum())(jax64.numpy.stack([at[i], at[i]])),
        lambda x, i: jax64.vmap(lambda v: jax64.grad(lambda v: x(v).sum())(v))(jax64.numpy.stack([at[i], at[i]])),
    ]
    for i in range(3):
        x = lambda v, i=i: solve(*at[:i], v, *at[i + 1 :]).x
        for ask in asked if i == 1 else asked[:1]:
            with pytest.raises(NotImplementedError, match=REFUSED):
                jax64.make_jaxpr(lambda ask=ask, x=x, i=i: ask(x, i))()
    along = lambda b: jax64.jvp(lambda b: solve(at[0], b, at[2]).x, (b,), (b,))[1]
    with pytest.raises(NotImplementedError, match=REFUSED):
        jax64.jit(along).lower(at[1])
    second = lambda b: jax64.hessian(lambda b: solve(at[0], b, at[2]).fun)(b)
    with pytest.raises(NotImplementedError, match=REFUSED):
        jax64.jit(second).lower(at[1])


def test_jax_uses_a_code_as_a_constant(jax64: Any) -> None:
    A, b, strength = (jax64.numpy.asarray(v) for v in problem())
    solve = jax64.jit(lambda A: codes(A, b, strength))  # returns everything, x too

    def loss(A: Any) -> Any:
        found = solve(A)
        return ((b - A @ jax64.lax.stop_gradient(found.x)) ** 2).sum() / 2 + found.gap, found.fun

    slopes, values = jax64.jacrev(loss)(A)
    np.testing.assert_allclose(slopes, EXPECTED[codes][0], atol=1e-6)
    np.testing.assert_allclose(values, EXPECTED[codes][0], atol=1e-6)
    for read in (lambda r: r["x"], lambda r: dict(r)["x"], lambda r: r.get("x"), lambda r: dict(r.items())["x"]):
        with pytest.raises(NotImplementedError, match=REFUSED):
            jax64.make_jaxpr(jax64.grad(lambda A, read=read: read(codes(A, b, strength)).sum()))(A)


def test_jax_differentiates_lists_of_dictionaries(jax64: Any) -> None:
    A, b, strength = (jax64.numpy.asarray(v) for v in problem())
    signals = jax64.numpy.stack([b, b])
    solve = lambda A: sparse_code([A[:, :3], A], signals, strength, tol=1e-12, method="homotopy")
    np.testing.assert_allclose(jax64.jit(jax64.grad(lambda A: solve(A).fun[1]))(A), EXPECTED[codes][0], atol=1e-6)
    with pytest.raises(NotImplementedError, match=REFUSED):
        jax64.make_jaxpr(jax64.grad(lambda A: solve(A).x[1].sum()))(A)
