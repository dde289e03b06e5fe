"""ISTA-NAS: each node has a compressed variable b, from which sparse coding recovers the few paths into the node.

    z_j = argmin_z 1/2 ||A_j z - b_j||^2 + strength ||z||_1        for each node j of all cells, with a fixed random A_j
    S_j = the `sparsity` largest |z_j|                             the paths into node j; no others are computed
    w_S = b^T A_S - z_S^T (A_S^T A_S - I) = z_S + A_S^T (b - A_S z_S)     the weights of the paths (Eq. 11)

In NAS-Bench-201, where nodes have 1, 2 and 3 edges of one operation each, S_j has the largest |z_j| on each edge into j, which is
not in the paper. The setting `strength` is the lambda of the paper. The search updates b by gradients in which z is constant:
dw_S/db = A_S^T. The genotype is the support.

Source: Yang, Li, You, Wang, Qian, Lin, "ISTA-NAS", NeurIPS 2020, Algorithm 1. Settings and the distribution of A are those of the
published code, which recovers once in each epoch, while the paper does in each iteration (`recover_every=1`). In that code the
gradient of b, the sum of those on the validation and the training batch, counts in the norm that clips the gradients of the
network weights (`clip_together`).

Columns of the table: moved and distance are the largest and the mean distance ||z_new - z_old|| of the codes of all nodes between
the last two recoveries (Fig. 2, right), in the picture distances.png.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..space.genotype import AnyGenotype
from ..space.spaces import Masks, Space, Weights
from . import recovery
from .recovery import largest_entries as largest_entries
from .settings.ista import CodeSettings, TwoStageSettings


class Codes:
    """The compressed variables of all nodes of all cells, with the codes last recovered from them.

    parameters: b of each cell, (nodes, rows) each.
    """

    def __init__(self, space: Space, settings: CodeSettings, device: torch.device) -> None:
        self.space, self.settings = space, settings
        self.cells, nodes = space.layout.cells, space.layout.nodes
        draw = measurement_matrix(settings.matrix)
        self.members = recovery.members(space, settings.sparsity)
        self.matrices = {cell: [draw(settings.rows, len(m)) for m in self.members[cell]] for cell in self.cells}
        shape = (len(nodes), settings.rows)
        self.parameters = [nn.Parameter((1e-3 * torch.randn(shape)).to(device)) for _ in self.cells]
        # of the last recovery: codes (float64, on the host), and of the paths in the support the terms of Eq. 11
        self.codes = {cell: [np.zeros(len(m)) for m in self.members[cell]] for cell in self.cells}
        self.gap = self.moved = self.distance = 0.0
        many = (len(nodes), recovery.kept(space, settings.sparsity))
        self.support = {cell: torch.zeros(many, dtype=torch.int64, device=device) for cell in self.cells}
        self.values = {cell: torch.zeros(many, device=device) for cell in self.cells}
        self.columns = {cell: torch.zeros(*many, settings.rows, device=device) for cell in self.cells}
        self.masks: Masks = {}

    def solve(self) -> dict[str, list[np.ndarray]]:
        """Solve for the codes of all nodes of all cells at the current b, in one batch with certified duality gaps."""
        codes, self.gap = recovery.solve(self.matrices, self._variables(), self.settings.strength)
        return codes

    def _variables(self) -> dict[str, np.ndarray]:
        return {cell: b.detach().double().cpu().numpy() for cell, b in zip(self.cells, self.parameters)}

    def recover(self) -> None:
        """Recover the codes, supports and values at the current b."""
        codes = self.solve()
        found = self.distances(codes)
        self.moved, self.distance = max(map(max, found.values())), recovery.mean_distance(found)
        self.set_codes(codes)

    def distances(self, codes: dict[str, list[np.ndarray]]) -> dict[str, list[float]]:
        """The distance of the code of each node from the last one."""
        return recovery.distances(codes, self.codes)

    def set_codes(self, codes: dict[str, list[np.ndarray]]) -> None:
        """Set the codes, and the supports and values that follow from them."""
        self.codes = codes
        for cell, vectors in self._variables().items():
            own, matrices = self.members[cell], self.matrices[cell]
            edges = recovery.edges_of(self.space, cell)
            found = recovery.support(own, codes[cell], matrices, vectors, self.settings.sparsity, edges)
            self.support[cell].copy_(torch.from_numpy(found.paths))
            self.values[cell].copy_(torch.from_numpy(found.values))
            self.columns[cell].copy_(torch.from_numpy(found.columns))
            active = set(found.paths.flat)
            self.masks = {**self.masks, cell: tuple(i in active for i in range(len(self.space.paths(cell))))}

    def coefficients(self, cell: str) -> Tensor:
        """(nodes, paths of the support): z_S + A_S^T (b - A_S z_S), Eq. 11 without its Gram matrix."""
        b, z, columns = self.parameters[self.cells.index(cell)], self.values[cell], self.columns[cell]
        residual = b - (columns * z[..., None]).sum(1)
        return z + (columns * residual[:, None]).sum(2)

    def weights(self) -> dict[str, Tensor]:
        """The weights of the paths of each cell, exactly 0 outside the support."""
        out = {}
        for cell in self.cells:
            w = self.coefficients(cell)
            out[cell] = w.new_zeros(len(self.space.paths(cell))).scatter_add(0, self.support[cell].flatten(), w.flatten())
        return out

    def genotype(self) -> AnyGenotype:
        return self.space.genotype(self.masks)

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": [b.detach() for b in self.parameters],
            "matrices": {cell: [torch.from_numpy(A) for A in self.matrices[cell]] for cell in self.cells},
            "codes": {cell: [torch.from_numpy(z) for z in self.codes[cell]] for cell in self.cells},
            "support": self.support,
            "values": self.values,
            "columns": self.columns,
            "masks": {cell: list(mask) for cell, mask in self.masks.items()},
            "gap": self.gap,
            "moved": self.moved,
            "distance": self.distance,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.parameters, state["parameters"])
        for own in ("matrices", "codes"):
            setattr(self, own, {cell: [t.cpu().numpy() for t in state[own][cell]] for cell in self.cells})
        for own in ("support", "values", "columns"):
            for cell in self.cells:
                getattr(self, own)[cell].copy_(state[own][cell])
        self.masks = {cell: tuple(mask) for cell, mask in state["masks"].items()}
        self.gap, self.moved = state["gap"], state["moved"]
        self.distance = state.get("distance", math.nan)  # release 0.1.0 has the largest one only


class Ista:
    """Two-stage ISTA-NAS: Adam on b with validation batches, and a new support in every epoch or every n steps."""

    name = "ista"
    frozen = False

    def __init__(self, space: Space, settings: TwoStageSettings, device: torch.device) -> None:
        self.settings, self.clips_together = settings, settings.clip_together
        self.codes = Codes(space, settings, device)
        self.parameters = self.codes.parameters
        self.optimizer = code_optimizer(self.parameters, settings)
        self.steps = 0

    def begin_epoch(self, epoch: int) -> None:
        if not self.settings.recover_every or not self.codes.masks:
            self.codes.recover()

    def weights(self) -> Weights:
        return self.codes.weights()

    def active_paths(self) -> Masks | None:
        return self.codes.masks

    def needs_zeroed_paths(self, step: int) -> bool:
        return False

    def update(self, grads: list[Tensor]) -> None:
        for b, g in zip(self.parameters, grads):
            b.grad = g
        self.optimizer.step()
        self.steps += 1
        if self.settings.recover_every and self.steps % self.settings.recover_every == 0:
            self.codes.recover()

    @torch.no_grad()
    def point(self) -> dict[str, Tensor]:
        return dict(self.weights())

    def genotype(self) -> AnyGenotype:
        return self.codes.genotype()

    def log(self) -> dict[str, float]:
        norm = float(torch.cat(self.parameters).detach().norm(dim=1).mean())
        moved = {"moved": self.codes.moved, "distance": self.codes.distance}
        return {"recovery_gap": self.codes.gap, **moved, "b_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        return {"codes": self.codes.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.codes.load_state_dict(state["codes"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def code_optimizer(parameters: list[nn.Parameter], settings: CodeSettings) -> torch.optim.Adam:
    """Adam for the compressed variables."""
    return torch.optim.Adam(parameters, settings.arch_lr, (0.5, 0.999), weight_decay=settings.arch_decay, foreach=True)


def measurement_matrix(kind: str) -> Any:
    """A function (rows, columns) -> random measurement matrix in float64, from torch's random numbers."""

    def uniform(rows: int, columns: int) -> np.ndarray:
        return torch.rand(rows, columns, dtype=torch.float64).numpy()

    def gaussian(rows: int, columns: int) -> np.ndarray:
        drawn = torch.randn(rows, columns, dtype=torch.float64)
        return (drawn / drawn.norm(dim=0)).numpy()

    return {"uniform": uniform, "gaussian": gaussian}[kind]
