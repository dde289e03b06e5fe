"""Many small tensors of one shape, stepped as one stacked tensor: the cost of a step is per stack, not per tensor.

The parameters stay what they are; their states become views of the stacked ones.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxopt.penalties import declared
from proxopt_torch import kernels

SMALL = 1 << 14  # entries; above it a tensor is worth its own calls
FEW = 4  # fewer of one shape are stepped one by one


@dataclass
class Stack:
    """params: the stacked parameters. state: their states, stacked. steps: the step count of each."""

    params: list[Tensor]
    state: dict[str, Tensor]
    steps: list[Tensor]

    def holds(self, optimizer: Any, names: tuple[str, ...]) -> bool:
        """Whether the optimizer's states are still the views made here."""
        for i in (0, -1):
            state = optimizer.state.get(self.params[i], {})
            if state.get("step") is not self.steps[i]:
                return False
            if any(state[n].data_ptr() != self.state[n][i].data_ptr() for n in names if n in state):
                return False
        return True


def split(optimizer: Any, group: dict, penalty: Any, live: list[list[Tensor]]) -> tuple[list[Stack], list[list[Tensor]]]:
    """The stacks among the entries of a group, and the entries that stay alone."""
    if group["foreach"] is False or len(live) < FEW or optimizer._kernel is None or not stackable(penalty, live):
        return [], live
    known = optimizer.__dict__.setdefault("_stacks", {}).get(id(group))
    if known is not None:
        seen, stacks, rest = known
        names = optimizer._tensors(group)
        if (
            len(seen) == len(live)
            and all(a is b[0] for a, b in zip(seen, live))
            and all(s.holds(optimizer, names) for s in stacks)
        ):
            return stacks, rest
    stacks, rest = _build(optimizer, group, live)
    optimizer._stacks[id(group)] = ([e[0] for e in live], stacks, rest)
    return stacks, rest


def stackable(penalty: Any, entries: list[list[Tensor]]) -> bool:
    """Whether the prox of a stack can be the stack of the proxes."""
    ndim = max(entry[0].ndim for entry in entries)
    return ndim > 0 and (penalty is None or declared.batched(penalty, ndim) is not None)


def gather(stack: Stack) -> Tensor:
    """The gradients of the stack, stacked."""
    return torch.stack([p.grad for p in stack.params])  # type: ignore[misc]


def step(optimizer: Any, group: dict, penalty: Any, stack: Stack, grad: Tensor) -> None:
    """One step of all parameters of the stack."""
    x = torch.stack(stack.params).contiguous()  # the layout of the stacked state, whatever that of the parameters
    if penalty is not None:
        penalty = declared.batched(penalty, stack.params[0].ndim)
    state: dict[str, Any] = {**stack.state, "step": stack.steps[0].clone()}
    kernels.run(optimizer._kernel, group, penalty, x, optimizer.descent(group, x, grad), state)
    torch._foreach_add_(stack.steps, 1)
    torch._foreach_copy_(stack.params, list(x.unbind()))


def _build(optimizer: Any, group: dict, live: list[list[Tensor]]) -> tuple[list[Stack], list[list[Tensor]]]:
    buckets: dict[Any, list[Tensor]] = defaultdict(list)
    rest = []
    for entry in live:
        p = entry[0]
        if kernels.fits(group, entry) and p.ndim > 0 and (p.numel() <= SMALL or group["foreach"]):
            count = int(optimizer._states(group, entry)[0]["step"].item())
            buckets[p.shape, p.dtype, p.device, count].append(p)
        else:
            rest.append(entry)
    stacks = []
    for members in buckets.values():
        if len(members) < FEW:
            rest += [[p] for p in members]
            continue
        states = [optimizer.state[p] for p in members]
        stacked = {name: torch.stack([s[name] for s in states]).contiguous() for name in optimizer._tensors(group)}
        for name, tensor in stacked.items():
            for s, view in zip(states, tensor.unbind()):
                s[name] = view
        stacks.append(Stack(members, stacked, [s["step"] for s in states]))
    return stacks, rest
