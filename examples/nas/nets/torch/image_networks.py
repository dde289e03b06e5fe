"""The networks of convolutional genotypes of any kind: supernets by space, and the size of evaluation networks."""

from __future__ import annotations

from typing import Any

from ...space.genotype import AnyGenotype, CellGenotype, Genotype
from ...space.spaces import Space
from . import cnn, nasbench201
from .replicas import Replicas


def supernet(space: Space, settings: Any, classes: int, image_channels: int, own: Any = None) -> Any:
    """The supernet of a search in this space, or several (`replicas` of the settings) that share its architecture.

    own: the class of a method that has one of its own. ValueError for a setting of another space.
    """
    made = [_supernet(space, settings, classes, image_channels, own) for _ in range(getattr(settings, "replicas", 1))]
    return made[0] if len(made) == 1 else Replicas(made)


def _supernet(space: Space, settings: Any, classes: int, image_channels: int, own: Any) -> Any:
    """One supernet. Arguments as those of `supernet`."""
    sizes = (settings.channels, settings.layers, classes)
    norm = getattr(settings, "path_norm", False)
    if space.kind is CellGenotype:
        return (own or nasbench201.Supernet)(space, *sizes, image_channels, norm, settings.transition)
    if settings.transition != "residual":
        raise ValueError(f"transition belongs to the space nasbench201, got {settings.transition!r} with {space.name!r}")
    return (own or cnn.Supernet)(space, *sizes, image_channels=image_channels, path_norm=norm)


def genotype_size(found: AnyGenotype) -> dict[str, int]:
    """The parameters and multiply-adds of the published network of a genotype, for an image of CIFAR-10.

    Cells of DARTS: 20 cells of 36 channels. NAS-Bench-201: 15 cells in three stages, 16 channels.
    """
    if isinstance(found, CellGenotype):
        return nasbench201.genotype_size(found)
    assert isinstance(found, Genotype)
    return cnn.genotype_size(found)
