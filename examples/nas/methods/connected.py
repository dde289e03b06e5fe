"""What the searches by SparseNAS refuse, the same in every library: a cell that no path connects to its inputs."""

from __future__ import annotations

from ..space.genotype import AnyGenotype, cell_name


def check_connected(found: AnyGenotype, strength: float) -> None:
    """Raise ValueError unless each cell of a genotype without dead ends has a path. strength: of the penalty, for the message."""
    for cell in found.layout.cells:
        if not found.output_nodes(cell):
            raise ValueError(
                f"every cell must keep a path from its inputs to its output, but the {cell_name(cell)} has none left at strength"
                f" {strength:.3g}: use --guard, --target-paths or a smaller --strength-step"
            )
