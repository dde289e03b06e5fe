"""The search network and loop of DARTS, transcribed from the published code: the reference for benchmarks and tests.

Every edge computes every operation separately and multiplies its result by its weight. Layout, names and order of the parameters
follow the published code (Liu, Simonyan, Yang, 2019); `linear` is the sparse supernet: seven operations, and weights without a
softmax.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class ReLUConvBN(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def separable(channels: int, kernel: int, stride: int, padding: int, dilation: int) -> list[nn.Module]:
    return [
        nn.ReLU(inplace=False),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=False),
    ]


def dil_conv(channels: int, kernel: int, stride: int) -> nn.Module:
    return nn.Sequential(*separable(channels, kernel, stride, kernel - 1, 2))


def sep_conv(channels: int, kernel: int, stride: int) -> nn.Module:
    pad = kernel // 2
    return nn.Sequential(*separable(channels, kernel, stride, pad, 1), *separable(channels, kernel, 1, pad, 1))


class Zero(nn.Module):
    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def operation(name: str, channels: int, stride: int) -> nn.Module:
    made: nn.Module
    if name == "none":
        made = Zero(stride)
    elif name == "skip_connect":
        made = nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    elif name == "max_pool_3x3":
        made = nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(channels, affine=False))
    elif name == "avg_pool_3x3":
        pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        made = nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False))
    else:
        make = {"sep": sep_conv, "dil": dil_conv}[name[:3]]
        made = make(channels, int(name[-1]), stride)
    return made


class MixedOp(nn.Module):
    def __init__(self, channels: int, stride: int, primitives: tuple[str, ...]):
        super().__init__()
        self._ops = nn.ModuleList(operation(name, channels, stride) for name in primitives)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops))  # type: ignore[return-value]


class Cell(nn.Module):
    def __init__(self, c_pp: int, c_p: int, c: int, reduction: bool, reduction_prev: bool, primitives: tuple[str, ...]):
        super().__init__()
        self.preprocess0 = FactorizedReduce(c_pp, c) if reduction_prev else ReLUConvBN(c_pp, c)
        self.preprocess1 = ReLUConvBN(c_p, c)
        self._ops = nn.ModuleList(MixedOp(c, 2 if reduction and j < 2 else 1, primitives) for i in range(4) for j in range(2 + i))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(4):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)  # type: ignore[arg-type]
        return torch.cat(states[-4:], dim=1)


class NaiveNetwork(nn.Module):
    """alphas_normal and alphas_reduce are (14, operations); forward(images) -> logits, as in the published code."""

    def __init__(self, channels: int = 16, layers: int = 8, classes: int = 10, linear: bool = False):
        super().__init__()
        primitives = PRIMITIVES[1:] if linear else PRIMITIVES
        self.linear = linear
        c_curr = 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(3, c_curr, 3, padding=1, bias=False), nn.BatchNorm2d(c_curr))
        c_pp, c_p, c_curr = c_curr, c_curr, channels
        self.cells = nn.ModuleList()
        self.reductions = []
        reduction_prev = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            c_curr *= 2 if reduction else 1
            self.cells.append(Cell(c_pp, c_p, c_curr, reduction, reduction_prev, primitives))
            self.reductions.append(reduction)
            c_pp, c_p, reduction_prev = c_p, 4 * c_curr, reduction
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c_p, classes)
        start = 1 / len(primitives) if linear else 0.0
        self.alphas_normal = nn.Parameter(start + 1e-3 * torch.randn(14, len(primitives)))
        self.alphas_reduce = nn.Parameter(start + 1e-3 * torch.randn(14, len(primitives)))

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for reduction, cell in zip(self.reductions, self.cells):
            alphas = self.alphas_reduce if reduction else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, alphas if self.linear else F.softmax(alphas, dim=-1))
        return self.classifier(self.global_pooling(s1).flatten(1))

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def weight_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("alphas")]


class NaiveSearch:
    """The loop: Adam for alpha on a validation batch (first order, or unrolled by one weight step), then SGD for the weights."""

    def __init__(self, net: NaiveNetwork, lr: float = 0.025, second_order: bool = False):
        self.net, self.lr, self.second_order = net, lr, second_order
        self.weights = torch.optim.SGD(net.weight_parameters(), lr, momentum=0.9, weight_decay=3e-4)
        self.alphas = torch.optim.Adam(net.arch_parameters(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def step(self, images: Tensor, labels: Tensor, val_images: Tensor, val_labels: Tensor) -> float:
        """Take a search step; return the training loss."""
        self.alphas.zero_grad()
        if self.second_order:
            self._unrolled(images, labels, val_images, val_labels)
        else:
            F.cross_entropy(self.net(val_images), val_labels).backward()
        self.alphas.step()
        self.weights.zero_grad()
        loss = F.cross_entropy(self.net(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.weight_parameters(), 5.0)
        self.weights.step()
        return loss.item()

    def _unrolled(self, images: Tensor, labels: Tensor, val_images: Tensor, val_labels: Tensor) -> None:
        net, params = self.net, self.net.weight_parameters()
        grads = torch.autograd.grad(F.cross_entropy(net(images), labels), params)
        unrolled = copy.deepcopy(net)
        with torch.no_grad():
            for q, p, g in zip(unrolled.weight_parameters(), params, grads):
                moment = self.weights.state[p].get("momentum_buffer", torch.zeros_like(p)) * 0.9
                q.copy_(p - self.lr * (moment + g + 3e-4 * p))
        unrolled.zero_grad()
        F.cross_entropy(unrolled(val_images), val_labels).backward()
        vector = [q.grad for q in unrolled.weight_parameters()]
        radius = 0.01 / torch.cat([v.reshape(-1) for v in vector]).norm()  # type: ignore[union-attr]
        sides = []
        for factor in (1.0, -2.0):
            with torch.no_grad():
                for p, v in zip(params, vector):
                    p.add_(factor * radius * v)  # type: ignore[operator]
            sides.append(torch.autograd.grad(F.cross_entropy(net(images), labels), net.arch_parameters()))
        with torch.no_grad():
            for p, v in zip(params, vector):
                p.add_(radius * v)  # type: ignore[operator]
        for a, b, plus, minus in zip(net.arch_parameters(), unrolled.arch_parameters(), *sides):
            assert b.grad is not None
            a.grad = b.grad - self.lr * (plus - minus) / (2 * radius)
