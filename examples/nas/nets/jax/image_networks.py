"""The networks of convolutional genotypes of any kind in JAX: supernets by space, and the size of evaluation networks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from ...space.genotype import AnyGenotype, CellGenotype, Genotype
from ...space.spaces import Space
from . import cnn, nasbench201


def supernet(space: Space, settings: Any, classes: int, image_channels: int, rngs: nnx.Rngs) -> Any:
    """The supernet of a search in this space.

    Raises ValueError for settings that belong to NAS-Bench-201, with cells of another kind, and for several replicas.
    """
    if getattr(settings, "replicas", 1) > 1:
        raise ValueError(f"replicas must be 1 with --framework jax, got {settings.replicas}")
    dtype = jnp.bfloat16 if settings.amp else jnp.float32
    sizes = (settings.channels, settings.layers, classes)
    norm = getattr(settings, "path_norm", False)
    if space.kind is CellGenotype:
        own = {"path_norm": norm, "transition": settings.transition}
        return nasbench201.Supernet(space, *sizes, rngs=rngs, dtype=dtype, image_channels=image_channels, **own)
    if settings.transition != "residual":
        raise ValueError(f"transition belongs to the space nasbench201, got {settings.transition!r} with {space.name!r}")
    if norm:
        raise ValueError(f"path_norm belongs to the space nasbench201 with --framework jax, got it with {space.name!r}")
    return cnn.Supernet(space, *sizes, rngs=rngs, dtype=dtype, image_channels=image_channels)


def genotype_size(found: AnyGenotype) -> dict[str, int]:
    """The parameters and multiply-adds of the published network of a genotype, for an image of CIFAR-10.

    Cells of DARTS: 20 cells of 36 channels. NAS-Bench-201: 15 cells in three stages, 16 channels.
    """
    if isinstance(found, CellGenotype):
        return nasbench201.genotype_size(found)
    assert isinstance(found, Genotype)
    return cnn.genotype_size(found)
