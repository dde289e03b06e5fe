"""Many small tensors of one shape, updated as one stacked tensor.

A step takes many calls of torch functions, and for a small tensor the calls cost more than the arithmetic. For a stack they are
made once. The parameters stay separate tensors, because users and modules refer to them; their states become views of the
stacked states. Stacks serve where ``proxopt_torch.compiled`` does not: on a GPU, without numba, and for penalties that declare no
``Shrinkage``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proxopt import ProxOperator
from proxopt.penalties import declared
from proxopt_torch import kernels
from proxopt_torch.param_groups import Entry, ParamGroup

if TYPE_CHECKING:
    from proxopt_torch.base import ProximalOptimizer

SMALL = 1 << 14  # entries; the arithmetic of a larger tensor costs more than its calls
FEW = 4  # tensors; with fewer of one shape, copying into a stack costs more than it saves


@dataclass
class Stack:
    """Parameters of one shape (n of them), their states with a first axis of length n, and the step count of each."""

    params: list[Tensor]
    state: dict[str, Tensor]
    steps: list[Tensor]

    def is_current(self, optimizer: ProximalOptimizer, names: tuple[str, ...]) -> bool:
        """Whether the states of the optimizer are still views of this stack.

        Users and checkpoints may replace a state. They replace all of them, so that the first and the last show it.
        """
        for i in (0, -1):
            state = optimizer.state.get(self.params[i], {})
            if state.get("step") is not self.steps[i]:
                return False
            if any(state[n].data_ptr() != self.state[n][i].data_ptr() for n in names if n in state):
                return False
        return True


def split(
    optimizer: ProximalOptimizer, group: ParamGroup, penalty: ProxOperator | None, present: list[Entry]
) -> tuple[list[Stack], list[Entry]]:
    """Divide the entries of a group that have gradients into stacks and entries that are updated alone."""
    if group["foreach"] is False or len(present) < FEW or optimizer._kernel is None or not stackable(penalty, present):
        return [], present
    cache = optimizer.__dict__.setdefault("_stacks", {})
    params, stacks, alone = cache.get(id(group), (None, [], []))
    if params is None or not _is_current(optimizer, group, present, params, stacks):
        stacks, alone = _build(optimizer, group, present)
        cache[id(group)] = ([entry[0] for entry in present], stacks, alone)
    return stacks, alone


def _is_current(
    optimizer: ProximalOptimizer, group: ParamGroup, present: list[Entry], params: list[Tensor], stacks: list[Stack]
) -> bool:
    """Whether stacks that were built for ``params`` serve for the entries that have gradients now."""
    same = len(params) == len(present) and all(p is entry[0] for p, entry in zip(params, present))
    names = optimizer._state_names(group)
    return same and all(stack.is_current(optimizer, names) for stack in stacks)


def stackable(penalty: ProxOperator | None, present: list[Entry]) -> bool:
    """Whether the penalty has a form that acts on each tensor of a stack separately."""
    ndim = max(entry[0].ndim for entry in present)
    return ndim > 0 and (penalty is None or declared.batched(penalty, ndim) is not None)


def gather(stack: Stack) -> Tensor:
    """The gradients of the stack, of shape (n, ...)."""
    return torch.stack([p.grad for p in stack.params if p.grad is not None])


def step(optimizer: ProximalOptimizer, group: ParamGroup, penalty: ProxOperator | None, stack: Stack, grad: Tensor) -> None:
    """Update all parameters of a stack."""
    assert optimizer._kernel is not None
    # the kernel needs parameters and states in the same layout; the states of a stack are contiguous
    x = torch.stack(stack.params).contiguous()
    if penalty is not None:
        penalty = declared.batched(penalty, stack.params[0].ndim)
    # a copy of the step count: the kernel increments it, and below all of them are incremented at once
    state: dict[str, Any] = {**stack.state, "step": stack.steps[0].clone()}
    kernels.run(optimizer._kernel, group, penalty, x, optimizer.descent(group, x, grad), state)
    torch._foreach_add_(stack.steps, 1)
    torch._foreach_copy_(stack.params, list(x.unbind()))


def _build(optimizer: ProximalOptimizer, group: ParamGroup, present: list[Entry]) -> tuple[list[Stack], list[Entry]]:
    """Stacks of parameters with equal shape, dtype, device and step count, and the entries that are in none."""
    buckets: dict[Any, list[Tensor]] = defaultdict(list)
    alone = []
    for entry in present:
        p = entry[0]
        if kernels.fits(group, entry) and p.ndim > 0 and (p.numel() <= SMALL or group["foreach"]):
            count = int(optimizer._states(group, entry)[0]["step"].item())
            buckets[p.shape, p.dtype, p.device, count].append(p)
        else:
            alone.append(entry)
    stacks = []
    for params in buckets.values():
        if len(params) < FEW:
            alone += [[p] for p in params]
        else:
            stacks.append(_stack(optimizer, group, params))
    return stacks, alone


def _stack(optimizer: ProximalOptimizer, group: ParamGroup, params: list[Tensor]) -> Stack:
    """Copy the states of the parameters into stacked tensors, and replace them by views of these."""
    states = [optimizer.state[p] for p in params]
    stacked = {name: torch.stack([s[name] for s in states]).contiguous() for name in optimizer._state_names(group)}
    for name, tensor in stacked.items():
        for s, view in zip(states, tensor.unbind()):
            s[name] = view
    return Stack(params, stacked, [s["step"] for s in states])
