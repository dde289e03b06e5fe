"""What the convolutional networks of all libraries share."""

from __future__ import annotations


def cell_kinds(layers: int) -> list[str]:
    """The cell type of each layer: reduction at one third and two thirds of the depth."""
    return ["reduce" if i in (layers // 3, 2 * layers // 3) else "normal" for i in range(layers)]
