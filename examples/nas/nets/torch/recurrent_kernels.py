"""A matrix product, a node of a recurrent cell, and the loss over a vocabulary, each with its own gradient for a CPU.

PyTorch computes float32 products by MKL, which has half the speed of oneDNN on AMD processors; both are part of PyTorch. In
PyTorch's own operations a node takes forty passes over tensors of (sources, batch, hidden) and keeps most of them for the
gradient, and the loss keeps three tensors of the probabilities of all words at all places. All functions can be differentiated
twice; second derivatives and other devices use PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("tanh", torch.tanh),
    ("relu", torch.relu),
    ("sigmoid", torch.sigmoid),
    ("identity", lambda x: x),
)
ROWS = 512  # of the loss computed at a time: their scores for a vocabulary of 10 000 fit into the cache
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x @ y for matrices (M, K) and (K, N)."""
    return _Product.apply(x, y) if use_custom_gradient(x) else x @ y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, without a gradient. Transposed arguments are free; a slice of columns is copied."""
    if ONEDNN and x.dtype == torch.float32 and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, y)
        return _linear(x, y.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        to_x, to_y = ctx.needs_input_grad
        return product(grad, y.t()) if to_x else None, product(x.t(), grad) if to_y else None


def node(used: Sequence[int], mixing: Tensor, weight: Tensor, mask: Tensor | None, sources: Sequence[Tensor]) -> Tensor:
    """Return the sum of the paths into a node of a recurrent cell:

        sum_j sum_o mixing[j, o] (s_j + sigmoid(c_j) (f_o(h_j) - s_j)),    [c_j, h_j] = (s_j * mask) weight

    Args:
      used: indices of the operations o in the sum; the other columns of `mixing` are treated as 0.
      mixing: (sources, 4), in the order tanh, relu, sigmoid, identity.
      weight: (hidden, 2 hidden). mask: (batch, hidden) or None for 1. sources: tensors (batch, hidden).
    """
    if use_custom_gradient(weight):
        return _Node.apply(tuple(used), mixing, weight, mask, *sources)
    return node_reference(used, mixing, weight, mask, sources)


def node_reference(used: Sequence[int], mixing: Tensor, weight: Tensor, mask: Tensor | None, sources: Sequence[Tensor]) -> Tensor:
    """The same as `node`, in PyTorch's own operations."""
    s = torch.stack(list(sources))
    c, h = ((s if mask is None else s * mask) @ weight).chunk(2, -1)
    shares = torch.stack([mixing[:, o] for o in used], 1)  # an index that is a list would be copied to the device each time
    mixed = sum(shares[:, k, None, None] * ACTIVATIONS[o][1](h) for k, o in enumerate(used))
    return (s * shares.sum(1)[:, None, None] * (1 - c.sigmoid()) + c.sigmoid() * mixed).sum(0)


def use_custom_gradient(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, used: tuple[int, ...], mixing: Tensor, weight: Tensor, mask: Tensor | None, *sources: Tensor
    ) -> Tensor:
        s, width = torch.stack(sources), weight.shape[0]
        x = s if mask is None else s * mask
        c, h = _linear(x.view(-1, width), weight.t()).view(len(s), -1, 2 * width).chunk(2, -1)
        gate = torch.sigmoid(c)
        values = [_value(o, h) for o in used]
        shares = mixing[:, list(used), None, None]
        weighted = values[0] * shares[:, 0]  # sum_o mixing (f_o(h) - s)
        for k in range(1, len(used)):
            weighted.addcmul_(values[k], shares[:, k])
        carry = shares.sum(1)
        weighted.addcmul_(s, carry, value=-1)
        ctx.used, ctx.masked, ctx.count = used, mask is not None, len(sources)
        ctx.save_for_backward(mixing, weight, s if mask is None else mask, *sources, s, x, gate, weighted, *values)
        return torch.sum(gate * weighted, 0) + (carry.flatten() @ s.view(len(s), -1)).view_as(s[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        mixing, weight, mask, *rest = ctx.saved_tensors
        sources, (s, x, gate, weighted, *values) = rest[: ctx.count], rest[ctx.count :]
        mask = mask if ctx.masked else None
        _, wants_mixing, wants_weight, _, *wants_sources = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative
            out = lambda mixing, weight, *sources: node_reference(ctx.used, mixing, weight, mask, sources)
            wants = (wants_mixing, wants_weight, *wants_sources)
            each = _partial(out, (mixing, weight, *sources), wants, grad)
            return None, each[0], each[1], None, *each[2:]
        width, shares = weight.shape[0], mixing[:, list(ctx.used), None, None]
        through = grad * gate
        past = grad - through
        to_both = torch.empty(*s.shape[:2], 2 * width, dtype=s.dtype)
        to_c, to_h = to_both.chunk(2, -1)
        torch.ops.aten.sigmoid_backward.grad_input(grad * weighted, gate, grad_input=to_c)
        torch.mul(_slope(ctx.used[0], through, values[0]), shares[:, 0], out=to_h)
        for k, o in enumerate(ctx.used[1:], 1):
            to_h.addcmul_(_slope(o, through, values[k]), shares[:, k])
        to_both = to_both.view(-1, 2 * width)
        to_mixing = to_weight = None
        if wants_mixing:
            stays = _dots(past, s)
            to_mixing = torch.zeros_like(mixing)
            for k, o in enumerate(ctx.used):
                to_mixing[:, o] = _dots(through, values[k]) + stays
        if wants_weight:
            to_weight = _linear(x.view(-1, width).t(), to_both.t())
        to_x = _linear(to_both, weight).view_as(s)
        past.mul_(shares.sum(1))
        to_sources = past.add_(to_x) if mask is None else past.addcmul_(to_x, mask)
        return None, to_mixing, to_weight, None, *to_sources.unbind()


def _value(operation: int, h: Tensor) -> Tensor:
    """An operation of h, in new memory. tanh is computed by sigmoid, which is ten times faster in PyTorch."""
    name, function = ACTIVATIONS[operation]
    if name == "tanh":
        return torch.sigmoid(2 * h).mul_(2).sub_(1)
    return function(h).contiguous()


def _slope(operation: int, grad: Tensor, value: Tensor) -> Tensor:
    """grad times the derivative of an operation, computed from its value."""
    name = ACTIVATIONS[operation][0]
    if name == "tanh":
        return torch.ops.aten.tanh_backward(grad, value)
    if name == "sigmoid":
        return torch.ops.aten.sigmoid_backward(grad, value)
    return torch.ops.aten.threshold_backward(grad, value, 0) if name == "relu" else grad


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each source."""
    return torch.linalg.vecdot(a.view(len(a), -1), b.view(len(b), -1))  # bmm takes five times as long


def vocabulary_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of softmax(x weight^T + bias): x (N, hidden), weight (words, hidden), targets (N,)."""
    if use_custom_gradient(x):
        return _VocabularyLoss.apply(x, weight, bias, targets)
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets)


class _VocabularyLoss(torch.autograd.Function):
    """Computes the gradient together with the loss, some rows at a time, so that no probabilities are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_x = torch.empty_like(x) if wants_x else None
        to_weight = torch.zeros_like(weight) if wants_weight else None
        to_bias = torch.zeros_like(bias) if wants_bias else None
        total, n = x.new_zeros((), dtype=torch.float64), len(x)
        for start in range(0, n, ROWS):
            rows = slice(start, start + ROWS)
            part, wanted = x[rows], targets[rows, None]
            scores = _linear(part, weight, bias)
            top = scores.amax(1, keepdim=True)
            total += (top - scores.gather(1, wanted)).sum()
            chances = scores.sub_(top).exp_()
            sums = chances.sum(1, keepdim=True)
            total += sums.log().sum()
            if not any(ctx.needs_input_grad):
                continue
            chances.mul_(1 / (n * sums))  # d loss / d scores but for the targets
            chances.scatter_add_(1, wanted, chances.new_full((), -1 / n).expand(len(part), 1))
            if to_x is not None:
                to_x[rows] = _linear(chances, weight.t())
            if to_weight is not None:
                to_weight.add_(_linear(chances.t(), part.t()))
            if to_bias is not None:
                to_bias.add_(chances.sum(0))
        ctx.save_for_backward(x, weight, bias, targets)
        ctx.grads = (to_x, to_weight, to_bias)
        return (total / n).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for a second derivative
            *inputs, targets = ctx.saved_tensors
            return *_partial(lambda *args: F.cross_entropy(F.linear(*args), targets), inputs, wanted, grad), None
        return *(None if g is None else g * grad for g in ctx.grads), None


def _partial(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Differentiable gradients of function(*inputs), None for inputs that need none.

    An input may depend on another one; a view of each separates its direct influence on the function from that.
    """
    own = [t.view_as(t) for t in inputs]
    found = iter(torch.autograd.grad(function(*own), [t for t, w in zip(own, wanted) if w], grad, create_graph=True))
    return [next(found) if w else None for w in wanted]
