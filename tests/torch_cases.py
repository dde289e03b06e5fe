"""Optimizers, penalties and a small problem that the torch tests share."""

import torch
from torch import nn

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, ProxSGD

MAKERS = {
    "ProxSGD": lambda p, **k: ProxSGD(p, lr=0.05, **k),
    "ProxSGD tau": lambda p, **k: ProxSGD(p, lr=0.1, tau=5.0, **k),
    "HAPG": lambda p, **k: HAPG(p, lr=0.05, **k),
    "HAPG as printed": lambda p, **k: HAPG(p, lr=0.05, extrapolation="as_printed", **k),
    "HAPG uncapped": lambda p, **k: HAPG(p, lr=0.05, extrapolation="nesterov", **k),
    "ProxAdam": lambda p, **k: ProxAdam(p, lr=0.01, **k),
    "ProxAdam decay": lambda p, **k: ProxAdam(p, lr=0.01, weight_decay=0.1, **k),
    "ProxAdamW": lambda p, **k: ProxAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, **k),
    "AdamHAPG": lambda p, **k: AdamHAPG(p, lr=0.01, **k),
}
COLUMNS = Groups.along(0)
PENALTIES = {
    "none": None,
    "l1": L1(0.02),
    "elastic": ElasticNet(0.02, 0.5),
    "group": GroupL2(0.02, COLUMNS),
    "rows": SparseGroupLasso(0.02, groups=Groups.along(1)),
    "whole": GroupL2(0.02, Groups.whole()),
    "sgl": SparseGroupLasso(0.02, 0.5, COLUMNS),
    "sgl inverse": SparseGroupLasso(0.05, 0.5, COLUMNS, weights="inverse_sqrt_size"),
    "sgl exact": SparseGroupLasso(0.02, 0.5, COLUMNS, metric="exact"),
    "sgl median": SparseGroupLasso(0.02, 0.5, COLUMNS, metric="median"),
    "sgl support": SparseGroupLasso(0.02, 0.5, Groups.along(1), metric="support"),
    "labels": GroupL2(0.02, Groups.labels([0, 1, 0, 1, 2, 2], axis=1)),
    "nested": Nested(L1(0.01), GroupL2(0.01, COLUMNS)),
}


class Foreign:
    """A penalty from elsewhere."""

    def value(self, x):
        return 0.01 * x.abs().sum()

    def prox(self, x, step):
        return torch.sign(x) * torch.clamp(x.abs() - 0.01 * step, min=0)


def problem(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) * 0.4)
    return net, torch.randn(32, 6, generator=generator, dtype=dtype), torch.randn(32, 3, generator=generator, dtype=dtype)


def groups_of(net, penalty):
    weights = [net[0].weight, net[4].weight]
    others = [p for p in net.parameters() if all(p is not w for w in weights)]
    return [{"params": weights, "penalty": penalty}, {"params": others}]


def train(optimizer, net, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        ((net(x) - y) ** 2).mean().backward()
        optimizer.step()


def snapshot(net, optimizer):
    with optimizer.at_prox_point():
        return [p.detach().clone() for p in net.parameters()]
