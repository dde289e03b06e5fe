"""What the networks of NAS-Bench-201 of all libraries share."""

from __future__ import annotations

from typing import Literal

from .convolutional import cell_kinds

KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}  # sides of the kernels, in pixels
PUBLISHED = {"channels": 16, "layers": 17}  # the size of all networks of the benchmark

Transition = Literal["residual", "patch"]


def layer_kinds(layers: int) -> list[str]:
    """The kind of each layer: a searched "cell", or "reduce", a transition to the next stage."""
    kinds = ["cell" if kind == "normal" else kind for kind in cell_kinds(layers)]
    if "cell" not in kinds:
        raise ValueError(f"layers must be at least 3, two transitions and one cell, got {layers}")
    return kinds
