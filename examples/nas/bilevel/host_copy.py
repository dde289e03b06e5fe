"""Copies of small tensors from a device to the host that do not stop the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor, queued on its device behind everything that computes the tensor.

    The host waits only in `tolist`, and there not for what has been queued since. On devices other than CUDA, and on a CPU, the
    values are read at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = tensor.cpu()

    def tolist(self) -> list:
        """The values, once they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()
