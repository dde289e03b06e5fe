"""What the methods do to the architecture."""

import numpy as np
import pytest
import torch
from nas.bilevel.steps import CifarSteps
from nas.methods import registry
from nas.methods.settings import darts as darts_settings
from nas.methods.settings import sparse_supernet as sparse_settings
from nas.methods.sparse_supernet import Guard
from nas.space import spaces
from nas.space.genotype import CELLS, Genotype, Path
from nas_cases import supernet

from proxopt import Groups, SparseGroupLasso, updates


@pytest.mark.parametrize(("optimizer", "rate"), [("hapg", 0.1), ("adamhapg", 0.001)])
def test_the_architecture_follows_the_pure_update_under_the_strength_path(optimizer, rate):
    net = supernet()
    settings = sparse_settings.SparseSupernetSettings(optimizer=optimizer, strength_step=0.01, epochs=4, arch_lr=rate)
    method = registry.build("sparse_supernet", net, settings)
    assert {group["extrapolation"] for group in method.optimizer.param_groups} == {"nesterov"}, "the published rule"
    x = [p.detach().double().numpy().copy() for p in method.parameters]
    states = [None, None]
    rng = np.random.default_rng(0)
    groups = Groups.labels(net.space.nodes("normal"))
    for epoch in range(4):
        method.begin_epoch(epoch)
        penalty = SparseGroupLasso(0.01 * epoch, 0.5, groups)
        lr = rate if optimizer == "adamhapg" else rate * (1 + np.cos(np.pi * epoch / 4)) / 2
        for _ in range(10):
            grads = [rng.normal(size=98) * 0.01 for _ in CELLS]
            method.update([torch.tensor(g, dtype=torch.float32) for g in grads])
            for i, g in enumerate(grads):
                step = updates.adam_hapg if optimizer == "adamhapg" else updates.hapg
                x[i], states[i] = step(x[i], g, states[i], penalty, lr=lr, extrapolation="nesterov")
    for cell, state in zip(CELLS, states):
        np.testing.assert_allclose(method.point()[cell].numpy(), state.point, rtol=1e-2, atol=1e-4)
    assert sum(int((p == 0).sum()) for p in method.point().values()) > 0
    assert method.log()["strength"] == pytest.approx(0.03)


def test_a_growing_strength_never_empties_a_cell():
    settings = sparse_settings.SparseSupernetSettings(strength_step=5.0, arch_lr=0.05)
    method = registry.build("sparse_supernet", supernet(), settings)
    for epoch in range(6):
        method.begin_epoch(epoch)
        for _ in range(30):
            method.update([1e-3 * torch.randn(98) for _ in CELLS])
        found, log = method.genotype(), method.log()
        assert found.active_nodes("normal") and found.active_nodes("reduce")
        assert (log["guarded_normal"] > 0) == (epoch > 0), "each epoch counts its own"
    assert sum(len(found.paths(c)) for c in CELLS) <= 10
    again = registry.build("sparse_supernet", supernet(), settings)
    again.load_state_dict(method.state_dict())
    assert again.log() == log


def test_without_the_guard_an_empty_cell_ends_the_search():
    settings = sparse_settings.SparseSupernetSettings(strength_step=5.0, arch_lr=0.05, guard=False)
    method = registry.build("sparse_supernet", supernet("cherry"), settings)
    method.begin_epoch(1)
    with pytest.raises(ValueError, match=r"the (normal|reduce) cell has none left at strength 5: use --guard, --target-paths or"):
        for _ in range(30):
            method.update([1e-3 * torch.randn(28) for _ in CELLS])
            method.active_paths()
    with pytest.raises(ValueError, match="has none left at strength 5"):
        method.genotype()


def test_adam_follows_the_subgradient_of_the_penalty_and_cuts_at_the_end():
    settings = sparse_settings.SparseSupernetSettings(optimizer="adam", strength_step=0.1, l1_ratio=0.3, arch_lr=0.01)
    method = registry.build("sparse_supernet", supernet("cherry"), settings)
    x = torch.cat([p.detach() for p in method.parameters]).double().numpy()
    labels = np.array([n + 10 * i for i, c in enumerate(CELLS) for n in method.space.nodes(c)])
    sizes = np.array([(labels == label).sum() for label in labels])
    square, mean = np.zeros_like(x), np.zeros_like(x)
    rng = np.random.default_rng(0)
    method.begin_epoch(2)
    for t in range(1, 8):
        g = rng.normal(size=x.size)
        method.update([torch.tensor(part, dtype=torch.float32) for part in np.split(g, 2)])
        norms = np.array([np.sqrt((x[labels == label] ** 2).sum()) for label in labels])
        g = g + 0.2 * (0.3 * np.sign(x) + 0.7 * np.sqrt(sizes) * x / norms)
        mean, square = 0.5 * mean + 0.5 * g, 0.999 * square + 0.001 * g**2
        x = x - 0.01 * mean / (1 - 0.5**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(torch.cat([*method.point().values()]).numpy(), x, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        for a in method.parameters:
            a.copy_(torch.where(torch.arange(28) < 4, a, 5e-4))
    assert method.active_paths() is None and sum(map(sum, method.masks().values())) == 8, "zero only by the threshold"
    assert method.log()["guarded_normal"] == 0
    with torch.no_grad():
        method.parameters[0].fill_(5e-4)
    assert method.log()["guarded_normal"] == 1 and sum(method.masks()["normal"]) == 1


def test_the_guard_keeps_the_strongest_way_through_a_cell():
    space = spaces.get_space("darts")
    guard = Guard(space, "normal", torch.device("cpu"))
    before = torch.zeros(98)
    place = {path: i for i, path in enumerate(space.paths("normal"))}
    strong, weak = Path(4, 3, "sep_conv_3x3"), Path(4, 0, "skip_connect")
    for path, weight in (
        (strong, 3.0),
        (weak, 1.0),
        (Path(3, 1, "skip_connect"), -2.0),
        (Path(3, 0, "sep_conv_5x5"), 0.5),
        (Path(5, 2, "skip_connect"), 9.0),
    ):
        before[place[path]] = weight
    search, point = torch.zeros(98), torch.zeros(98)
    guard(search, point, before)
    kept = {space.paths("normal")[i] for i in point.nonzero().flatten().tolist()}
    assert kept == {strong, Path(3, 1, "skip_connect")}, "the path into node 5 starts in node 2, which has no paths"
    assert torch.equal(search, point)
    active = before.clone()
    guard(search, active, torch.zeros(98))
    assert torch.equal(active, before), "a connected cell is not changed"


def test_paths_that_lead_nowhere_do_not_count_as_life():
    guard = Guard(spaces.get_space("darts"), "normal", torch.device("cpu"))
    point, before = torch.zeros(98), torch.zeros(98)
    point[spaces.get_space("darts").paths("normal").index(Path(5, 4, "skip_connect"))] = 1.0
    before[0] = 0.5
    guard(torch.zeros(98), point, before)
    assert point.nonzero().flatten().tolist() == [0]


def test_the_architecture_rests_at_the_target():
    settings = sparse_settings.SparseSupernetSettings(strength_step=1.0, arch_lr=0.05, target_paths=150, order="first")
    net = supernet()
    method = registry.build("sparse_supernet", net, settings)
    method.begin_epoch(1)
    active = []
    while not method.frozen:
        method.update([1e-3 * torch.randn(98) for _ in CELLS])
        active.append(sum(map(sum, method.masks().values())))
    assert active[-1] <= 150 < min([196, *active[:-1]])
    assert all(torch.equal(a, p) for a, p in zip(method.parameters, method.point().values()))
    before = [a.detach().clone() for a in method.parameters]
    batch = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    steps = CifarSteps(net, method, settings)
    steps.architecture(0, batch, batch)
    steps.weights(batch)
    assert all(torch.equal(a, b) for a, b in zip(method.parameters, before))
    again = registry.build("sparse_supernet", net, settings)
    again.load_state_dict(method.state_dict())
    assert again.frozen and all(torch.equal(a, b) for a, b in zip(again.parameters, before))


def test_a_relative_cut_removes_small_weights_from_the_genotype():
    net = supernet()
    for cut, paths in ((0.0, 98), (0.5, 1)):
        method = registry.build("sparse_supernet", net, sparse_settings.SparseSupernetSettings(cut=cut))
        with torch.no_grad():
            for a in method.parameters:
                a.fill_(0.1)
                a[0] = 1.0
        assert len(method.genotype().paths("normal")) == paths


@pytest.mark.parametrize(("ratio", "whole"), [(1.0, False), (0.0, True)], ids=["lasso", "group lasso"])
def test_lasso_and_group_lasso_are_the_ends_of_the_ratio(ratio, whole):
    settings = sparse_settings.SparseSupernetSettings(l1_ratio=ratio, strength_step=0.05, arch_lr=0.01)
    method = registry.build("sparse_supernet", supernet(), settings)
    method.begin_epoch(1)
    nodes = torch.tensor(method.space.nodes("normal"))
    torch.manual_seed(0)
    weighted = torch.where(nodes <= 3, 0.0, -1.0)  # nodes 4 and 5 are wanted
    for _ in range(30):
        method.update([weighted + 0.05 * torch.randn(98) for _ in CELLS])
    zero = method.point()["normal"] == 0
    mixed = [bool(zero[nodes == n].any()) and not bool(zero[nodes == n].all()) for n in (2, 3, 4, 5)]
    assert bool(zero.any()) and not bool(zero.all())
    assert any(mixed) != whole


def test_darts_takes_the_two_strongest_edges_of_each_node():
    method = registry.build("darts", supernet("darts_zero"), darts_settings.DartsSettings())
    space = method.space
    with torch.no_grad():
        for a in method.parameters:
            a.zero_()
        for path, weight in ((Path(3, 2, "sep_conv_3x3"), 2.0), (Path(3, 0, "dil_conv_5x5"), 1.0), (Path(3, 1, "none"), 5.0)):
            method.parameters[0][space.paths("normal").index(path)] = weight
    found = method.genotype()
    assert found.normal["3"] == (("sep_conv_3x3", 2), ("dil_conv_5x5", 0))
    assert all(len(found.normal[str(n)]) == 2 for n in (2, 3, 4, 5))
    for cell, w in method.point().items():
        edges = torch.tensor(space.edges(cell))
        assert torch.zeros(14).index_add_(0, edges, w).tolist() == pytest.approx([1.0] * 14)


def test_dead_paths_can_be_probed_now_and_then():
    method = registry.build("sparse_supernet", supernet(), sparse_settings.SparseSupernetSettings(probe_every=3))
    assert [method.needs_zeroed_paths(i) for i in range(4)] == [True, False, False, True]
    assert method.active_paths() is None
    with torch.no_grad():
        method.parameters[0][5] = 0.0
    assert method.active_paths()["normal"][5] is False and method.active_paths()["normal"][4] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1_ratio": 2.0}, r"l1_ratio must lie in \[0, 1\], got 2.0"),
        ({"strength_step": -1.0}, "strength_step must be finite and >= 0, got -1"),
        ({"probe_every": -1}, "probe_every must be finite and >= 0, got -1"),
        ({"optimizer": "hapg", "metric": "exact"}, "metric belongs to adamhapg"),
        ({"optimizer": "adam", "threshold": -1.0}, "threshold must be finite and >= 0, got -1.0"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"lr": float("nan")}, "lr must be finite and >= 0, got nan"),
        ({"images": 64}, "images must be at least two batches of 64, got 64"),
    ],
)
def test_a_setting_out_of_its_domain_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_settings.SparseSupernetSettings(**options)


def test_the_genotype_of_a_search_state_is_its_living_paths():
    method = registry.build("sparse_supernet", supernet(), sparse_settings.SparseSupernetSettings())
    with torch.no_grad():
        for a in method.parameters:
            a.zero_()
            a[3] = 0.2
    one = ("sep_conv_3x3", 0)
    assert method.genotype() == Genotype({"2": [one]}, {"2": [one]})


def lagging(net, **options):
    """SparseNAS as on an accelerator, whose flags of nonzero paths come to the host a weight step later."""
    method = registry.build("sparse_supernet", net, sparse_settings.SparseSupernetSettings(strength_step=1.0, **options))
    method._lags = True
    method.begin_epoch(1)
    return method


def test_on_an_accelerator_paths_are_known_from_the_next_step_on():
    method = lagging(supernet(), arch_lr=0.05)
    assert method.active_paths() is None
    paths = {}
    for number in range(6):
        method.begin_step()
        known = method.active_paths()
        assert known == paths.get(number - 1), "the paths after the last update"
        method.update([1e-3 * torch.randn(98) for _ in CELLS])
        assert method.active_paths() == known, "the update has not arrived"
        masks = {cell: (a != 0).tolist() for cell, a in zip(CELLS, method.parameters)}
        paths[number] = None if all(map(all, masks.values())) else masks
    assert paths[5] is not None


def test_on_an_accelerator_a_search_goes_on_where_it_stopped():
    """The strength grows until the target is reached; one of the two methods is replaced after each update."""
    net = supernet()
    torch.manual_seed(1)
    whole = lagging(net, arch_lr=0.05, target_paths=150)
    parts = lagging(net, arch_lr=0.05, target_paths=150)
    parts.load_state_dict(whole.state_dict())
    for _ in range(40):
        for method in (whole, parts):
            method.begin_step()
        assert whole.frozen == parts.frozen and whole.active_paths() == parts.active_paths()
        if whole.frozen:
            break
        grads = [1e-3 * torch.randn(98) for _ in CELLS]
        for method in (whole, parts):
            method.update([g.clone() for g in grads])
        state, parts = parts.state_dict(), lagging(net, arch_lr=0.05, target_paths=150)
        parts.load_state_dict(state)
    assert whole.frozen and all(torch.equal(a, p) for a, p in zip(whole.parameters, whole.point().values()))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, parts.parameters))
