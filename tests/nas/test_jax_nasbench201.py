"""Searches of NAS-Bench-201 cells in JAX: the networks compute what those in PyTorch compute, and a sweep what its seeds do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import nas_cifar10
import numpy as np
import pytest
import torch
from flax import nnx
from libraries import jax_precision
from nas.bilevel.jax.search_cifar import CifarSearch
from nas.engine import report
from nas.engine.jax.checkpoint import Checkpoints
from nas.engine.jax.devices import join_devices
from nas.methods.jax import guard, ista, registry, sparse_supernet
from nas.methods.settings.ista import CIFAR_PRESETS as ISTA
from nas.nets.jax import cnn
from nas.nets.jax import nasbench201 as ours
from nas.nets.jax.dense_convolution import convolve
from nas.nets.torch import nasbench201 as theirs
from nas.space.genotype import CellGenotype, load_genotype
from nas.space.spaces import SPACES, everywhere, get_space
from nas_cases import TINY_JAX
from nas_jax_cases import _kernel, gradient, module_leaves, value
from torch.nn import functional as F

from proxopt import Groups, Sphere

NONZERO = get_space("nasbench201_nonzero")
FEW = everywhere("few", ("skip_connect", "nor_conv_1x1"), kind=CellGenotype)  # operations that are quick to compile
# compilation takes most of the time of these tests
plain = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
CELL = CellGenotype.from_string("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|")


pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(autouse=True, scope="module")
def few_operations():
    SPACES[FEW.name] = FEW
    yield
    del SPACES[FEW.name]


def layer_leaves(module, get):
    """The numbers of a transition, or of a ReLU, convolution and batch norm, by the paths of its equivalent in JAX."""
    norm_of = lambda norm: {("norm", *k): a[None] for k, a in module_leaves(norm, get).items()}
    if isinstance(module, theirs.ResidualBlock):
        halves = {(name, *k): a for name in ("first", "second") for k, a in layer_leaves(getattr(module, name), get).items()}
        return halves | {("shortcut",): _kernel(module.shortcut[1], get)[None, None]}
    *_, conv, norm = module
    kernel = _kernel(conv, get)
    return {("kernel",): kernel if kernel.ndim == 4 else kernel[None, None]} | norm_of(norm)


def leaves_of(net, equivalent, get=value):
    """The numbers of a network of PyTorch, by the paths of the leaves of its equivalent in JAX."""
    found = {("stem", *k): a for k, a in layer_leaves(net.stem, get).items()}
    found |= {("norm", *k): a[None] for k, a in module_leaves(net.norm, get).items()}
    found |= {("classifier", *k): a for k, a in module_leaves(net.classifier, get).items()}
    for i, layer in enumerate(net.cells):
        if isinstance(layer, theirs.MixedCell):
            for group in getattr(equivalent, f"cell{i}").plan.groups:
                if group.operation in ours.KERNELS:
                    kernels = [_kernel(layer.operation(path), get) for path in group.indices]
                    size, channels = ours.KERNELS[group.operation], kernels[0].shape[-1]
                    found[f"cell{i}", group.name, "kernel"] = np.stack(kernels).reshape(-1, size, size, channels, channels)
        elif isinstance(layer, theirs.Cell):
            modules = [(k, m) for k, m in enumerate(layer.operations) if isinstance(m, theirs.ReluConvNorm)]
            found |= {(f"cell{i}", f"path{k}", *name): a for k, m in modules for name, a in layer_leaves(m, get).items()}
        else:
            found |= {(f"cell{i}", *k): a for k, a in layer_leaves(layer, get).items()}
    return found


def state_of(net, equivalent, get=value):
    """The state of the equivalent network in JAX with the numbers of a network of PyTorch, or with their gradients."""
    state, leaves = nnx.state(equivalent, nnx.Param), leaves_of(net, equivalent, get)
    wanted = cnn._flat(state)
    assert {name for name in leaves if name[-1] not in ("mean", "var")} == set(wanted)
    for name, leaf in wanted.items():
        assert leaf.shape == leaves[name].shape, (name, leaf.shape, leaves[name].shape)
    return cnn._like(state, {name: jnp.asarray(leaves[name], leaf.dtype) for name, leaf in wanted.items()})


def images_and_labels(size=8, count=6):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, size, size, dtype=torch.float64, generator=draw)
    y = torch.randint(10, (count,), generator=draw)
    return x, y, x.numpy().transpose(0, 2, 3, 1), y.numpy()


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10, err_msg=str(name))


def flags_of(case):
    """Flags of the paths; None: all."""
    paths = NONZERO.paths("cell")
    if case == "all":
        return None
    if case == "node 2 is not read":
        return [path.source != 2 for path in paths]
    if case == "node 1 has no path":
        return [path.node != 1 for path in paths]
    if case == "not connected":
        return [path.node != 3 for path in paths]
    return np.random.default_rng(0).random(len(paths)).round().astype(bool).tolist()


@cache
def both(path_norm, transition):
    torch.manual_seed(0)
    net = theirs.Supernet(NONZERO, 2, 3, path_norm=path_norm, transition=transition).double()
    options = {"path_norm": path_norm, "transition": transition}
    equivalent = ours.Supernet(NONZERO, 2, 3, rngs=nnx.Rngs(0), dtype=jnp.float64, **options)
    graph, _ = nnx.split(equivalent, nnx.Param)

    def loss(params, weights, images, labels, active):
        logits = nnx.merge(graph, params)(images, weights, None if active is None else {"cell": active})
        return cross_entropy(logits, labels), logits

    return net, equivalent, state_of(net, equivalent), plain(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("case", ["all", "some", "node 2 is not read", "node 1 has no path", "not connected"])
@pytest.mark.parametrize("path_norm, transition", [(False, "residual"), (True, "patch")])
def test_logits_and_gradients_are_those_of_pytorch(path_norm, transition, case):
    with jax_precision():
        net, equivalent, params, compiled = both(path_norm, transition)
        rng, flags = np.random.default_rng(0), flags_of(case)
        weights = rng.normal(size=(len(NONZERO.paths("cell")),))
        x, y, images, labels = images_and_labels()
        net.zero_grad(set_to_none=True)
        leaf = torch.tensor(weights, requires_grad=True)
        logits = net(x, {"cell": leaf}, None if flags is None else {"cell": flags})
        F.cross_entropy(logits, y).backward()
        given = jnp.ones(len(weights), bool) if flags is None else jnp.asarray(flags)
        (_, found), (grads, of_weights) = compiled(params, {"cell": jnp.asarray(weights)}, images, labels, given)
        close(found, logits.detach())
        close(of_weights["cell"], torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        flat = cnn._flat(grads)
        for name, wanted in leaves_of(net, equivalent, gradient).items():
            close(flat[name], wanted, name)
        trained = cnn._flat(equivalent.trained({"cell": given}))
        for name, wanted in leaves_of(net, equivalent, lambda p: torch.full_like(p, p.grad is not None)).items():
            np.testing.assert_array_equal(np.broadcast_to(trained[name], wanted.shape), wanted != 0, err_msg=str(name))


def test_flags_in_the_program_leave_the_other_paths_out():
    with jax_precision():
        net, equivalent, params, _ = both(True, "patch")
        x, _, images, _ = images_and_labels()
        flags = {"cell": tuple(flags_of("some"))}
        with torch.no_grad():
            expected = net(x, None, flags)
        close(plain(lambda params: nnx.merge(nnx.split(equivalent)[0], params)(images, None, flags))(params), expected)


def test_the_network_of_a_cell_is_that_of_pytorch():
    with jax_precision():
        torch.manual_seed(0)
        net = theirs.Network(CELL, 2, 3).double()
        equivalent = ours.Network(CELL, 2, 3, rngs=nnx.Rngs(0), dtype=jnp.float64)
        x, _, images, _ = images_and_labels()
        nnx.update(equivalent, state_of(net, equivalent))
        graph, state = nnx.split(equivalent)
        logits = plain(lambda state: nnx.merge(graph, state)(images)[0])(state)
        close(logits, net(x)[0].detach())


@pytest.mark.parametrize("cell", [CELL, CellGenotype.from_string("|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|")])
def test_parameters_and_multiply_adds_are_those_of_pytorch(cell):
    assert ours.genotype_size(cell) == theirs.genotype_size(cell)


@pytest.mark.parametrize("size, kernel, stride", [(4, 3, 1), (4, 1, 1), (5, 3, 2)])
def test_the_convolution_of_many_networks_and_its_derivatives_are_those_of_xla(size, kernel, stride):
    rng = np.random.default_rng(0)
    with jax_precision():
        x, w = jnp.asarray(rng.normal(size=(2, 3, size, size, 2))), jnp.asarray(rng.normal(size=(2, kernel, kernel, 2, 3)))

        def xla(x, w):
            padding = [(kernel // 2,) * 2] * 2
            return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        def twice(f):
            """Gradients of a sum of squares of gradients: all three primitives and the derivatives of each."""
            first = lambda x, w: jax.grad(lambda x, w: (f(x, w) ** 3).sum(), (0, 1))(x, w)
            return jax.vmap(jax.grad(lambda x, w: sum((g**2).sum() for g in first(x, w)), (0, 1)))

        for found, expected in zip(plain(twice(partial(convolve, stride=stride)))(x, w), plain(twice(xla))(x, w)):
            close(found, expected)


def settings_of(images, **own):
    """A small search by the sound rule, whose second epoch trains the architecture; a pass has three batches, an epoch four."""
    sizes = {"images": 32, "valid_images": 8, "batch": 8, "channels": 2, "layers": 3, "pixels": 8, "epochs": 2, "epoch_steps": 4}
    rule = {"strength": 0.5, "arch_lr": 0.2, "warmup": 0.5, "space": FEW.name, "device": "cpu", "data_dir": images}
    preset = registry.CIFAR["sparse_supernet"].presets_of("sound")["nasbench201_small"]
    return replace(preset, **{**sizes, **rule, **own})


def run_sweep(settings, seeds, out):
    return registry.CIFAR["sparse_supernet"].sweep(settings, seeds, out)


@pytest.fixture(scope="module")
def swept(images, tmp_path_factory):
    """The folder and the rows of a sweep with the seeds 0 and 3."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "write", lambda *args: None)  # no pictures
        return folder, run_sweep(settings_of(images), (0, 3), folder)


def test_a_seed_of_a_sweep_is_a_search_alone(images, swept, tmp_path, no_pictures):
    folder, rows = swept
    alone = CifarSearch(sparse_supernet.SparseSupernet, settings_of(images), 3, tmp_path, join_devices("cpu"))
    row, found = alone.run(), rows[1]
    assert found["seed"] == 3 and found["architecture"] == row["architecture"]
    for name in ("train_loss", "valid_loss", "restricted_loss", "penalty", "largest_weight"):
        assert found[name] == pytest.approx(row[name], rel=1e-3), name
    of_seed = json.loads((folder / "seed-3" / "result.json").read_text())
    assert of_seed["architecture"] == row["architecture"]
    assert (folder / "seed-3" / "genotype.json").read_text() == (tmp_path / "genotype.json").read_text()
    assert len((folder / "seed-0" / "search.csv").read_text().splitlines()) == 3
    assert rows[0]["valid_loss"] != found["valid_loss"]


def test_a_sweep_that_is_stopped_goes_on_bit_for_bit(images, swept, tmp_path, monkeypatch, no_pictures):
    class Stop(Exception):
        pass

    save = Checkpoints.save

    def once(self, *args):
        save(self, *args)
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Checkpoints, "save", once)
        run_sweep(settings_of(images), (0, 3), tmp_path)
    with pytest.raises(ValueError, match="sweep is"):
        run_sweep(settings_of(images, resume=True), (3, 0), tmp_path)
    with pytest.raises(FileExistsError, match="already contains a run"):
        run_sweep(settings_of(images), (0, 3), tmp_path)
    rows = run_sweep(settings_of(images, resume=True), (0, 3), tmp_path)
    without_times = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert without_times(rows) == without_times(swept[1])


@pytest.mark.parametrize(
    "own, seeds, message",
    [
        ({}, (), "seeds must be different numbers, at least one, got "),
        ({}, (1, 1), "seeds must be different numbers"),
        ({"space": "darts"}, (0,), "space must be one of NAS-Bench-201 for a sweep, got 'darts'"),
        ({"probe_every": 3}, (0,), "probe_every must be 0 or 1 for a sweep, got 3"),
        ({"guard": False}, (0,), "guard must be set for a sweep"),
    ],
)
def test_what_is_no_sweep_is_refused(own, seeds, message, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_sweep(settings_of(images, **own), seeds, tmp_path)
    assert registry.CIFAR["ista"].sweep is None and registry.CIFAR["darts"].sweep is not None


TWO_DEVICES = """
import sys
from pathlib import Path
import jax, test_jax_nasbench201 as cases
from nas_cases import fake_cifar

assert jax.device_count() == 2
jax.config.update("jax_disable_most_optimizations", True)
cases.SPACES[cases.FEW.name] = cases.FEW
images, out = Path(sys.argv[1]), Path(sys.argv[2])
fake_cifar(images)
rows = cases.run_sweep(cases.settings_of(images), (0, 3), out)
print(*(f"{row['seed']} {row['architecture']} {row['valid_loss']!r}" for row in rows), sep="\\n")
"""


@pytest.mark.slow
def test_the_seeds_are_divided_over_two_devices(images, swept, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    words = [sys.executable, "-c", TWO_DEVICES, str(images), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, row in zip(done.stdout.splitlines()[-2:], swept[1], strict=True):
        seed, architecture, loss = line.split()
        assert (int(seed), architecture) == (row["seed"], row["architecture"])
        assert float(loss) == pytest.approx(row["valid_loss"], rel=1e-3)


def test_a_cell_is_connected_if_a_path_leads_to_node_3():
    paths = NONZERO.paths("cell")
    found = guard.Guard(NONZERO, "cell")
    at = lambda *wanted: jnp.array([float(path[:2] in wanted) for path in paths])
    assert not found.connects(at((1, 0), (2, 1))) and found.connects(at((3, 0)))
    before = at((1, 0), (3, 1), (2, 0))
    kept = {paths[i][:2] for i in np.flatnonzero(found.backbone(before))}
    assert kept == {(1, 0), (3, 1)}
    held = guard.Guard(NONZERO, "cell", Sphere(Groups.labels(NONZERO.edges("cell")), radius=2.0))
    search, point, restored = held(jnp.zeros(len(paths)), jnp.zeros(len(paths)), before)
    assert restored and sorted(point[point != 0].tolist()) == [2.0, 2.0]
    np.testing.assert_array_equal(search, point)


def test_ista_keeps_one_path_on_each_edge():
    method = ista.Ista(NONZERO, ISTA["nasbench201_small"], 1)
    state = method.recover(method.init(jax.random.key(0)))
    edges = np.array(NONZERO.edges("cell"))
    assert sorted(edges[np.asarray(method.is_active(state)["cell"])]) == [0, 1, 2, 3, 4, 5]
    weights = np.asarray(method.weights(state.variables, state)["cell"])
    assert len({*edges[weights != 0]}) == 6 == (weights != 0).sum()


@pytest.mark.commands
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--method sparse_supernet --space nasbench201_nonzero --strength-step 0.5 --arch-lr 0.02",
        "--method darts --space nasbench201",
        "--method ista --space nasbench201_nonzero --sparsity 1",
        "--method gsparsity --space nasbench201_nonzero --mu 0.4 --tau 1 --valid-images 16 --lr 0.3",
    ],
)
def test_every_method_finds_a_cell(words, images, tmp_path):
    own = ["--data-dir", str(images), "--out", str(tmp_path), "--pixels", "8", "--epoch-steps", "3"]
    (row,) = nas_cifar10.main([*TINY_JAX, *own, *words.split()])
    assert CellGenotype.from_string(row["architecture"]) == load_genotype(tmp_path / "genotype.json", CellGenotype)
    assert json.loads((tmp_path / "result.json").read_text())["architecture"] == row["architecture"]
