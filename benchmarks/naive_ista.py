"""The two-stage search of ISTA-NAS, transcribed from the published code: the reference for benchmarks and tests.

Codes are computed by a loop over cvxpy problems and coefficients by Eq. 11 as printed; the host checks for every operation
whether its weight is zero. Layout and settings follow the published code (Yang et al., 2020), but the solver is the default one
of cvxpy instead of MOSEK.
"""

from __future__ import annotations

import numpy as np
import torch
from naive_darts import MixedOp, NaiveNetwork
from torch import Tensor, nn
from torch.nn import functional as F

NODES, OPERATIONS, ROWS, SPARSITY, STRENGTH = 4, 7, 7, 2, 1e-5


class SparseMixedOp(MixedOp):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops) if w != 0)  # type: ignore[return-value]


class NaiveIsta(nn.Module):
    """b_normal and b_reduce are (4, 7). Call `recover` before the first forward pass, and at the start of each epoch."""

    def __init__(self, channels: int = 16, layers: int = 8, classes: int = 10, seed: int = 0):
        super().__init__()
        self.net = NaiveNetwork(channels, layers, classes, linear=True)
        for module in self.net.modules():
            if isinstance(module, MixedOp):
                module.__class__ = SparseMixedOp
        del self.net.alphas_normal, self.net.alphas_reduce
        self.b = nn.ParameterList(nn.Parameter(1e-3 * torch.randn(NODES, ROWS)) for _ in range(2))
        rng = np.random.default_rng(seed)
        self.matrices = [[rng.uniform(size=(ROWS, OPERATIONS * (j + 2))) for j in range(NODES)] for _ in range(2)]
        self.codes: list[list[np.ndarray]] = []

    def recover(self) -> None:
        import cvxpy as cp  # imported here, so that the memory of a step can be measured without it

        self.codes = []
        for matrices, b in zip(self.matrices, self.b):
            codes = []
            for A, signal in zip(matrices, b.detach().double().cpu().numpy()):
                z = cp.Variable(A.shape[1])
                cp.Problem(cp.Minimize(0.5 * cp.sum_squares(A @ z - signal) + STRENGTH * cp.norm1(z))).solve(solver=cp.CLARABEL)
                code = z.value.copy()
                code[np.argsort(-np.abs(code))[SPARSITY:]] = 0
                codes.append(code)
            self.codes.append(codes)

    def coefficients(self, cell: int) -> Tensor:
        """The weights (14, 7) of the operations of each edge, zero outside the support."""
        rows = []
        for A, z, b in zip(self.matrices[cell], self.codes[cell], self.b[cell]):
            A_t, z_t = (torch.tensor(v, dtype=b.dtype, device=b.device) for v in (A, z))
            E = A_t.T @ A_t - torch.eye(len(z), dtype=b.dtype, device=b.device)
            active = torch.tensor(z != 0, device=b.device)
            rows.append(torch.where(active, b @ A_t - z_t @ E, torch.zeros_like(z_t)))
        return torch.cat(rows).reshape(-1, OPERATIONS)

    def forward(self, x: Tensor) -> Tensor:
        weights = [self.coefficients(0), self.coefficients(1)]
        s0 = s1 = self.net.stem(x)
        for reduction, cell in zip(self.net.reductions, self.net.cells):
            s0, s1 = s1, cell(s0, s1, weights[reduction])
        return self.net.classifier(self.net.global_pooling(s1).flatten(1))


class NaiveIstaSearch:
    """The loop: Adam for b on a validation batch, then SGD for the weights on a training batch."""

    def __init__(self, model: NaiveIsta, lr: float = 0.1):
        self.model = model
        self.weights = torch.optim.SGD(model.net.parameters(), lr, momentum=0.9, weight_decay=3e-4)
        self.b = torch.optim.Adam(model.b.parameters(), lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def step(self, images: Tensor, labels: Tensor, val_images: Tensor, val_labels: Tensor) -> float:
        """Take a search step; return the training loss."""
        self.b.zero_grad()
        F.cross_entropy(self.model(val_images), val_labels).backward()
        self.b.step()
        self.weights.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.weights.step()
        return loss.item()
