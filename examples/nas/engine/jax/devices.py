"""The devices of a run in JAX, and its processes.

    devices = join_devices("auto")
    images = devices.replicate(images)                 # in the memory of every device
    batch = devices.split(batch)                       # inside of jax.jit: the first axis is divided over the devices

Every batch is split over all devices, and everything else is the same on each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")
PLATFORMS = {"auto": None, "cpu": "cpu", "cuda": "cuda", "gpu": "gpu", "tpu": "tpu"}


@dataclass(frozen=True)
class Hosts:
    """How the processes of a run on several hosts find each other: the arguments of `jax.distributed.initialize`.

    coordinator: HOST:PORT of process 0, or "auto" where JAX finds it, as on Cloud TPU and under Slurm. processes, process: their
    number and that of this one; not needed with "auto".

    Raises ValueError if they do not fit together.
    """

    coordinator: str
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        if self.coordinator == "auto":
            if self.processes is not None or self.process is not None:
                raise ValueError("processes and process are found by JAX with coordinator=auto, and must be left out")
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator must be auto or HOST:PORT, got {self.coordinator!r}")
        if self.processes is None or self.process is None or not 0 <= self.process < self.processes:
            raise ValueError(
                "process must lie in [0, processes) with a coordinator that is not auto,"
                f" got process {self.process} of {self.processes}"
            )

    def join(self) -> None:
        """Wait for the other processes. Must come before anything else that uses JAX.

        Raises ValueError if "auto" finds no coordinator here.
        """
        if self.coordinator == "auto":
            try:
                jax.distributed.initialize()
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"coordinator must be HOST:PORT where JAX finds none, got 'auto': {error}") from None
        else:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)


@dataclass(frozen=True)
class Devices:
    """All devices of all processes, in a mesh with one axis, "data"."""

    mesh: Mesh

    @property
    def count(self) -> int:
        return self.mesh.devices.size

    @property
    def world(self) -> int:
        """The number of processes."""
        return jax.process_count()

    @property
    def first(self) -> bool:
        """Whether this process shows progress and writes tables and reports."""
        return first_process()

    @property
    def replicated(self) -> NamedSharding:
        """The same on all devices."""
        return NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: Any) -> Any:
        """Copy arrays to every device. All processes must have the same ones."""
        if self.world == 1:
            return jax.device_put(tree, self.replicated)
        put = lambda x: jax.make_array_from_callback(np.shape(x), self.replicated, lambda part: np.asarray(x)[part])
        return jax.tree.map(lambda x: x if is_key(x) else put(x), tree)

    def split(self, tree: Any, axis: int = 0) -> Any:
        """Divide an axis of arrays over the devices; inside of ``jax.jit``."""
        split = NamedSharding(self.mesh, PartitionSpec(*axis * [None], "data"))
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, split), tree)

    def check_divisible(self, name: str, count: int) -> None:
        """Raise ValueError unless every device gets the same part of a batch."""
        if count % self.count:
            raise ValueError(f"{name} must be a multiple of the {self.count} devices, got {count}")

    def from_first(self, flag: bool) -> bool:
        """The flag of the first process. All processes must call this."""
        return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes. All of them must call this."""
        return flag if self.world == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())

    def all_same(self, *flags: bool) -> bool:
        """Whether the flags are the same in all processes. All of them must call this."""
        if self.world == 1:
            return True
        found = multihost_utils.process_allgather(np.array(flags))
        return bool((found == found[0]).all())

    def first_then_others(self, read: Callable[[], T]) -> T:
        """Call ``read`` in the first process, and then in the others, which find what it downloads to a folder they share."""
        if not self.first:
            self.wait()
        try:
            return read()
        finally:  # also where it fails: the others must not wait for ever
            if self.first:
                self.wait()

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.world > 1:
            multihost_utils.sync_global_devices("wait")


def first_process() -> bool:
    """Whether this process prints and writes tables: the only one, or number 0."""
    return jax.process_index() == 0


def join_devices(device: str) -> Devices:
    """The devices of this kind: auto (the fastest that JAX finds), cpu, cuda, gpu or tpu.

    Raises:
      ValueError: an unknown kind, or one that is not there.
    """
    if device not in PLATFORMS:
        raise ValueError(f"device must be one of {', '.join(PLATFORMS)}, got {device!r}")
    try:
        found = jax.devices(PLATFORMS[device])
    except RuntimeError as error:
        there = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ValueError(f"device must be one that JAX finds on this machine ({there}), got {device!r}: {error}") from None
    return Devices(Mesh(np.array(found), ("data",)))


def is_key(x: Any) -> bool:
    """Whether x is an array of random keys, which NumPy cannot hold."""
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
