r"""Automatic differentiation of solved problems: the optimal value has a derivative here, the minimiser has none.

By the envelope theorem, with a minimiser :math:`x^*(\theta)` of :math:`P(\cdot, \theta)`,

.. math::

    F(\theta) = \min_x P(x, \theta), \qquad
    \frac{d F}{d \theta} = \frac{\partial P}{\partial \theta}(x^*, \theta)

so that the minimiser is a constant in the derivative of F. Its own derivative is not implemented: differentiating through it
raises ``NotImplementedError`` instead of returning zeros, in reverse mode when a cotangent reaches x, in forward mode when x is
read. Second derivatives of F contain the derivative of x, and raise the error too.

Sources: Danskin, "The theory of max-min, with applications", 1966; Milgrom and Segal, "Envelope theorems for arbitrary choice
sets", 2002.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array

REFUSAL = (
    "the solution x of this problem has no derivative here: differentiate `fun`, or solve for constant inputs"
    " (detach() in torch, jax.lax.stop_gradient in JAX) to use x as a constant"
)
SECOND = (
    "second derivatives of `fun` need the derivative of the solution x, which is not implemented: differentiate once,"
    " without create_graph"
)


def is_traced(x: Any) -> bool:
    """Whether x is an array that JAX traces: one without a value yet, or one that is being differentiated."""
    if _arrays.is_numpy_array(x) or not is_jax_array(x):
        return False
    import jax

    return isinstance(x, jax.core.Tracer)


def is_differentiated(sources: Sequence[Any]) -> bool:
    """Whether a derivative with respect to one of the arrays may be requested."""
    return any(_is_tracked_by_torch(s) if _arrays.is_torch_array(s) else is_traced(s) for s in sources)


def arrays_of(penalty: Any) -> list[Array]:
    """The torch tensors and traced JAX arrays among the attributes of a penalty and of the penalties it is composed of."""
    found = []
    for value in getattr(penalty, "__dict__", {}).values():
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]:
            if _arrays.is_torch_array(item) or is_traced(item):
                found.append(item)
            elif hasattr(item, "prox"):
                found += arrays_of(item)
    return found


def undifferentiable(x: Array, sources: Sequence[Any]) -> Array:
    """Return x as a function of the sources, arrays of its library, whose derivative raises ``NotImplementedError``."""
    if _arrays.is_torch_array(x):
        return _torch_functions()[0].apply(x, *sources)
    return _jax_point()(x, *sources)


def optimal_value(objective: Callable[..., Array], x: Array, sources: Sequence[Array]) -> Array:
    """Evaluate ``objective(x, *sources)`` at a minimiser x, differentiable once with respect to the sources, with x constant.

    The objective must consist of operations that torch.func and JAX can differentiate.
    """
    if _arrays.is_torch_array(x):
        return _torch_functions()[1].apply(objective, x, *sources)
    return _jax_value(objective, x, sources)


def optimal_value_of(objective: Callable[[Array], Array], x: Array, sources: Sequence[Any]) -> Array:
    """Evaluate objective(x) at a minimiser x, differentiable once with respect to all arrays that ``objective`` closes over.

    Args:
      objective: a function of x.
      x: the minimiser, a constant.
      sources: those of the arrays that are known; they show whether JAX is tracing.
    """
    if _arrays.is_torch_array(x):
        with _once_in_torch():
            return objective(_arrays.detach(x))
    if is_jax_array(x) and is_differentiated([x, *sources]):
        import jax

        explicit, closed_over = jax.closure_convert(objective, x)
        return _jax_value(explicit, x, closed_over)
    return objective(x)


# -- torch ------------------------------------------------------------------------------------


def _is_tracked_by_torch(x: Any) -> bool:
    import torch
    from torch.autograd import forward_ad

    dual: Any = forward_ad  # torch gives no types
    if not (x.is_floating_point() or x.is_complex()):
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or dual.unpack_dual(x).tangent is not None


@functools.cache
def _torch_functions() -> tuple[Any, Any]:
    import torch

    class Point(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Any, *sources: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Save nothing: there is no derivative."""

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            raise NotImplementedError(REFUSAL)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(REFUSAL)

    point: Any = Point  # torch gives no types

    class Value(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(objective: Any, x: Any, *sources: Any) -> Any:
            return objective(x, *sources)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.objective = inputs[0]
            ctx.save_for_backward(*inputs[1:])
            ctx.save_for_forward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, cotangent: Any) -> Any:
            x, *sources = ctx.saved_tensors
            x = point.apply(x, *sources)  # the second derivative contains that of x, which raises
            vjp = torch.func.vjp(lambda *s: ctx.objective(x, *s), *sources)[1]
            return None, None, *vjp(cotangent)

        @staticmethod
        def jvp(ctx: Any, _: Any, dx: Any, *tangents: Any) -> Any:
            x, *sources = ctx.saved_tensors
            directions = tuple(torch.zeros_like(s) if t is None else t for s, t in zip(sources, tangents))
            # torch cannot nest forward mode: J t is obtained from two transpositions, as (J^T)^T t
            evaluated = torch.func.vjp(lambda *s: ctx.objective(x, *s), *sources)
            value, vjp = evaluated[0], evaluated[1]
            jvp = torch.func.vjp(vjp, torch.zeros_like(value))[1]
            return jvp(directions)[0]

    return Point, Value


@contextlib.contextmanager
def _once_in_torch() -> Iterator[None]:
    """Let what is computed inside be differentiated only once; not enforced inside torch.func, which has no such hooks."""
    import torch

    computed = False

    def unpack(saved: Any) -> Any:
        if computed and torch.is_grad_enabled():  # this backward pass is itself being recorded
            raise NotImplementedError(SECOND)
        return saved

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack))
        yield
    computed = True


# -- JAX --------------------------------------------------------------------------------------


def _jax_value(objective: Callable[..., Array], x: Array, sources: Sequence[Array]) -> Array:
    import jax

    @jax.custom_jvp
    def value(x: Array, *sources: Array) -> Array:
        return objective(x, *sources)

    @value.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        x, *sources = primals
        x = undifferentiable(x, sources)  # the second derivative contains that of x, which raises
        return jax.jvp(lambda *s: objective(x, *s), tuple(sources), tuple(tangents[1:]))

    return value(_arrays.detach(x), *sources)


@functools.cache
def _jax_point() -> Callable[..., Array]:
    """The identity in its first argument, as a JAX primitive whose tangent is a primitive that raises when it is evaluated.

    JAX removes the tangent if nothing depends on it. A rule of ``jax.custom_jvp`` would raise for every derivative of a
    function that computes x, even if the result does not depend on x.
    """
    from jax.core import ShapedArray
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    # Any: JAX gives no types for primitives
    point: Any = Primitive("proxopt_solution")
    tangent: Any = Primitive("proxopt_derivative_of_solution")

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(REFUSAL)

    def jvp_of_point(primals: Any, tangents: Any) -> Any:
        x = point.bind(*primals)
        moved = [t for t in tangents if type(t) is not ad.Zero]
        return x, tangent.bind(*moved, shape=x.shape, dtype=x.dtype)

    def jvp_of_tangent(primals: Any, tangents: Any, **shape: Any) -> Any:
        moved = [t for t in tangents if type(t) is not ad.Zero]
        return tangent.bind(*primals, **shape), tangent.bind(*moved, **shape)

    def transpose(cotangent: Any, *moved: Any, **_: Any) -> Any:
        return [None] * len(moved) if type(cotangent) is ad.Zero else refuse()

    def batch_tangent(moved: Any, axes: Any, *, shape: Any, dtype: Any) -> Any:
        size = next(t.shape[a] for t, a in zip(moved, axes) if a is not None)
        return tangent.bind(*moved, shape=(size, *shape), dtype=dtype), 0

    point.def_impl(lambda x, *_: x)
    point.def_abstract_eval(lambda x, *_: ShapedArray(x.shape, x.dtype))
    mlir.register_lowering(point, lambda _, x, *__: [x])
    ad.primitive_jvps[point] = jvp_of_point
    batching.primitive_batchers[point] = lambda args, axes: (point.bind(*args), axes[0])

    tangent.def_impl(refuse)
    tangent.def_abstract_eval(lambda *_, shape, dtype: ShapedArray(shape, dtype))
    mlir.register_lowering(tangent, refuse)
    ad.primitive_jvps[tangent] = jvp_of_tangent
    ad.primitive_transposes[tangent] = transpose
    batching.primitive_batchers[tangent] = batch_tangent
    bind: Callable[..., Array] = point.bind
    return bind
