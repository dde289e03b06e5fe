"""Search methods in JAX: equal to those in torch for the same start and gradients, in double precision, and compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import jax_precision
from nas.methods import darts as torch_darts
from nas.methods import ista as torch_ista
from nas.methods import sparse_supernet as torch_sparse
from nas.methods.jax import darts, ista, sparse_supernet
from nas.methods.jax.guard import Guard
from nas.methods.settings.darts import DartsSettings, DartsTextSettings
from nas.methods.settings.ista import IstaSettings, IstaTextSettings
from nas.methods.settings.sparse_supernet import SparseSupernetSettings, SparseSupernetTextSettings
from nas.space import spaces
from nas.space.genotype import RecurrentGenotype

pytestmark = pytest.mark.usefixtures("fast_compilation")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with jax_precision():
        yield
    torch.set_default_dtype(before)


def space_of(name):
    return spaces.get_space(name, RecurrentGenotype if name.startswith("recurrent") else spaces.Genotype)


def as_arrays(method):
    cells = method.space.layout.cells if hasattr(method, "space") else method.codes.cells
    # copied by NumPy: torch changes the parameters in place, and JAX copies later or not at all
    return {cell: jnp.asarray(p.detach().numpy().copy()) for cell, p in zip(cells, method.parameters)}


class Steps:
    """The same updates by both libraries, and how often the JAX one is compiled."""

    def __init__(self, ours, state, other, seed=1):
        self.ours, self.state, self.other, self.traces = ours, state, other, 0
        self.rng = np.random.default_rng(seed)
        self.update = jax.jit(self._traced)

    def _traced(self, grads, state):
        self.traces += 1
        return self.ours.update(grads, state), self.ours.is_active(state)

    def begin_epoch(self, epoch):
        self.other.begin_epoch(epoch)
        self.state = self.ours.begin_epoch(self.state, epoch)

    def step(self, scale=0.01):
        """Update by random gradients, and check that both are equal, zeros included."""
        grads = {cell: scale * self.rng.normal(size=v.shape) for cell, v in self.ours.variables(self.state).items()}
        if not self.other.frozen:  # as the steps of a search do
            self.other.update([torch.from_numpy(g) for g in grads.values()])
        self.state, _ = self.update(grads, self.state)
        self.state = self.ours.after_step(self.state)
        close(self.ours.variables(self.state), as_arrays(self.other))
        points = self.ours.point(self.state), self.other.point()
        close(*points)
        for cell, p in points[0].items():
            np.testing.assert_array_equal(np.asarray(p) == 0, points[1][cell].numpy() == 0)
        weights = self.ours.weights(self.ours.variables(self.state), self.state)
        close(weights, {cell: w.detach() for cell, w in self.other.weights().items()})
        active = {cell: np.asarray(flags).tolist() for cell, flags in self.ours.is_active(self.state).items()}
        expected = self.other.active_paths()
        assert all(map(all, active.values())) if expected is None else active == {c: list(m) for c, m in expected.items()}
        assert self.ours.is_frozen(self.state) == self.other.frozen

    def end_epoch(self):
        assert self.ours.genotype(self.state) == self.other.genotype()
        log, expected = self.ours.log(self.state), self.other.log()
        assert list(log) == list(expected)
        assert log == pytest.approx(expected, rel=1e-9, abs=1e-9)  # duality gaps are small differences


def close(found, expected):
    assert list(found) == list(expected)
    for cell in found:
        np.testing.assert_allclose(found[cell], np.asarray(expected[cell]), rtol=1e-9, atol=1e-13)


def sparse(name, settings):
    other = torch_sparse.SparseSupernet(space_of(name), settings, CPU)
    ours = sparse_supernet.SparseSupernet(space_of(name), settings, 10)
    state = ours.init(jax.random.key(0))
    arch = as_arrays(other)
    optimizer = state.optimizer if settings.optimizer == "adam" else state.optimizer._replace(point=as_arrays(other))
    return Steps(ours, state._replace(arch=arch, optimizer=optimizer), other)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("darts", SparseSupernetSettings(arch_lr=1e-2, strength_step=0.05)),
        ("cherry", SparseSupernetSettings(arch_lr=1e-2, strength_step=0.05, metric="exact", l1_ratio=0.2)),
        ("cherry", SparseSupernetSettings(optimizer="hapg", arch_lr=0.5, strength_step=0.05, epochs=4)),
        ("recurrent", SparseSupernetTextSettings(arch_lr=1e-2, strength_step=0.05, cut=0.2)),
    ],
    ids=["adamhapg", "exact metric", "hapg", "text"],
)
def test_sparse_supernets_equal_those_in_torch(name, settings):
    steps = sparse(name, settings)
    for epoch in range(3):
        steps.begin_epoch(epoch)
        for _ in range(10):
            steps.step()
        steps.end_epoch()
    zeros = {cell: int((p == 0).sum()) for cell, p in steps.ours.point(steps.state).items()}
    assert all(0 < zeros[cell] < p.size for cell, p in steps.state.arch.items())
    assert steps.traces == 1


def test_the_architecture_is_frozen_at_the_target():
    steps = sparse("cherry", SparseSupernetSettings(arch_lr=0.05, strength_step=1.0, target_paths=45))
    steps.begin_epoch(1)
    for _ in range(40):
        if not steps.other.frozen:
            before = steps.state
            steps.step()
    assert steps.other.frozen and not bool(before.frozen)
    frozen = steps.state
    steps.step()
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(steps.state)))
    close(steps.state.arch, steps.ours.point(steps.state))


def test_adam_with_a_hard_threshold_equals_that_in_torch():
    options = {"arch_lr": 0.02, "strength_step": 0.2, "threshold": 0.05, "target_paths": 40}
    steps = sparse("cherry", SparseSupernetSettings(optimizer="adam", **options))
    for epoch in range(3):
        steps.begin_epoch(epoch)
        for _ in range(10):
            steps.step()
        steps.end_epoch()
    assert steps.other.frozen and all((np.asarray(a) == 0).any() for a in steps.state.arch.values())


def test_without_the_guard_an_empty_cell_ends_the_search():
    steps = sparse("cherry", SparseSupernetSettings(arch_lr=0.05, strength_step=5.0, guard=False))
    steps.begin_epoch(1)
    with pytest.raises(ValueError, match="cell has none left at strength 5: use --guard, --target-paths or a smaller"):
        for _ in range(30):
            steps.step(1e-3)


@pytest.mark.parametrize("name", ["cherry", "recurrent"])
def test_the_guard_keeps_cells_connected(name):
    kind = SparseSupernetSettings if name == "cherry" else SparseSupernetTextSettings
    steps = sparse(name, kind(arch_lr=0.05, strength_step=5.0))
    for epoch in range(3):
        steps.begin_epoch(epoch)
        for _ in range(10):
            steps.step(1e-3)
        steps.end_epoch()
    left = steps.ours.masks(steps.state)
    assert all(1 <= sum(mask) <= 10 for mask in left.values())
    assert sum(steps.other.log()[f"guarded_{cell}"] for cell in left) > 0, "end_epoch compares the counts"


@pytest.mark.parametrize("name", ["S2", "recurrent_zero"])
def test_a_repaired_cell_is_that_in_torch(name):
    """Random sparse points, in which the strongest route leads over several nodes, or no path starts in an input."""
    space, rng = space_of(name), np.random.default_rng(0)
    for cell in space.layout.cells[:1]:
        count = len(space.paths(cell))
        ours, theirs = jax.jit(Guard(space, cell)), torch_sparse.Guard(space, cell, CPU)
        repaired = 0
        for density in np.repeat([0.0, 0.02, 0.05, 0.1, 0.3], 10):
            search, point, before = (rng.normal(size=count) * (rng.random(count) < d) for d in (1, density / 2, density))
            expected = [torch.from_numpy(v.copy()) for v in (search, point)]
            theirs(*expected, torch.from_numpy(before))
            for a, b in zip(ours(search, point, before), expected):
                np.testing.assert_array_equal(a, b)
            repaired += not np.array_equal(expected[1], point)
        assert repaired > 5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("darts_zero", DartsSettings(arch_lr=0.1, arch_decay=0.1)),
        ("S1", DartsSettings(arch_lr=0.1)),
        ("recurrent_zero", DartsTextSettings(arch_lr=0.1)),
    ],
)
def test_darts_equals_that_in_torch(name, settings):
    other, ours = torch_darts.Darts(space_of(name), settings, CPU), darts.Darts(space_of(name), settings, 10)
    steps = Steps(ours, ours.init(jax.random.key(0))._replace(logits=as_arrays(other)), other)
    for epoch in range(3):
        steps.begin_epoch(epoch)
        for _ in range(10):
            steps.step(1.0)
        steps.end_epoch()
    assert steps.traces == 1


def test_a_softmax_of_edges_takes_leading_axes_and_has_a_gradient():
    space = space_of("S1")  # edges of one, two operations
    softmax = darts.EdgeSoftmax(space, "normal")
    logits = np.random.default_rng(0).normal(size=(3, len(space.paths("normal"))))
    other = torch.tensor(logits, requires_grad=True)
    expected = torch_darts.edge_softmax(space, dict.fromkeys(space.layout.cells, other))["normal"]
    np.testing.assert_allclose(softmax(logits), expected.detach(), rtol=1e-12)
    (expected**3).sum().backward()
    np.testing.assert_allclose(jax.grad(lambda x: (softmax(x) ** 3).sum())(logits), other.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("darts", IstaSettings(arch_lr=0.02)),
        ("cherry", IstaSettings(arch_lr=0.02, recover_every=4, matrix="gaussian")),
        ("recurrent", IstaTextSettings(arch_lr=0.02)),
    ],
    ids=["each epoch", "every fourth step", "text"],
)
def test_ista_equals_that_in_torch(name, settings):
    other, ours = torch_ista.Ista(space_of(name), settings, CPU), ista.Ista(space_of(name), settings, 10)
    matrices = jax.tree.map(jnp.asarray, other.codes.matrices)
    steps = Steps(ours, ours.init(jax.random.key(0))._replace(variables=as_arrays(other), matrices=matrices), other)
    supports = set()
    for epoch in range(3):
        steps.begin_epoch(epoch)
        for _ in range(10):
            steps.step(1.0)
            supports.add(str(ours.masks(steps.state)))
        steps.end_epoch()
    assert steps.traces == 1 and len(supports) >= 3
    assert other.log()["moved"] > 0


def test_ista_draws_what_its_key_decides():
    settings = IstaSettings(matrix="gaussian")
    first, same, another = (ista.Ista(space_of("cherry"), settings, 1).init(jax.random.key(k)) for k in (0, 0, 1))
    leaves = jax.tree.leaves
    assert all(map(np.array_equal, leaves(first), leaves(same)))
    assert not np.array_equal(leaves(first.matrices)[0], leaves(another.matrices)[0])
    for A in leaves(first.matrices):
        np.testing.assert_allclose(np.linalg.norm(A, axis=0), 1, rtol=1e-12)
    assert first.matrices["normal"][0].shape == (7, 4)
    broken = first._replace(variables=jax.tree.map(lambda b: b * np.nan, first.variables))
    with pytest.raises(ValueError, match="the compressed variables must be finite, got nan: a lower arch_lr may help"):
        ista.Ista(space_of("cherry"), settings, 1).recover(broken)


def test_states_are_float32_and_keep_their_structure():
    like = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    with jax_precision(False):
        for make, name, settings in (
            (sparse_supernet.SparseSupernet, "cherry", SparseSupernetSettings(target_paths=3)),
            (darts.Darts, "S1", DartsSettings()),
            (ista.Ista, "cherry", IstaSettings(recover_every=2)),
        ):
            method = make(space_of(name), settings, 10)
            first = method.init(jax.random.key(0))
            begun = method.begin_epoch(first, 0)
            stepped = jax.jit(method.update)(jax.tree.map(jnp.ones_like, method.variables(begun)), begun)
            assert like(first) == like(begun) == like(stepped) == like(method.after_step(stepped))
            assert {x.dtype for x in jax.tree.leaves(first)} <= {jnp.dtype(t) for t in (jnp.float32, jnp.int32, bool)}


def test_an_update_exports_for_tpus():
    with jax_precision(False):
        method = sparse_supernet.SparseSupernet(space_of("cherry"), SparseSupernetSettings(target_paths=3), 10)
        state = method.init(jax.random.key(0))
        exported = jax.export.export(jax.jit(method.update), platforms=["tpu"])(state.arch, state)
        assert "f64" not in exported.mlir_module() and "callback" not in exported.mlir_module()


def test_zero_weights_can_be_probed_now_and_then():
    method = sparse_supernet.SparseSupernet(space_of("cherry"), SparseSupernetSettings(probe_every=3), 10)
    assert [method.needs_zeroed_paths(i) for i in range(4)] == [True, False, False, True]
