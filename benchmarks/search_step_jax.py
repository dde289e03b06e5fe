"""Steps of architecture searches in JAX, for `search_step.py --framework jax`: time, memory and compilation of a case.

A step is what a search runs: the compiled functions of `bilevel.jax.steps` and `methods.jax.gsparsity`, which also draw and
augment the batch. This module does not import torch.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from search_cases import Sizes, compressed, tenth

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

# each is compared with the case of search_step.py of the same name
CASES = (
    "darts first order",
    "darts second order",
    "sparse_supernet first order",
    "sparse_supernet second order",
    "ista",
    "gsparsity",
    "gsparsity, half of the operations dead",
    "recurrent first order",
    "recurrent, a tenth of the paths",
    "recurrent second order",
    "weight step, all paths",
    "weight step, a tenth of the paths",
)


@dataclass
class Case:
    """A case, ready to be compiled.

    programs: functions state -> state, each with the arguments behind the state, and static ones by name; a step runs them all.
    evaluations: functions without arguments that evaluate, and that are compiled at their first call.
    """

    state: Any
    programs: list[tuple[Any, tuple, dict[str, Any]]]
    evaluations: list[Callable[[], Any]] = field(default_factory=list)


def build(name: str, sizes: Sizes, device: str) -> Case:
    """Build a case without compiling it."""
    from nas.engine.jax.devices import join_devices

    devices = join_devices(device)
    if "recurrent" in name:
        return _recurrent(name, sizes, devices)
    if "gsparsity" in name:
        return _gsparsity(name, sizes, devices)
    return _bilevel(name, sizes, devices)


def _pixels(count: int) -> Any:
    from nas.data.jax import Pixels

    random = np.random.default_rng(0)
    images, labels = random.integers(256, size=(count, 32, 32, 3), dtype=np.uint8), random.integers(10, size=count)
    return Pixels(images, labels.astype(np.int32), np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))


def _supernet(space: str, sizes: Sizes) -> Any:
    from flax import nnx
    from nas.nets.jax import cnn
    from nas.space import spaces

    return cnn.Supernet(spaces.get_space(space), sizes.channels, sizes.layers, rngs=nnx.Rngs(0))


def _bilevel(name: str, sizes: Sizes, devices: Any) -> Case:
    import jax
    from flax import nnx
    from nas.bilevel.jax.steps import CifarData, CifarSteps, Place
    from nas.methods.jax import registry

    method_name = "darts" if name.startswith("darts") else "ista" if name == "ista" else "sparse_supernet"
    entry = registry.CIFAR[method_name]
    order = "second" if "second" in name else "first"
    settings = replace(entry.presets["paper"], order=order, batch=sizes.batch)
    net = _supernet(settings.space, sizes)
    graph, params = nnx.split(net, nnx.Param)
    method: Any = entry.method(net.space, settings, 1)  # type: ignore[misc]
    steps = CifarSteps(graph, net.space, method, settings, devices)
    state = steps.start(params, jax.random.key(0))
    architecture = state.method
    if name == "ista":
        matrices, variables = compressed({cell: [a.shape for a in own] for cell, own in architecture.matrices.items()})
        architecture = architecture._replace(matrices=matrices, variables=variables)
    architecture = method.begin_epoch(architecture, 0)
    if "tenth" in name:
        architecture = architecture._replace(arch={cell: _only(a, tenth(len(a))) for cell, a in architecture.arch.items()})
    state = devices.replicate(state._replace(method=architecture))
    pixels, order_of_images = devices.replicate((_pixels(sizes.batch), np.arange(sizes.batch)))
    data = CifarData(pixels, pixels, order_of_images, order_of_images)
    key = jax.random.key(0)
    arguments = (data, Place(np.int32(0), np.int32(0), np.float32(settings.lr), key))
    weights = (steps.weights, arguments, {"nodes": None})
    if name.startswith("weight step"):
        return Case(state, [weights])
    probes = {"probes": method.needs_zeroed_paths(0), "nodes": None}
    point, active = method.point(state.method), method.is_active(state.method)
    evaluate = jax.jit(steps.evaluated)

    def evaluation(count: int) -> Callable[[], Any]:
        images = devices.replicate(_pixels(count))
        kept = jax.tree.map(np.asarray, state.params), point, (pixels, (images.images, images.labels), key), active
        return lambda: evaluate(*kept)

    return Case(state, [(steps.architecture, arguments, probes), weights], [evaluation(count) for count in sizes.evaluated])


def _only(a: Any, keep: np.ndarray) -> Any:
    """The weights of these paths, the others zero."""
    mask = np.zeros(a.shape, np.float32)
    mask[keep] = 1
    return a * mask


def _gsparsity(name: str, sizes: Sizes, devices: Any) -> Case:
    import jax
    from nas.methods.jax.gsparsity import OperationGroups
    from nas.methods.settings.gsparsity import GSparsitySettings

    operations = OperationGroups(_supernet("darts", sizes), GSparsitySettings(channels=sizes.channels, batch=sizes.batch))
    state = operations.start()
    if "half" in name:
        state = operations.without(state, list(operations.names)[::2])
    state, pixels, order, key = devices.replicate((state, _pixels(sizes.batch), np.arange(sizes.batch), jax.random.key(0)))

    jitted = jax.jit(partial(operations.batch_step, devices), donate_argnames="state")
    evaluated = jax.jit(partial(operations.evaluated, devices))
    evaluate = lambda state, pixels: evaluated(state, pixels, (pixels.images, pixels.labels), key, state.is_active)
    arguments = (pixels, order, np.int32(0), np.float32(1e-3), key)
    kept = jax.tree.map(np.asarray, state)
    evaluations = [partial(evaluate, kept, devices.replicate(_pixels(count))) for count in sizes.evaluated[:1]]
    return Case(state, [(jitted, arguments, {})], evaluations)


def _recurrent(name: str, sizes: Sizes, devices: Any) -> Case:
    import jax
    from flax import nnx
    from nas.bilevel.jax.steps import TextData, TextPlace, TextSteps
    from nas.methods.jax import registry
    from nas.nets.jax.rnn import RecurrentSupernet, mean_loss
    from nas.nets.recurrent import CELL, Drops
    from nas.space import spaces
    from nas.space.genotype import RecurrentGenotype

    entry = registry.TEXT["sparse_supernet"]
    order = "second" if "second" in name else "first"
    sized = {"batch": sizes.columns, "hidden": sizes.hidden, "bptt": sizes.bptt}
    settings = replace(entry.presets["paper"], order=order, **sized)
    space = spaces.get_space("recurrent", RecurrentGenotype)
    net = RecurrentSupernet(space, sizes.words, sizes.hidden, Drops.of(settings), rngs=nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    method: Any = entry.method(space, settings, 1)  # type: ignore[misc]
    steps = TextSteps(graph, space, method, settings, devices)
    state = steps.start(params, jax.random.key(0))
    architecture, nodes = method.begin_epoch(state.method, 0), None
    if "tenth" in name:
        keep = tenth(len(architecture.arch[CELL]))
        architecture = architecture._replace(arch={CELL: _only(architecture.arch[CELL], keep)})
        into = {space.paths(CELL)[i].node for i in keep}
        nodes = None if len(into) == len(space.layout.nodes) else tuple(sorted(into))  # as `search_text` does
    state = devices.replicate(state._replace(method=architecture))
    random = np.random.default_rng(0)
    draw = lambda rows: random.integers(sizes.words, size=(rows, sizes.columns)).astype(np.int32)
    data = devices.replicate(TextData(draw(2 * sizes.bptt + 1), draw(2 * sizes.bptt + 1)))
    start, length = np.int32(0), np.int32(sizes.bptt)
    numbers = start, length, start, length
    place = TextPlace(np.int32(0), np.int32(0), np.float32(settings.lr), jax.random.key(0), *numbers)
    programs = [
        (steps.architecture, (data, place), {"probes": True, "nodes": nodes}),
        (steps.weights, (data, place), {"nodes": nodes}),
    ]
    evaluations = []
    if sizes.evaluated:
        weights, active = method.point(state.method), method.is_active(state.method)
        own = nnx.merge(graph, jax.tree.map(lambda x: jax.numpy.array(np.asarray(x)), state.params))
        text = draw(2 * sizes.bptt + 1)
        evaluations.append(lambda: mean_loss(own, jax.numpy.asarray(text), sizes.bptt, weights, None, active))
    return Case(state, programs, evaluations)


def measurements(name: str, sizes: Sizes, steps: int, device: str) -> Iterator[dict[str, float]]:
    """Compile a case; then measure it for each item that is taken.

    cpu: CPU seconds of a step; of a GPU or TPU, seconds. mib: peak MiB of this process, with what the compiler needs, or of the
    device. buffers_mib: arguments, results and temporary arrays of the largest program. compile_cpu, compile_wall: seconds to
    trace, lower and compile the programs of a step; search_cpu, search_wall: with those of an evaluation.
    """
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    case = build(name, sizes, device)
    fixed = _compilation(case)
    state, case.state = case.state, None  # the first step donates it
    state = _stepped(case, state)  # a warm-up
    while True:
        begun = _clocks()
        for _ in range(steps):
            state = _stepped(case, state)
        seconds = _since(begun)[0 if device == "cpu" else 1] / steps
        stats = jax.devices()[0].memory_stats() if device != "cpu" else None
        mib = stats["peak_bytes_in_use"] / 2**20 if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        yield {key: float(value) for key, value in {"cpu": seconds, "mib": mib, **fixed}.items()}


def _compilation(case: Case) -> dict[str, float]:
    """Compile the programs of a case, and measure it."""
    import jax

    begun = _clocks()
    case.programs = [(f.lower(case.state, *args, **static).compile(), args, {}) for f, args, static in case.programs]
    cpu, wall = _since(begun)
    found = {"compile_cpu": cpu, "compile_wall": wall, "buffers_mib": max(_buffers(p) for p, _, _ in case.programs)}
    if case.evaluations:
        for evaluate in case.evaluations:
            seconds = []
            for _ in range(2):  # the second call compiles nothing
                begun = _clocks()
                jax.block_until_ready(evaluate())
                seconds.append(_since(begun))
            more = np.maximum(seconds[0] - seconds[1], 0)
            cpu, wall = cpu + more[0], wall + more[1]
        found |= {"search_cpu": cpu, "search_wall": wall}
    return found


def _stepped(case: Case, state: Any) -> Any:
    import jax

    for program, args, _ in case.programs:
        state = program(state, *args)
    return jax.block_until_ready(state)


def _clocks() -> np.ndarray:
    return np.array([time.process_time(), time.perf_counter()])


def _since(begun: np.ndarray) -> np.ndarray:
    return _clocks() - begun


def _buffers(program: Any) -> float:
    """MiB of the arguments, results and temporary arrays of a compiled program."""
    memory = program.memory_analysis()
    if memory is None:
        return float("nan")
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (sizes - memory.alias_size_in_bytes) / 2**20
