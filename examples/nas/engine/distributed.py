"""Data-parallel runs under torchrun: every process works on its share of each batch, and all hold the same architecture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process works on."""

    rank: int = 0
    world: int = 1


WHOLE_BATCH = Share()


@dataclass(frozen=True)
class Processes:
    """One process of `world`. With one, nothing is sent."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
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
        """Replace every tensor by its sum over the processes, all in one message."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))

    def average_buffers(self, net: nn.Module) -> None:
        """Running statistics, of which each process has seen other images."""
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

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


SINGLE_PROCESS = Processes()


def require_single_process(processes: Processes) -> None:
    """Raise ValueError under torchrun: hidden states of several processes would not fit into one checkpoint."""
    if processes.world > 1:
        raise ValueError(f"text is read by one process; start it without torchrun, got {processes.world} processes")


def join_processes(device: str) -> tuple[Processes, torch.device]:
    """The process that torchrun made of this one, and its device ("auto": CUDA where there is some).

    Raises:
      ValueError: another device than auto, cpu or cuda, or cuda where there is none.
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
