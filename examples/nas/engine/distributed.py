"""Data-parallel runs under torchrun: every process computes its share of each batch; the architecture is the same in all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Share:
    """The part of every batch that a process computes."""

    rank: int = 0
    world: int = 1


WHOLE_BATCH = Share()


@dataclass(frozen=True)
class Processes:
    """One of `world` processes. With a single process there is no communication."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        return Share(self.rank, self.world)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes."""
        self.total(tensors)
        if self.world > 1 and tensors:
            torch._foreach_div_(list(tensors), self.world)

    @torch.no_grad()
    def total(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, in one all-reduce for all tensors."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))

    def average_buffers(self, net: nn.Module) -> None:
        """Average the running statistics, which each process computed from its own images."""
        self.average([b for b in net.buffers() if b.is_floating_point()])

    def check_same(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Raise RuntimeError unless the tensors are the same on all processes, bit for bit."""
        if self.world == 1:
            return
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        others = [torch.empty_like(flat) for _ in range(self.world)]
        dist.all_gather(others, flat)
        different = [rank for rank, other in enumerate(others) if not torch.equal(other, others[0])]
        if different:
            raise RuntimeError(f"{name} must be the same on all processes, but differs from rank 0 on ranks {different}")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes. All of them must call this."""
        if self.world == 1:
            return flag
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        found = torch.tensor(float(flag), device=device)
        dist.all_reduce(found)
        return bool(found > 0)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.world > 1:
            dist.barrier()


SINGLE_PROCESS = Processes()


def require_single_process(processes: Processes, reason: str = "text is read by one process") -> None:
    """Raise ValueError under torchrun. reason: by default that a checkpoint has the hidden states of one process only."""
    if processes.world > 1:
        raise ValueError(f"{reason}; start it without torchrun, got {processes.world} processes")


def join_processes(device: str) -> tuple[Processes, torch.device]:
    """Join the process group if torchrun started this process; return the process and its device.

    device: auto (CUDA where available), cpu or cuda.

    Raises:
      ValueError: an unknown device, or cuda on a machine without it.
    """
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        there = "auto, cpu, cuda" if torch.cuda.is_available() else "auto, cpu (this machine has no CUDA)"
        raise ValueError(f"device must be one of {there}, got {device!r}")
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return SINGLE_PROCESS, torch.device("cuda" if cuda else "cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(own)
    return Processes(dist.get_rank(), dist.get_world_size()), own
