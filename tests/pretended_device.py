"""A CUDA device that this machine does not have, pretended: code takes the paths of a device, and mixing devices is an error.

    with pretended() as device:
        net = net.to("cuda")                         # the memory is the CPU's, but the tensors say that they are on cuda:0
        net(x)                                       # RuntimeError unless x is there too

What a tensor says of its device, where factories and copies put their results, and which tensors an operation takes together
are as with CUDA: a CPU tensor without axes may meet tensors of the device, CPU indices may pick from one, and no others. A value
that the host reads counts in `device.reads`, a copy from the host in `device.uploads`: there a real device and its host wait for
one another. Kernels, their rounding, streams, graphs and the compiler are not pretended: `tests/gpu/test_gpu.py` needs a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace, torch.logspace),
    *(torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy),
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal),
}
UPLOADS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
COPIES = {"aten::copy_", "aten::_foreach_copy_", "aten::set_"}
PICKS = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
JOINS = {"aten::cat", "aten::stack"}
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


class Device:
    """Where the storages are. `None` is a place that is not known: a tensor that was made inside an operation, for its result."""

    def __init__(self) -> None:
        self.places: dict[int, tuple[Any, torch.device | None]] = {}  # by address, which a weak reference keeps taken
        self.reads = self.uploads = self.operations = 0
        self.waits: list[int] = []  # of events: how many operations were queued since each
        self.running: Any = None  # the function that Python called

    def of(self, tensor: Tensor) -> torch.device | None:
        return self.places.get(tensor.untyped_storage()._cdata, (None, CPU))[1]

    def put(self, tensor: Tensor, place: torch.device | None) -> None:
        storage = tensor.untyped_storage()
        self.places[storage._cdata] = (StorageWeakRef(storage), place)

    def holds(self, tensor: Tensor) -> bool:
        return self.of(tensor) == CUDA


class Checked(TorchDispatchMode):
    """Every operation, those of a backward pass too: refuses what CUDA refuses, and notes where the results are."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            device, name = self.device, func._schema.name
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            known = [t for t in inputs if device.of(t) is not None]
            places = {device.of(t) for t in known}
            if len(places) > 1 and name not in COPIES:
                self.refuse(name, func, known)
            device.reads += name in READS and CUDA in places
            device.operations += CUDA in places
            if name == "aten::copy_" and device.holds(args[1]) and not device.holds(args[0]):
                device.reads += not (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False))
            if name in PICKS:
                place = device.of(inputs[0])
            elif places:
                place = CUDA if CUDA in places else CPU
            else:
                place = CPU if device.running in FACTORIES and not inputs else None
            out = func(*args, **(kwargs or {}))
            taken = {t.untyped_storage()._cdata for t in known}
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.untyped_storage()._cdata not in taken and name not in COPIES:
                    device.put(t, place)
            return out

    def refuse(self, name: str, func: Any, tensors: list[Tensor]) -> None:
        there = [self.device.holds(t) for t in tensors]
        if name in PICKS and there[0]:
            self.device.uploads += 1
            return
        scalars = [t.ndim == 0 and name not in JOINS for t in tensors]
        writes_here = func._schema.is_mutable and not there[0]
        if writes_here or not all(on or scalar for on, scalar in zip(there, scalars)):
            shapes = ", ".join(f"{tuple(t.shape)} on {self.device.of(t)}" for t in tensors)
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {shapes}")


class Redirected(TorchFunctionMode):
    """What names a device: factories, copies, generators, and the question where a tensor is."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.device.running = self.device.running, func
        try:
            return self.answer(func, args, dict(kwargs or {}))
        finally:
            self.device.running = before

    def answer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        device = self.device
        if func == torch.Tensor.device.__get__:
            return device.of(args[0]) or CPU
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return device.holds(args[0]) == (func == torch.Tensor.is_cuda.__get__)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and device.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func is torch.Tensor.tolist:
            device.reads += device.holds(args[0])
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            return self.move(args[0], CUDA if func is torch.Tensor.cuda else CPU)
        if func is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if func is torch.Tensor.__deepcopy__:
            out = func(*args, **kwargs)
            device.put(out, device.of(args[0]))
            return out
        if func is torch.Tensor.new_tensor:
            kwargs.setdefault("device", device.of(args[0]))
        kwargs.pop("pin_memory", None)
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if kwargs.get("generator") is not None:
            place = wanted or (device.of(args[0]) if isinstance(args[0], Tensor) else CPU) or CPU
            if kwargs["generator"].device.type != place.type:
                raise RuntimeError(f"Expected a {place.type!r} generator but found one of {kwargs['generator'].device.type!r}")
        if wanted is None or wanted.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        out = func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
        if func in UPLOADS and any(isinstance(a, Tensor) for a in args[:1]):
            return self.move(out, wanted)
        device.put(out, CUDA if wanted.type == "cuda" else CPU)
        device.uploads += wanted.type == "cuda" and func in UPLOADS
        return out

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places = [torch.device(a) for a in args if isinstance(a, (str, torch.device))]
        rest = [a for a in args if a is not None and not isinstance(a, (str, torch.device, bool))]  # a bool is `non_blocking`
        if rest and isinstance(rest[0], Tensor):
            places, rest = [self.device.of(rest[0]) or CPU], [rest[0].dtype]
        named = kwargs.pop("device", None)
        place = places[0] if places else None if named is None else torch.device(named)
        kwargs.pop("non_blocking", None)
        changed = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if place is None or place.type not in ("cpu", "cuda"):
            return changed if place is None else changed.to(place)
        return self.move(changed, place)

    def move(self, tensor: Tensor, place: torch.device) -> Tensor:
        there = self.device.of(tensor)
        if there is not None and there.type == place.type:
            return tensor
        out = tensor.clone()
        self.device.put(out, CUDA if place.type == "cuda" else CPU)
        self.device.uploads += place.type == "cuda"
        self.device.reads += place.type == "cpu"
        return out


class Event:
    """A place in the queue of the device."""

    def __init__(self, device: Device) -> None:
        self.device, self.reached = device, False

    def record(self) -> None:
        self.at = self.device.operations

    def synchronize(self) -> None:
        self.reached = True
        self.device.waits.append(self.device.operations - self.at)

    def elapsed_time(self, last: Event) -> float:
        assert last.reached
        return 2.0


class Generator(torch.Generator):
    """torch's generator of the CPU that says where it was asked for."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


@contextmanager
def pretended() -> Iterator[Device]:
    """Inside the block this machine has a CUDA device, as far as this file goes."""
    device = Device()
    real_load = torch.load

    def load(file: Any, map_location: Any = None, **options: Any) -> Any:
        found = real_load(file, map_location="cpu", **options)
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and map_location is not None:
                device.put(t, CUDA if torch.device(map_location).type == "cuda" else CPU)
        return found

    with ExitStack() as stack:
        for name, pretence in (
            ("Generator", Generator),
            ("load", load),
            ("cuda.is_available", lambda: True),
            ("cuda.get_device_name", lambda device=None: "a pretended device"),
            ("cuda.max_memory_allocated", lambda device=None: 0),
            ("cuda.get_rng_state", lambda device="cuda": torch.get_rng_state()),
            ("cuda.set_rng_state", lambda state, device="cuda": None),
            ("cuda.synchronize", lambda device=None: None),
            ("cuda.Event", lambda enable_timing=False: Event(device)),
        ):
            stack.enter_context(mock.patch(f"torch.{name}", pretence))
        stack.enter_context(Redirected(device))
        stack.enter_context(Checked(device))
        yield device
