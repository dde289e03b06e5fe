"""GSparsity: groups of weights on one level, the cut that changes no logit, and operation pruning."""

import math
from dataclasses import replace

import nas_cifar10
import numpy as np
import prune_operations
import pytest
import torch
from nas.engine import bisection, checkpoint
from nas.engine.distributed import SINGLE_PROCESS
from nas.methods import group_sparsity
from nas.methods import operation_pruning as pruning
from nas.methods.group_sparsity import GatedGroup, loss_free
from nas.methods.gsparsity import GSparsitySearch, OperationGroups
from nas.methods.settings import gsparsity as gsparsity_settings
from nas.nets.torch import cnn
from nas.nets.torch.flat import Flat
from nas.space import genotype, spaces
from nas.space.genotype import CELLS, Genotype
from nas.train.train_cifar import Prepared
from nas_cases import TINY as TINY_COMMAND
from nas_cases import copy_weights, rows_of, supernet
from torch import nn
from torch.nn import functional as F

CPU = torch.device("cpu")
TINY = {"channels": 2, "layers": 3, "batch": 8, "images": 16, "valid_images": 16, "epochs": 2, "lr": 0.3, "lr_min": 0.3}


def search(images, out, **options):
    settings = gsparsity_settings.GSparsitySettings(**{**TINY, "data_dir": images, "out": out, **options})
    out.mkdir(exist_ok=True)
    return GSparsitySearch(settings, 0, out, SINGLE_PROCESS, CPU)


def take_epoch(run):
    """The steps of one epoch."""
    run.begin_epoch()
    for batch in run.batches():
        run.train_step(batch)


def zero_some(optimizer, flats, share=0.5):
    """Which of the flat parameters are set to 0, at the search point and the prox point, and 0 alone."""
    chosen = (torch.rand(len(flats), generator=torch.Generator().manual_seed(0)) < share).tolist()
    with torch.no_grad():
        for flat in (f for f, zero in zip(flats, chosen) if zero):
            flat.clear()
            state = optimizer.state[flat.vector]
            if "point" in state:
                state["point"].zero_()
    return chosen


# -- groups -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """The groups of the supernet of the papers."""
    torch.manual_seed(0)
    return OperationGroups(cnn.Supernet(spaces.get_space("darts")), gsparsity_settings.GSparsitySettings())


def test_groups_have_the_published_sizes_and_strengths(published):
    operations = published
    assert len(operations.flats) == 196
    found = {}
    for (cell, path), flat in operations.flats.items():
        strided = cell == "reduce" and path.source < 2
        found[cell, path.operation, strided] = flat.vector.numel(), operations.strength((cell, path))
    for name, size, mu in (
        ("sep_conv_3x3", 25536, 0.375),
        ("sep_conv_5x5", 32704, 0.332),
        ("dil_conv_3x3", 12768, 0.531),
        ("dil_conv_5x5", 16352, 0.469),
        ("max_pool_3x3", 6, 24.5),
        ("skip_connect", 6, 24.5),
    ):
        assert found["normal", name, False] == (size, pytest.approx(mu, abs=0.006))
    assert found["reduce", "skip_connect", True] == (5122, pytest.approx(0.84, abs=0.005))
    assert found["reduce", "avg_pool_3x3", True] == (2, pytest.approx(42.4, abs=0.05))
    inside = sum(flat.vector.numel() for flat in operations.flats.values())
    assert inside + sum(p.numel() for p in operations.others) == 1_930_618 + (14 * 3 * 6) + (14 * 3 * 2)


def test_the_regulariser_falls_as_published_without_any_loss(published):
    """The norms are those that initialisation has on average; the numbers are the prediction and the log of a real search."""
    operations, net = published, published.net
    squares = []
    for (cell, path), flat in operations.flats.items():
        square = float(operations.count[cell]) if (cell, path) in operations.gates else 0.0
        for kind, mixed in zip(net.kinds, net.cells):
            if kind == cell:
                module = mixed.operation(mixed.paths.index(path))
                convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
                square += sum(m.weight.numel() / (3 * m.weight[0].numel()) for m in convs)
        squares.append(square)
        assert flat.vector.detach().norm() == pytest.approx(math.sqrt(square), rel=0.1)
    norm = np.sqrt(squares)
    size = np.array([flat.vector.numel() for flat in operations.flats.values()])
    strength = np.array([operations.strength(key) for key in operations.flats])
    curve = []
    for _ in range(10):
        norm = loss_free(norm, strength, 1e-3, 1.0, 782)
        curve.append(float((norm / np.sqrt(size)).sum()))
    predicted = {1: 46.08, 2: 26.72, 3: 17.58, 4: 13.13, 5: 10.82, 6: 9.49, 8: 7.93, 10: 6.88}
    for epoch, value in predicted.items():
        assert curve[epoch - 1] == pytest.approx(value, abs=0.011 if epoch < 8 else 0.03)
    logged = {1: 46.08, 2: 26.72, 3: 17.59, 4: 13.14, 5: 10.83}
    assert all(curve[epoch - 1] == pytest.approx(value, rel=1e-3) for epoch, value in logged.items())


def test_the_optimizer_alone_moves_norms_as_predicted():
    settings = gsparsity_settings.GSparsitySettings(mu=3.0, lr=0.02, lr_min=0.02)
    operations = OperationGroups(supernet("S1"), settings)
    norm = np.array(list(operations.initial.values()))
    strength = np.array([operations.strength(key) for key in operations.flats])
    for _ in range(40):
        for flat in operations.flats.values():
            for p in flat.parts:
                p.grad = torch.zeros_like(p)
        operations.step()
    found = np.array([float(flat.vector.detach().norm()) for flat in operations.flats.values()])
    np.testing.assert_allclose(found, loss_free(norm, strength, 0.02, 1.0, 40), rtol=1e-4, atol=1e-6)
    share = found / np.sqrt([flat.vector.numel() for flat in operations.flats.values()])
    assert operations.regulariser() == pytest.approx(share.sum(), rel=1e-5)
    at_point = np.array(list(operations.norms().values()))
    before = norm - 0.02 * strength * 39
    clear = abs(before / strength - 1) > 1e-3  # the others may round to either side
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(at_point[clear] == 0, (before <= strength)[clear])


def test_a_step_is_that_of_the_paper():
    torch.manual_seed(0)
    operations = OperationGroups(
        supernet("S2"), gsparsity_settings.GSparsitySettings(mu=2.0, lr=0.1, lr_min=0.1, momentum=0.2, tau=1.5)
    )
    key = next(k for k in operations.flats if k[1].operation == "sep_conv_3x3")
    flat, mu = operations.flats[key], operations.strength(key)
    w, v = flat.vector.detach().double().numpy().copy(), 0.0
    rng = np.random.default_rng(0)
    for _ in range(100):
        g = rng.normal(size=w.shape)
        start = 0
        for p in flat.parts:
            p.grad = torch.tensor(g[start : start + p.numel()], dtype=torch.float32).view(p.shape)
            start += p.numel()
        operations.step()
        v = 0.2 * v + 0.8 * g
        c = w - v / 1.5
        w = w + 0.1 * (max(0, 1 - mu / 1.5 / np.linalg.norm(c)) * c - w)
        np.testing.assert_allclose(flat.vector.detach().numpy(), w, atol=1e-4)


def test_the_search_takes_the_steps_of_the_published_one():
    from naive_gsparsity import NaiveGSparsity, NaiveGSparsitySearch

    torch.manual_seed(0)
    naive = NaiveGSparsity(2, 3).double()
    published = NaiveGSparsitySearch(naive, mu=5.0, lr=0.05)
    net = supernet("darts", 2, 3).double()
    copy_weights(naive.net, net)
    operations = OperationGroups(net, gsparsity_settings.GSparsitySettings(mu=5.0, lr=0.05, lr_min=0.05))
    net.train()
    for _ in range(3):
        x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(10, (4,))
        published.step(x, y)
        operations.optimizer.zero_grad()
        F.cross_entropy(net(x, operations.weights()), y).backward()
        operations.step()
    other = supernet("darts", 2, 3).double()
    copy_weights(naive.net, other)
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    pool = next(p for p in net.space.paths("reduce") if p.operation == "avg_pool_3x3")
    mine = operations.gates["reduce", pool].tolist()
    theirs = [float(g.detach()[0, 1]) for g, kind in zip(naive.gates, net.kinds) if kind == "reduce"]
    assert mine == pytest.approx(theirs, rel=1e-6) and max(mine) < 0.95


def test_weightings_and_free_gates_are_as_described():
    net = supernet("cherry")
    for weighting, of in (
        ("none", lambda w: 1.0),
        ("sqrt_size", lambda w: math.sqrt(w.numel())),
        ("initial_norm", lambda w: float(w.norm())),
    ):
        operations = OperationGroups(net, gsparsity_settings.GSparsitySettings(mu=2.0, weighting=weighting))
        for key, flat in list(operations.flats.items())[::7]:
            assert operations.strength(key) == pytest.approx(2 * of(flat.vector.detach()))
    free = OperationGroups(supernet(), gsparsity_settings.GSparsitySettings(gates="free"))
    zero = {key[1].operation for key in free.flats if free.strength(key) == 0}
    assert zero == {"max_pool_3x3", "avg_pool_3x3", "skip_connect"}
    assert free.strength(next(k for k in free.flats if k[0] == "reduce" and k[1].operation == "skip_connect")) > 0
    group = GatedGroup(0.5, 2)
    x = torch.tensor([3.0, 0.0, 4.0, -4.0])
    assert group.prox(x).tolist() == pytest.approx([3 * (1 - 0.5 / math.sqrt(41)), 0.0, 1.0, 0.0])
    assert float(group.value(x)) == pytest.approx(0.5 * math.sqrt(41))


def test_a_flat_group_is_its_parts():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    flat = Flat("both", list(net.parameters()))
    with torch.no_grad():
        flat.vector.copy_(torch.arange(11.0))
    assert net[1].weight.tolist() == [[8.0, 9.0]]
    net[0](torch.ones(3)).sum().backward()
    flat.gather()
    assert flat.vector.grad.tolist() == [1.0] * 8 + [0.0] * 3
    flat.gather()  # nothing is left to be counted twice
    assert flat.vector.grad is None
    with pytest.raises(ValueError, match="empty must hold at least one parameter"):
        Flat("empty", [])


# -- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "tau"), [("darts", 1.0), ("cherry", "direct"), ("S4", 1.0)])
def test_the_cut_changes_no_logit(space, tau, images, tmp_path):
    run = search(images, tmp_path, mu=1e-3, space=space, tau=tau, vanish=0.0)
    take_epoch(run)
    paths = sum(len(run.net.space.paths(c)) for c in CELLS)
    zero = zero_some(run.sgd, list(run.operations.flats.values()))
    assert 0.3 * paths < sum(zero) < 0.7 * paths
    found = run.operations.genotype()
    kept = sum(len(found.paths(c)) for c in CELLS)
    assert all(map(found.active_nodes, CELLS)) and 0 < kept <= paths - sum(zero)
    assert run.cut_changes() == 0.0
    if space != "S4":  # where the network alone draws other noise
        x = torch.randn(8, 3, 32, 32)
        with torch.no_grad(), run.sgd.at_prox_point():
            run.net.train()
            weights = run.operations.weights()
            whole = run.net(x, weights)
            assert torch.equal(whole, run.net(x, weights, run.net.space.masks(found)))
            alone = cnn.restricted(run.net, found, weights).train()
            torch.testing.assert_close(alone(x)[0], whole, rtol=1e-4, atol=1e-5)


def test_groups_that_vanish_run_no_more(images, tmp_path):
    run = search(images, tmp_path, mu=0.0, vanish=0.5, space="S1")
    take_epoch(run)
    assert run.operations.active_paths() is None
    flats = run.operations.flats
    zero_at_point, small = list(flats)[::3], list(flats)[::6]
    with torch.no_grad():
        for key in zero_at_point:
            norm = flats[key].vector.norm()
            flats[key].vector.mul_((0.4 if key in small else 2.0) / norm)
            run.sgd.state[flats[key].vector]["point"].zero_()
    row = run.end_epoch()
    gone = [key for key, active in run.operations.is_active.items() if not active]
    assert gone == small and row["vanished"] == len(gone)
    for batch in run.batches():
        run.train_step(batch)
    assert all(not flats[key].vector.any() for key in gone)
    masks = run.operations.active_paths()
    assert sum(not is_active for cell in CELLS for is_active in masks[cell]) == len(gone)


def test_groups_decay_to_nothing_under_a_penalty_that_no_gradient_balances(images, tmp_path):
    """Where mu_k is beyond the norm of w - v / tau, the prox point is 0 and ||w|| falls by 1 - lr with each step."""
    run = search(images, tmp_path, mu=50.0, weighting="none", clip=1.0, space="cherry", vanish=0.0, epochs=1)
    before = [float(f.vector.detach().norm()) for f in run.operations.flats.values()]
    take_epoch(run)
    after = [float(f.vector.detach().norm()) for f in run.operations.flats.values()]
    assert not any(run.operations.norms().values())
    np.testing.assert_allclose(after, 0.7 ** len(run) * np.array(before), rtol=1e-4)
    run.operations.settings = replace(run.settings, vanish=1e3)
    run.operations.drop_zeroed()
    assert all(run.operations.is_active.values()), "of a cell that would be empty nothing is taken"


def test_a_search_that_diverges_is_ended(images, tmp_path):
    run = search(images, tmp_path)
    run.sums.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the train loss of epoch 1 must be finite, got nan; lr is .*: a lower lr may help"):
        run.end_epoch()


def test_the_strength_for_so_many_paths_is_looked_for(images, tmp_path, no_pictures, capsys):
    options = [*TINY_COMMAND, "--method", "gsparsity", "--space", "cherry", "--valid-images", "16", "--data-dir", str(images)]
    options += "--lr 0.3 --lr-min 0.3 --epochs 1 --mu 0.2 --bisect-runs 3".split()
    (row,) = nas_cifar10.main([*options, "--want-paths", "30", "--out", str(tmp_path / "wanted")])
    tried = rows_of(tmp_path / "wanted" / "bisection.csv")
    assert 1 <= len(tried) <= 3 and row["left"] == min((int(t["left"]) for t in tried), key=lambda n: abs(n - 30))
    found = genotype.load_genotype(tmp_path / "wanted" / "genotype.json")
    assert sum(len(found.paths(c)) for c in CELLS) == row["left"]
    with pytest.raises(SystemExit, match="already contains a run"):
        nas_cifar10.main([*options, "--want-paths", "30", "--out", str(tmp_path / "wanted")])
    nas_cifar10.main([*options, "--mu", "50", "--out", str(tmp_path / "dead")])
    said = capsys.readouterr().out
    assert "cell are zero: a mu smaller than 50 keeps some" in said and "a cell without paths cannot be trained" in said


def test_bisection_brackets_and_halves():
    asked = []

    def left(strength):
        asked.append(strength)
        return int(100 / strength)

    best = bisection.closest_strength(left, 30, 1.0, 8)
    assert abs(left(best) - 30) <= 1
    assert asked[:3] == [1.0, 4.0, 2.0]
    assert bisection.closest_strength(lambda s: 5, 7, 1.0, 3) == 1 / 16
    found = Genotype({"2": [("skip_connect", 0)]}, {})
    assert group_sparsity.parameters_of(found, cnn.network_size) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": -1.0}, "mu must be finite and >= 0, got -1.0"),
        ({"tau": 0.0}, "tau must be finite and > 0, or direct, got 0.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"vanish": float("nan")}, "vanish must be finite and >= 0, got nan"),
        ({"want_paths": 3, "want_parameters": 4}, "exclude each other, got 3, 4"),
        ({"bisect_runs": 0}, "bisect_runs must be >= 1, got 0"),
    ],
)
def test_a_setting_out_of_its_domain_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        gsparsity_settings.GSparsitySettings(**options)


@pytest.mark.parametrize("name", ["images", "valid-images"])
def test_more_images_than_there_are_are_refused(images, tmp_path, name):
    options = [*TINY_COMMAND, "--method", "gsparsity", "--data-dir", str(images), "--out", str(tmp_path), f"--{name}", "5000"]
    with pytest.raises(SystemExit, match=rf"error: {name.replace('-', '_')} must be at most \d+, got 5000"):
        nas_cifar10.main(options)


# -- operation pruning ------------------------------------------------------------------------


def pruned(images, out, mu=3.0, **options):
    chosen = {
        **TINY,
        "data_dir": images,
        "tau": "direct",
        "auxiliary": 0.4,
        "drop_path": 0.0,
        **options,
    }
    out.mkdir(exist_ok=True)
    return pruning.Pruning(genotype.load_genotype("DARTS_V2"), pruning.PruningSettings(**chosen), mu, 0, out, SINGLE_PROCESS, CPU)


@pytest.mark.parametrize("layers", [3, 6])
def test_removing_dead_operations_changes_no_logit(layers, images, tmp_path):
    run = pruned(images, tmp_path, mu=1e-3, layers=layers)
    take_epoch(run)
    zero = zero_some(run.sgd, run.flats)
    row, zeroed = run.end_epoch(), run.zeroed_operations()
    assert zeroed == {m for m, z in zip(run.members, zero) if z} and 0 < len(zeroed) < len(run.flats)
    net = run.net.eval()
    small = pruning.cut(net, zeroed)
    x = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(x)[0], small.eval()(x)[0])
    assert row["dead_operations"] == len(zeroed)
    assert row["pruned_share"] == pytest.approx(
        pruning.weights_of(net, zeroed) / cnn.network_size(net, (3, 32, 32))["parameters"]
    )
    held = sum(p.numel() for p in small.parameters())
    assert held == sum(p.numel() for p in net.parameters()) - pruning.weights_of(net, zeroed)


def test_groups_that_only_decay_become_exactly_zero_once_they_are_small(images, tmp_path):
    # mu is beyond every norm and every clipped gradient: all points are 0, all norms fall by 0.7 with each of 8 steps
    run = pruned(images, tmp_path, mu=50.0, tau=1.0, vanish=0.2, auxiliary=0.0, epochs=4)
    before = run.norms()
    row = run.run()
    gone = [i for i, f in enumerate(run.flats) if not f.vector.any()]
    assert gone == [i for i, norm in enumerate(before) if 0.7**8 * norm < 0.2]
    assert gone and row["dead_operations"] == len(gone)
    assert not any(run.sgd.state[f.vector]["point"].any() for f in run.flats)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(run.net.eval()(x)[0], pruning.cut(run.net, run.zeroed_operations()).eval()(x)[0])


def test_nodes_that_nothing_enters_are_zeros_and_go_in_the_cascade():
    v2 = genotype.load_genotype("DARTS_V2")
    net = cnn.Network(v2, 4, 3, auxiliary=False).eval()
    zeroed = {(0, k) for k, path in enumerate(net.cells[0].paths) if path.node == 2}
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for k in {k for _, k in zeroed}:
            for p in net.cells[0].operations[k].parameters():
                p.zero_()
        small = pruning.cut(net, zeroed)
        assert torch.equal(net(x)[0], small(x)[0])
    left = pruning.cascade(small)
    assert left[0].active_nodes("normal") == (3, 4, 5)
    assert ("dil_conv_3x3", 2) not in left[0].normal["5"], "an edge from a node without paths"
    assert all(left[i].paths("reduce") == v2.paths("reduce") for i in (1, 2))
    assert cnn.Network(left, 4, 3, auxiliary=False)(x)[0].shape == (2, 10)
    everything = {(1, k) for k in range(8)}
    with pytest.raises(ValueError, match="all operations of cell 1 are zero"):
        pruning.cascade(pruning.cut(net, everything))
    with pytest.raises(ValueError, match="one for each of 3 layers, got 2"):
        cnn.Network(left[:2], 4, 3)


def test_with_groups_of_tensors_one_dead_tensor_kills_its_operation(images, tmp_path):
    run = pruned(images, tmp_path / "out", mu=0.0, groups="tensor", tau="adaptive", lr=0.001)
    assert len(run.flats) == len(list(run.net.parameters()))
    run.run()
    assert not run.zeroed_operations()
    assert all(0 < group["tau"] != 1.0 for group in run.sgd.param_groups)
    k = next(i for i, m in enumerate(run.members) if m is not None)
    run.flats[k].clear()
    assert run.zeroed_operations() == {run.members[k]}
    assert run.zeroed_operations(1e9) == {m for m in run.members if m is not None}


def test_the_adaptive_tau_is_the_mean_root_of_the_second_moment(images, tmp_path):
    run = pruned(images, tmp_path / "out", tau="adaptive")
    rng = np.random.default_rng(0)
    r = np.zeros(run.flats[0].vector.numel())
    for t in range(1, 6):
        for i, flat in enumerate(run.flats):
            g = rng.normal(size=flat.vector.numel()) if i == 0 else np.ones(flat.vector.numel())
            flat.vector.grad = torch.tensor(g, dtype=torch.float32)
            if i == 0:
                r = 0.999 * r + 0.001 * g * g
        run._adapt()
        expected = np.sqrt(r / (1 - 0.999**t)).mean() + 1e-8
        assert run.sgd.param_groups[0]["tau"] == pytest.approx(expected, rel=1e-5)
        assert run.sgd.param_groups[1]["tau"] == pytest.approx(1.0, rel=1e-5)


def test_pruning_from_the_command_line(images, tmp_path, capsys):
    # Of the start one operation of each node is 0. A prox step leaves it there where mu is beyond the clipped gradient, and
    # makes none of the others 0 so soon: a norm falls by lr mu = 0.008 and a gradient of norm 1e-3 at most.
    torch.manual_seed(0)
    net = cnn.Network(genotype.load_genotype("DARTS_V2"), 2, 3, auxiliary=False)
    zero = [flat for (_, number), flat in zip(*pruning.groups_of(net, "operation")) if number % 2 == 0]
    for flat in zero:
        flat.clear()
    share = sum(f.vector.numel() for f in zero) / sum(p.numel() for p in net.parameters())
    checkpoint.save(tmp_path / "start.pt", net.state_dict())
    options = [*TINY_COMMAND, "--valid-images", "16", "--data-dir", str(images), "--start", str(tmp_path / "start.pt")]
    options += "--images 16 --epochs 2 --retrain-epochs 1 --mu 0 8 --tau direct --lr 1e-3 --lr-min 1e-3 --clip 1".split()
    options += ["--auxiliary", "0", "--out", str(tmp_path / "out")]
    rows = prune_operations.main(options)
    assert [(r["mu"], r["threshold"]) for r in rows] == [(m, t) for m in (0.0, 8.0) for t in (0.0, 1e-6, 1e-3, 0.5)]
    assert all(r["largest_change"] == 0 and r["before"] == r["after"] for r in rows if r["threshold"] == 0)
    assert rows[0]["dead_operations"] == 0 and rows[4]["dead_operations"] == len(zero)
    assert rows[4]["pruned_share"] == pytest.approx(share) and rows[4]["parameters"] < rows[0]["parameters"]
    assert (tmp_path / "out" / "pruning.png").stat().st_size > 5_000
    assert rows_of(tmp_path / "out" / "mu-8" / "prune.csv")[-1]["dead_operations"] == str(len(zero))
    assert (tmp_path / "out" / "mu-8" / "cells.json").exists()
    with pytest.raises(SystemExit, match="already contains a run"):
        prune_operations.main(options)
    capsys.readouterr()
    assert prune_operations.main([*options, "--resume"]) == rows
    with pytest.raises(SystemExit, match="no file of weights"):
        prune_operations.main([*options, "--out", str(tmp_path / "b"), "--start", str(tmp_path / "none.pt")])
    with pytest.raises(SystemExit, match="must hold the weights of this network"):
        prune_operations.main([*options, "--out", str(tmp_path / "c"), "--channels", "6"])
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="does not contain weights of a network"):
        prune_operations.main([*options, "--out", str(tmp_path / "d"), "--start", str(tmp_path / "bad.pt")])


def test_the_remaining_network_is_counted_for_the_data_and_in_its_form(tmp_path):
    data = Prepared(None, None, classes=3, channels=1, text="", identity={}, statistics=((0.0,), (1.0,)))
    found = genotype.load_genotype("DARTS_V2")
    settings = replace(prune_operations.PRESETS["small"], channels=2, layers=3, retrain_epochs=0, form="gsparsity")
    row = prune_operations.retrain(settings, [found] * 3, data, 0, tmp_path)
    net = cnn.Network(found, 2, 3, 3, False, form="gsparsity", image_channels=1)
    assert row == {"parameters": sum(p.numel() for p in net.parameters())}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\)|momentum must be finite and >= 0"),
        ({"tau": -1.0}, "tau must be finite and > 0, adaptive or direct, got -1.0"),
        ({"vanish": -1.0}, "vanish must be finite and >= 0, got -1.0"),
        ({"want_share": 1.0}, r"want_share must lie in \[0, 1\), got 1.0"),
        ({"mu": ()}, "mu must hold numbers >= 0"),
        ({"thresholds": (-1.0,)}, "thresholds must hold numbers >= 0"),
    ],
)
def test_a_pruning_setting_out_of_its_domain_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        replace(prune_operations.PRESETS["small"], **options)
