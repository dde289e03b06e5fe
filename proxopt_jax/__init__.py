"""Proximal optimisation for JAX: optax transformations whose updates produce exact zeros."""

try:
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
except ModuleNotFoundError as error:
    missing = error.name or getattr(error.__cause__, "name", None)  # without jaxlib, jax raises an error whose cause names it
    if missing not in ("jax", "jaxlib", "optax"):
        raise
    raise ModuleNotFoundError(
        f'proxopt_jax needs JAX and optax ({missing} is missing): pip install "proxopt[jax]"', name=missing
    ) from error

from proxopt_jax.frozen_zeros import freeze_zeros
from proxopt_jax.links import group_l2, l1, sgl
from proxopt_jax.optimizers import adam_hapg, hapg, prox_adam, prox_sgd
from proxopt_jax.point import prox_point
from proxopt_jax.projections import projected
from proxopt_jax.proximal import ProximalState, proximal
from proxopt_jax.strengths import max_strength
from proxopt_jax.trees import tree_labels

__all__ = [
    "ProximalState",
    "adam_hapg",
    "freeze_zeros",
    "group_l2",
    "hapg",
    "l1",
    "max_strength",
    "projected",
    "prox_adam",
    "prox_point",
    "prox_sgd",
    "proximal",
    "sgl",
    "tree_labels",
]
