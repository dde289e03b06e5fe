"""Which leaves of a pytree a penalty applies to: path patterns, trees of penalties, labels that span leaves.

The argument ``penalty`` of the transformations may be

- one penalty: it applies to every leaf;
- a list of (path pattern, penalty): the first pattern that matches the path of a leaf decides; leaves that none matches have no
  penalty. A path is the keys joined by "/", as in ``layers/0/kernel``, also for the variables of flax nnx; a pattern is a shell
  glob for the whole path, in which ``*`` also matches "/", as in ``*/kernel`` or ``fc[12]/*``;
- a tree of penalties and None with the structure of the parameters, or a prefix of it;
- None: no leaf has a penalty.

Inside ``jax.shard_map``, a penalty on groups is refused for a leaf that differs between shards, where a group may have parts in
several of them. With ``check_vma=False`` JAX does not report this, and each shard is taken for a leaf of its own.

Any object with ``value(x)`` and ``prox(x, step)`` is a penalty, if JAX can trace its prox.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from proxopt import Groups, ProxOperator, _checks
from proxopt.penalties import declared
from proxopt_jax.steps import as_array, at, is_explicit, is_floating, path_name, varying_axes

PyTree: TypeAlias = Any
"""Nested dicts, lists, tuples, dataclasses and other containers that are registered with JAX."""

PenaltyTree: TypeAlias = ProxOperator | Sequence[tuple[str, ProxOperator | None]] | PyTree | None
"""What the argument ``penalty`` of a transformation may be: a penalty, path patterns, a tree of penalties, or None."""


SMALL = 1 << 14  # entries; for a larger leaf, copying into a stack costs more than it saves


@dataclass(frozen=True)
class Problem:
    """A penalty (None: no penalty) and the numbers of the leaves to which it is applied at once.

    They are one leaf; several leaves that form one problem, if joint; or several leaves of one shape, if stacked, which are
    separate problems but pass through the prox as one array, with a penalty that acts on each of them alone.
    """

    penalty: Any
    where: tuple[int, ...]
    joint: bool = False
    stacked: bool = False

    def take(self, leaves: Sequence[Any]) -> Any:
        """Select its entries of ``leaves``: an array, or a list of arrays if joint or stacked."""
        return [leaves[i] for i in self.where] if self.joint or self.stacked else leaves[self.where[0]]

    def put(self, leaves: list[Any], values: Any) -> None:
        """Write ``values``, in the form that ``take`` returns, to its entries of ``leaves``."""
        for i, value in zip(self.where, values if self.joint or self.stacked else [values]):
            leaves[i] = value


@dataclass(frozen=True)
class Penalties:
    """The penalties of a transformation, as passed by the user, and their application to given parameters.

    Args:
      spec: one of the forms listed in the docstring of this module.
      strength: a number, a traced array or a schedule that replaces the strength of every penalty; None leaves them as they are.
      joint: treat the leaves that share one penalty object as one problem, so that groups may span them.
      metric: that of penalties which leave it to the transformation.
      name: what error messages call the argument ``spec``.
    """

    spec: Any  # a PenaltyTree, whose forms are distinguished at run time
    strength: Any = None
    joint: bool = False
    metric: str = "exact"
    name: str = "penalty"

    def __post_init__(self) -> None:
        penalties = [p for _, p in self.spec] if is_rules(self.spec) else jax.tree.leaves(self.spec, is_leaf=_is_node)
        for p in penalties:
            if p is not None and not _is_penalty(p):
                raise TypeError(
                    "penalty must be a penalty, a list of (path pattern, penalty), a tree of penalties, or None, "
                    f"got {p!r} of type {type(p).__name__}"
                )
            if p is not None and self.strength is not None and not hasattr(p, "with_strength"):
                raise TypeError(f"strength must be None for a penalty without with_strength, got {type(p).__name__}")
        if self.strength is not None and not callable(self.strength):
            _checks.in_range("strength", self.strength)

    def problems(self, params: PyTree, count: Any) -> list[Problem]:
        """Assign every leaf of ``params`` to exactly one problem, with the strength of step ``count``."""
        chosen = self._chosen(params)
        _refuse_groups_across_shards(params, chosen)
        at_count = self._at(chosen, count)
        single = [Problem(p, (i,)) for i, p in enumerate(at_count) if p is None or not self.joint]
        shared: dict[int, list[int]] = {}
        for i, p in enumerate(chosen):
            if p is not None and self.joint:  # by identity: equal penalties may be meant for separate problems
                shared.setdefault(id(p), []).append(i)
        return single + [Problem(at_count[w[0]], tuple(w), joint=True) for w in shared.values()]

    def stacks(self, params: PyTree, count: Any, updates: Sequence[Any]) -> list[Problem]:
        """The problems without a None among their ``updates``; small leaves of equal shape, dtype and penalty are stacked."""
        leaves = jax.tree.leaves(params)
        stacks: dict[Any, list[Problem]] = {}
        for problem in self.problems(params, count):
            if any(updates[i] is None for i in problem.where):
                continue
            x = leaves[problem.where[0]]
            key: Any = (id(problem.penalty), jnp.shape(x), jnp.result_type(x))
            if problem.joint or not _is_stackable(x):
                key = problem.where
            stacks.setdefault(key, []).append(problem)
        return [p for alike in stacks.values() for p in _stacked(alike, leaves)]

    def check(self, params: PyTree, attempt: Callable[[Problem, Any], Any]) -> None:
        """Raise an error that names the path where ``attempt(problem, x)`` fails for the leaves x of a problem.

        ``attempt`` uses the penalty as an update will. It is traced with the shapes and dtypes only; nothing is computed.
        """
        names = paths(params)
        arrays = [as_array(x) for x in jax.tree.leaves(params)]
        shape_of: Any = jax.ShapeDtypeStruct  # without the sharding, which tracing would have to satisfy
        shapes = [shape_of(a.shape, a.dtype) for a in arrays]
        fitting = set()  # of leaves with the same penalty, shape and dtype one is enough
        for problem in self.problems(params, jnp.zeros((), jnp.int32)):
            where = ", ".join(repr(names[i]) for i in problem.where)
            if problem.penalty is None:
                continue
            for i in problem.where:
                if not is_floating(arrays[i]):
                    raise TypeError(
                        f"params leaf {names[i]!r} must be floating point to have a {self.name}, got {arrays[i].dtype}: "
                        "exclude it with a path pattern or with optax.masked"
                    )
            key = (id(problem.penalty), *((arrays[i].shape, arrays[i].dtype) for i in problem.where))
            if key in fitting:
                continue
            fitting.add(key)
            try:
                jax.eval_shape(partial(attempt, problem), problem.take(shapes))
            except (ValueError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{self.name} must fit params leaf {where}: {error}") from error

    def selected(self, params: PyTree) -> list[bool]:
        """Whether each leaf has a penalty."""
        return [p is not None for p in self._chosen(params)]

    def _chosen(self, params: PyTree) -> list[Any]:
        """The penalty of each leaf, or None."""
        n = len(jax.tree.leaves(params))
        if not n:  # everything is masked, or optax passes a placeholder to find the structure of the state
            return []
        if self.spec is None or _is_penalty(self.spec):
            return [self.spec] * n
        return self._by_pattern(_names(params)) if is_rules(self.spec) else self._by_tree(params)

    def _by_pattern(self, names: list[tuple[str, ...]]) -> list[Any]:
        patterns = [pattern for pattern, _ in self.spec]
        hits = [
            next((k for k, pattern in enumerate(patterns) if any(fnmatchcase(name, pattern) for name in of_leaf)), None)
            for of_leaf in names
        ]
        for k, pattern in enumerate(patterns):
            if k not in hits:
                known = ", ".join(repr(of_leaf[0]) for of_leaf in names[:20]) + (", ..." if len(names) > 20 else "")
                raise ValueError(
                    f"{self.name} pattern must decide at least one leaf, got {pattern!r} (pattern {k}); leaves: {known}"
                )
        return [None if k is None else self.spec[k][1] for k in hits]

    def _by_tree(self, params: PyTree) -> list[Any]:
        penalties, treedef = jax.tree.flatten(self.spec, is_leaf=_is_node)
        structure: Any = treedef
        try:
            subtrees = structure.flatten_up_to(params)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self.name} must be a tree with the structure of params or a prefix of it: {error}. "
                f"A list of (path pattern, {self.name}) fits any tree"
            ) from error
        return [p for p, subtree in zip(penalties, subtrees) for _ in jax.tree.leaves(subtree)]

    def _at(self, penalties: list[Any], count: Any) -> list[Any]:
        """The penalties with their metric, and with the strength of step ``count``; one object for each different one."""
        strength = None if self.strength is None else at(self.strength, count)
        changed: dict[int, Any] = {id(None): None}
        for p in penalties:
            if id(p) not in changed:
                with_strength = p if strength is None else p.with_strength(strength)
                changed[id(p)] = declared.with_metric(with_strength, self.metric)
        return [changed[id(p)] for p in penalties]


def _is_stackable(x: Any) -> bool:
    """Whether a leaf is small, and not on a mesh with explicit axes, where all arrays of a stack would need one sharding."""
    return (
        jnp.ndim(x) > 0
        and 0 < jnp.size(x) <= SMALL
        and is_floating(jnp.asarray(x))
        and not is_explicit(x)
        and not varying_axes(x)
    )


def _stacked(problems: list[Problem], leaves: list[Any]) -> list[Problem]:
    """One problem in place of several with the same penalty and leaves of one shape, if there is such a penalty for a stack."""
    penalty = problems[0].penalty
    if len(problems) == 1 or penalty is None:
        return problems
    penalty = declared.batched(penalty, jnp.ndim(leaves[problems[0].where[0]]))
    return problems if penalty is None else [Problem(penalty, tuple(i for p in problems for i in p.where), stacked=True)]


def _refuse_groups_across_shards(params: PyTree, penalties: list[Any]) -> None:
    for i, (x, penalty) in enumerate(zip(jax.tree.leaves(params), penalties)):
        if penalty is None or getattr(penalty, "elementwise", False) or not isinstance(x, jax.Array):
            continue
        axes = varying_axes(x)
        if axes:
            raise ValueError(
                f"params leaf {paths(params)[i]!r} varies over the axis {', '.join(map(repr, sorted(axes)))} of a shard_map, "
                f"where {type(penalty).__name__} takes the part of a group in each shard for a group: call update outside of "
                "shard_map, where groups may extend over shards, or use shard_map(..., check_vma=False) if no group does"
            )


def paths(params: PyTree) -> list[str]:
    """The path of each leaf: its keys joined by "/"; "" if ``params`` is one array."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def _names(params: PyTree) -> list[tuple[str, ...]]:
    """The names of each leaf: its path, first without the attribute in which a variable of flax nnx holds its array."""
    found: list[tuple[str, ...]] = []
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
        in_variable = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
        found.append((path_name(path[:-1]), path_name(path)) if in_variable else (path_name(path),))
    return found


def tree_labels(labels: PyTree, axis: PyTree = 0) -> Groups:
    """Groups that span the leaves of a pytree: slices with equal labels, in whichever leaf, form one group.

    They are for a penalty with ``joint=True``, under which a neuron's bias, incoming and outgoing weights become zero together.

    Args:
      labels: a tree like the parameters to which the penalty applies. Each leaf holds ints or strings, one per slice along
        ``axis``: a list, a range or a NumPy array.
      axis: the labelled axis, or a tree of axes with the structure of ``labels``.

    Returns:
      ``Groups.labels`` with the leaves in the order of ``jax.tree.leaves``.

    Raises:
      ValueError: ``axis`` is a tree of another structure, or there is no leaf.
      TypeError: a leaf of ``labels`` does not hold ints or strings.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import GroupL2
    >>> params = {"b": jnp.array([0.1, 3.0]), "w": jnp.array([[0.1, 2.0], [0.2, 1.0], [0.0, 5.0]])}
    >>> neurons = proxopt_jax.tree_labels({"b": range(2), "w": range(2)}, axis={"b": 0, "w": 1})
    >>> tx = proxopt_jax.proximal(GroupL2(1.0, groups=neurons), learning_rate=1.0, joint=True)
    >>> updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    >>> optax.apply_updates(params, updates)["b"].round(2)
    Array([0.  , 2.04], dtype=float32)
    """
    parts, treedef = jax.tree.flatten(labels, is_leaf=_is_labels)
    if not parts:
        raise ValueError("labels must hold at least one leaf, got none")
    for part in parts:
        if not _is_labels(part):
            raise TypeError(f"labels must hold ints or strings for each leaf, got {part!r}")
    if not isinstance(axis, int):
        found: Any = jax.tree.structure(axis)
        if found != treedef:
            raise ValueError(f"axis must be an int or a tree like labels, {treedef}, got {found}")
        axis = tuple(jax.tree.leaves(axis))
    return Groups.labels([np.asarray(part) for part in parts], axis)


def _is_penalty(p: Any) -> bool:
    return not isinstance(p, type) and callable(getattr(p, "prox", None)) and callable(getattr(p, "value", None))


def _is_node(p: Any) -> bool:
    return p is None or _is_penalty(p)


def is_rules(spec: Any) -> bool:
    """Whether ``spec`` is a list of (path pattern, penalty)."""
    if not isinstance(spec, (list, tuple)) or not spec:
        return False
    return all(isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[0], str) for rule in spec)


def _is_labels(part: Any) -> bool:
    if isinstance(part, (range, np.ndarray, jax.Array)):
        return True
    return isinstance(part, (list, tuple)) and bool(part) and all(isinstance(v, (int, np.integer, str)) for v in part)
