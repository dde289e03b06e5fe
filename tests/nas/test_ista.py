"""ISTA-NAS: codes, coefficients and supports, the published loop, and the run in one stage."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nas.bilevel import gradients
from nas.bilevel.steps import CifarSteps
from nas.engine.distributed import SINGLE_PROCESS
from nas.methods import ista_one_stage, registry
from nas.methods.ista import Codes, largest_entries
from nas.methods.settings import ista as ista_settings
from nas.nets.torch import cnn
from nas.nets.torch.operations import BatchNorm
from nas.space import genotype, spaces
from nas.space.genotype import CELLS, NODES
from nas_cases import copy_weights, supernet
from torch.nn import functional as F

CPU = torch.device("cpu")


def moved_codes(seed=0, space="darts", **options):
    """Codes whose variables have left their start, recovered."""
    torch.manual_seed(seed)
    codes = Codes(spaces.get_space(space), ista_settings.IstaSettings(**options), CPU)
    with torch.no_grad():
        for b in codes.parameters:
            b.add_(0.1 * torch.randn_like(b))
    codes.recover()
    return codes


@pytest.mark.parametrize("matrix", ["uniform", "gaussian"])
def test_coefficients_are_those_of_equation_11(matrix):
    codes = moved_codes(matrix=matrix)
    with torch.no_grad():
        for b in codes.parameters:  # b moves on after a recovery; z and S do not
            b.add_(0.01 * torch.randn_like(b))
    for cell, b in zip(CELLS, codes.parameters):
        w = codes.weights()[cell].detach().double().numpy()
        found = codes.coefficients(cell).detach().double().numpy()
        for j, (A, z, members) in enumerate(zip(codes.matrices[cell], codes.codes[cell], codes.members[cell])):
            places = [members.index(int(i)) for i in codes.support[cell][j]]
            A_S, z_S, b_j = A[:, places], z[places], b[j].detach().double().numpy()
            E = A_S.T @ A_S - np.eye(len(places))
            np.testing.assert_allclose(found[j], b_j @ A_S - z_S @ E, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(w[codes.support[cell][j].numpy()], found[j])
        assert (w != 0).sum() == 8


def test_the_gradient_of_a_coefficient_is_its_column():
    codes = moved_codes()
    for number, cell in enumerate(CELLS):
        (grad,) = torch.autograd.grad(codes.coefficients(cell)[2, 1], codes.parameters[number])
        torch.testing.assert_close(grad[2], codes.columns[cell][2, 1])
        assert not grad[[0, 1, 3]].any()


def test_codes_are_certified_and_their_largest_entries_live():
    codes = moved_codes()
    assert codes.gap < 1e-6
    for cell, b in zip(CELLS, codes.parameters):
        for A, z, signal in zip(codes.matrices[cell], codes.codes[cell], b.detach().double().numpy()):
            c = A.T @ (signal - A @ z)
            assert np.abs(c).max() <= 1e-5 * (1 + 1e-6)
            np.testing.assert_allclose(c[z != 0], 1e-5 * np.sign(z[z != 0]), rtol=1e-6)
        found = codes.genotype()
        assert [len(getattr(found, cell)[str(n)]) for n in NODES] == [2, 2, 2, 2]
    assert largest_entries(np.array([0.1, -3.0, 0.0, 2.0]), np.eye(4), np.ones(4), 2) == [1, 3]
    assert largest_entries(np.array([0.0, 0.5, 0.0, 0.0]), np.eye(4), np.array([0, 0, 0.2, -0.9]), 2) == [1, 3]


def published_and_ours(channels=2, layers=3):
    """Our method and supernet, and the published one with the same weights, matrices and variables, in double precision."""
    from naive_ista import NaiveIsta

    torch.manual_seed(0)
    naive = NaiveIsta(channels, layers).double()
    net = supernet("darts", channels, layers).double()
    copy_weights(naive.net, net)
    method = registry.build("ista", net, ista_settings.IstaSettings(lr=0.1))
    codes = method.codes
    with torch.no_grad():
        for number, (cell, b, p) in enumerate(zip(CELLS, naive.b, method.parameters)):
            b.add_(0.1 * torch.randn_like(b))
            p.data = b.detach().clone()
            codes.matrices[cell] = naive.matrices[number]
            codes.values[cell], codes.columns[cell] = codes.values[cell].double(), codes.columns[cell].double()
    naive.recover()
    method.begin_epoch(0)
    return net, method, naive


def test_the_search_takes_the_steps_of_the_published_one(exact_kernels):
    from naive_ista import NaiveIstaSearch

    net, method, naive = published_and_ours()
    steps, published = CifarSteps(net, method, method.settings), NaiveIstaSearch(naive)
    for cell, codes in zip(CELLS, naive.codes):
        for i, code in enumerate(codes):
            members = method.codes.members[cell][i]
            assert {members[k] for k in np.nonzero(code)[0]} == set(method.codes.support[cell][i].tolist())
    draw = lambda: torch.randn(4, 3, 16, 16, dtype=torch.float64)
    x = draw()
    # the codes of the published loop are exact to the tolerance of its solver
    torch.testing.assert_close(net(x, method.weights(), method.active_paths()), naive(x), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for cell, codes in zip(CELLS, naive.codes):
            for i, code in enumerate(codes):
                places = [method.codes.members[cell][i].index(int(k)) for k in method.codes.support[cell][i]]
                method.codes.values[cell][i] = torch.from_numpy(code[places])
    for _ in range(2):
        train, valid = [(draw(), torch.randint(10, (4,))) for _ in range(2)]
        steps.architecture(0, train, valid)
        steps.weights(train)
        published.step(*train, *valid)
    for b, p in zip(naive.b, method.parameters):
        torch.testing.assert_close(p, b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(net.classifier.weight, naive.net.classifier.weight, rtol=1e-5, atol=1e-7)


def test_only_the_supported_operations_run_and_learn():
    net = supernet()
    method = registry.build("ista", net, ista_settings.IstaSettings())
    method.begin_epoch(0)
    ran = []
    for cell in net.cells:
        for key, operation in cell.operations.items():
            operation.register_forward_pre_hook(lambda *_, key=key: ran.append(key))
            if hasattr(operation, "body"):
                operation.body = lambda *a, body=operation.body, key=key: ran.append(key) or body(*a)
    steps = CifarSteps(net, method, method.settings)
    batch = (torch.randn(4, 3, 16, 16), torch.randint(10, (4,)))
    steps.weights(batch)
    assert len(ran) <= 8 * len(net.cells), "shared pools may count once"
    named = {name for name, p in net.named_parameters() if p.grad is not None and ".operations." in name}
    active = {
        f"cells.{i}.operations.{c.keys[k]}."
        for i, c in enumerate(net.cells)
        for k, v in enumerate(method.active_paths()[net.kinds[i]])
        if v
    }
    assert named and all(any(name.startswith(a) for a in active) for name in named)


def test_supports_change_between_epochs_only_unless_asked_for_more():
    for every, changes in ((0, False), (2, True)):
        method = registry.build("ista", supernet(), ista_settings.IstaSettings(arch_lr=0.3, recover_every=every))
        method.begin_epoch(0)
        before = method.active_paths()
        for _ in range(4):
            method.update([torch.randn(4, 7) for _ in CELLS])
        assert (method.active_paths() != before) == changes
        method.begin_epoch(1)
        assert (method.active_paths() != before) or changes
        assert method.log()["recovery_gap"] < 1e-6 and method.log()["moved"] > 0


def test_spaces_with_few_paths_are_searched_or_refused():
    codes = moved_codes(space="S3", sparsity=2)
    assert "none" not in {p.operation for cell in CELLS for p in codes.genotype().paths(cell)}
    with pytest.raises(ValueError, match="sparsity must be at most 4, the paths into node 2 of the normal cell of S2, got 5"):
        moved_codes(space="S2", sparsity=5)
    method = moved_codes()
    with torch.no_grad():
        method.parameters[0][0, 0] = float("nan")
    before = method.masks
    with pytest.raises(ValueError, match="compressed variables must be finite, got nan"):
        method.recover()
    assert method.masks == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be >= 1, got 0"),
        ({"sparsity": -1}, "sparsity must be >= 1, got -1"),
        ({"strength": 0.0}, "strength must be finite and > 0, got 0.0"),
        ({"recover_every": -1}, "recover_every must be finite and >= 0, got -1"),
        ({"arch_lr": float("nan")}, "arch_lr must be finite and >= 0, got nan"),
        ({"batch": 0}, "batch must be >= 1, got 0"),
    ],
)
def test_a_setting_out_of_its_domain_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ista_settings.IstaSettings(**options)


def test_weights_are_clipped_by_the_norm_of_both_gradients(monkeypatch):
    net = supernet("cherry", 2)
    method = registry.build("ista", net, ista_settings.IstaSettings())
    method.begin_epoch(0)
    train, valid = ((torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(2))
    found = []
    monkeypatch.setattr(gradients, "clip", lambda grads, threshold: found.extend(g.clone() for g in grads))
    steps = CifarSteps(net, method, method.settings)
    on = lambda batch: F.cross_entropy(net(batch[0], method.weights(), method.active_paths()), batch[1])
    expected = torch.autograd.grad(on(valid), method.parameters)
    steps.architecture(0, train, valid)
    expected = [v + t for v, t in zip(expected, torch.autograd.grad(on(train), method.parameters))]
    before = [b.detach().clone() for b in method.parameters]
    steps.weights(train)
    torch.testing.assert_close(found[-2:], expected)
    assert all(torch.equal(b, old) for b, old in zip(method.parameters, before))


# -- one stage --------------------------------------------------------------------------------


def run_of(images, out, **options):
    tiny = {"channels": 2, "layers": 3, "batch": 8, "images": 24, "valid_images": 16, "space": "cherry", "auxiliary": 0.0}
    settings = ista_one_stage.OneStageSettings(
        **{**tiny, "epochs": 2, "search_epochs": 2, "tolerance": 0.0, "data_dir": images, "out": out, **options}
    )
    run = ista_one_stage.OneStageSearch(settings, 0, out, SINGLE_PROCESS, CPU)
    out.mkdir(exist_ok=True)
    return run


def shake(net):
    """Norms with scales, shifts and statistics that do something."""
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, BatchNorm):
                m.running_mean.uniform_(-0.5, 0.5)
                m.running_var.uniform_(0.5, 2.0)
                m.weight.uniform_(0.5, 2.0)
                m.bias.uniform_(-1.0, 1.0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_absorbing_the_coefficients_changes_no_logit(mode):
    torch.manual_seed(0)
    net = cnn.Supernet(spaces.get_space("darts"), 2, 3, form="one_stage", auxiliary=True).double().train(mode == "train")
    shake(net)
    codes = moved_codes(3)
    weights = {cell: w.detach().double() for cell, w in codes.weights().items()}
    alone = cnn.absorbed(net, codes.genotype(), weights).train(mode == "train")
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, found = net.outputs(x, weights, codes.masks), alone(x)
    assert expected[0].std() > 0.01
    torch.testing.assert_close(found[0], expected[0], rtol=1e-7, atol=1e-7)
    if mode == "train":
        torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="form of the supernet must be 'one_stage'"):
        cnn.absorbed(supernet(), codes.genotype(), weights)


def test_a_run_in_one_stage_ends_in_a_trained_network(images, tmp_path):
    run = run_of(images, tmp_path / "out")
    row = run.run()
    assert [(r["frozen_nodes"], r["stopped_nodes"]) for r in run.rows] == [(0, 0), (0, 0), (0, 8), (0, 8), (0, 8)]
    assert run.rows[0]["lr"] == run.rows[3]["lr"] > run.rows[4]["lr"], "one epoch between search and training"
    assert [r["distance"] > 0 for r in run.rows] == [True, True, True, False, False]
    assert "0 nodes frozen by themselves, 8 stopped" in (tmp_path / "out" / "report.html").read_text()
    net = cnn.Network(genotype.load_genotype(tmp_path / "out" / "genotype.json"), 2, 3, auxiliary=False, form="one_stage")
    net.load_state_dict(torch.load(tmp_path / "out" / "network.pt", weights_only=True))
    net.double().eval()
    run.net.double().eval()
    weights = {cell: w.detach().double() for cell, w in run.codes.weights().items()}
    correct = total = 0
    with torch.no_grad():
        for x, y in run.validation():
            logits, expected = net(x.double())[0], run.net(x.double(), weights, run.codes.masks)
            # network.pt holds scales that were multiplied in single precision
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
            correct, total = correct + int((expected.argmax(1) == y).sum()), total + len(y)
    assert correct / total == pytest.approx(row["valid_accuracy"], abs=1.5 / total), "an image may lie on a border"
    for name in ("cells.svg", "weights.png", "train.png", "distances.png", "report.html", "search.csv", "settings.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_a_space_whose_coefficients_cannot_be_absorbed_is_refused_at_once(images, tmp_path):
    with pytest.raises(ValueError, match="which noise cannot, got 'S4'"):
        run_of(images, tmp_path / "out", space="S4")


def test_without_a_clip_the_run_still_learns(images, tmp_path):
    run = run_of(images, tmp_path / "out", clip=0.0)
    before = run.net.classifier.weight.detach().clone()
    run.begin_epoch()
    run.train_step(next(iter(run.batches())))
    assert (run.net.classifier.weight != before).any()


def test_norms_are_frozen_until_their_node_rests(images, tmp_path):
    run = run_of(images, tmp_path / "out")
    run.begin_epoch()
    for batch in run.batches():
        run.train_step(batch)
    norms = run._norms()
    assert all(not n.weight.requires_grad and (n.weight == 1).all() and not n.bias.any() for ns in norms.values() for n in ns)
    run.frozen["normal"][1] = True
    run._train_norms()
    kept = run.codes.parameters[0].detach().clone()
    for batch in run.batches():
        run.train_step(batch)
    assert torch.equal(run.codes.parameters[0][1], kept[1])
    assert all((run.codes.parameters[0][i] != kept[i]).any() for i in (0, 2, 3))
    learnt = {key for key, ns in norms.items() if any((n.weight != 1).any() for n in ns)}
    assert learnt == {("normal", NODES[1])}


def test_a_code_at_rest_ends_the_search_of_its_node(images, tmp_path, no_pictures):
    run = run_of(images, tmp_path / "out", tolerance=1e6, search_epochs=50)
    run.run()
    assert [(r["frozen_nodes"], r["stopped_nodes"]) for r in run.rows] == [(0, 0), (8, 0), (8, 0), (8, 0)]
    assert run.epochs() == 4


def test_supports_of_too_many_parameters_are_refused(images, tmp_path, no_pictures):
    run = run_of(images, tmp_path / "out", max_parameters=1, search_epochs=3, arch_lr=1.0)
    run.run()
    first = genotype.load_genotype(tmp_path / "out" / "genotypes" / "epoch-001.json")
    assert genotype.load_genotype(tmp_path / "out" / "genotype.json") == first, "the first support cannot be refused"
    assert run.rows[-1]["stopped_nodes"] == 8, "the budget of search epochs holds all the same"


def test_the_limit_of_parameters_counts_the_network_for_the_data(images, tmp_path):
    run = run_of(images, tmp_path / "out", max_parameters=1)
    run.codes.set_codes(run.codes.solve())
    net = cnn.Network(run.codes.genotype(), 2, 3, 10, False, form="one_stage")
    run.settings = replace(run.settings, max_parameters=sum(p.numel() for p in net.parameters()))
    assert not run._too_large()
    run.prepared = run.prepared._replace(classes=11)
    assert run._too_large()
    run.prepared, run.image_channels = run.prepared._replace(classes=10), 4
    assert run._too_large()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search_epochs": 0}, "search_epochs must be >= 1, got 0"),
        ({"warmup_epochs": 5}, "warmup_epochs must be 0 in one stage, which begins with the search, got 5"),
        ({"max_parameters": -1}, "max_parameters must be finite and >= 0, got -1"),
        ({"tolerance": -1.0}, "tolerance must be finite and >= 0, got -1.0"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
        ({"strength": -1.0}, "strength must be finite and > 0, got -1.0"),
    ],
)
def test_a_one_stage_setting_out_of_its_domain_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ista_one_stage.OneStageSettings(**options)


def test_an_identity_passes_its_gradient_through_a_norm_in_one_stage():
    net = cnn.Supernet(spaces.get_space("cherry"), 4, 3, form="one_stage")
    names = [name for name, _ in net.named_parameters()]
    assert any("skip_connect_from_0_to_2.norm.weight" in name for name in names)
    assert any("max_pool_3x3_from_1_to_4.norm.bias" in name for name in names), "pools have a norm for each destination"
    F.cross_entropy(net(torch.randn(4, 3, 16, 16)), torch.randint(10, (4,))).backward()
    assert all(p.grad is not None for p in net.parameters())
