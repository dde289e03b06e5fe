"""A small network with its data, and comparisons of states, for the tests of the callbacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from proxopt import GroupL2
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD, groups

FEATURES = 8
MAKERS = {
    "AdamHAPG": lambda p: AdamHAPG(p, lr=0.01),
    "HAPG": lambda p: HAPG(p, lr=0.05),
    "ProxSGD tau": lambda p: ProxSGD(p, lr=0.5, tau=5.0),
    "ProxAdam": lambda p: ProxAdam(p, lr=0.01),
    "Proximal": lambda p: Proximal(torch.optim.SGD(p, lr=0.05, momentum=0.9)),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 1))


def examples(number: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, FEATURES, generator=generator)
    return x, x[:, :1] * x[:, 1:2] + x[:, 2:3]


def optimizer_of(name: str, net: nn.Module, strength: float = 0.02):
    """An optimizer with one group for each hidden unit."""
    return MAKERS[name](groups.coupled(net, torch.zeros(2, FEATURES), GroupL2(strength)))


def differing(a, b, where: str = "") -> list[str]:
    """The places at which two nested states are not equal bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a))} and {sorted(map(str, b))}"]
        return [place for key in a for place in differing(a[key], b[key], f"{where}[{key!r}]")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        parts = [] if len(a) == len(b) else [f"{where}: {len(a)} and {len(b)} items"]
        return parts + [place for i, (v, w) in enumerate(zip(a, b)) for place in differing(v, w, f"{where}[{i}]")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [f"{where}: {a} and {b}"]
    return [] if type(a) is type(b) and a == b else [f"{where}: {a!r} and {b!r}"]


def zeros(state: dict[str, Tensor]) -> int:
    """The zero entries of a state_dict."""
    return sum(int((t == 0).sum()) for t in state.values())
