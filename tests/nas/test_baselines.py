"""PC-DARTS, DARTS with early stopping, and drop path and cutout in searches."""

import numpy as np
import pytest
import torch
from nas.bilevel import curvature, gradients
from nas.bilevel.early_stopping import epoch_to_return_to
from nas.bilevel.search_cifar import CifarSearch
from nas.data.cifar import Augment
from nas.engine.distributed import SINGLE_PROCESS
from nas.methods import darts, pc_darts
from nas.methods.settings.darts import DartsSettings, PartialSettings
from nas.nets.torch import cnn
from nas.nets.torch.operations import BatchNorm, Pool
from nas.space import spaces
from nas_cases import supernet
from torch.nn import functional as F

CPU = torch.device("cpu")
TINY = {"images": 32, "epochs": 2, "batch": 8, "channels": 4, "layers": 3, "space": "cherry"}


def searched(method, settings, images, out):
    return CifarSearch(method, type(settings)(**{**vars(settings), "data_dir": images, "out": out}), 0, out, SINGLE_PROCESS, CPU)


# -- PC-DARTS ---------------------------------------------------------------------------------


def test_an_edge_of_pc_darts_is_the_published_one():
    torch.manual_seed(0)
    net = pc_darts.PartialSupernet(spaces.get_space("darts_zero"), 8, 3)
    cell = net.cells[0].train()
    x = torch.randn(4, 8, 6, 6)
    paths = cell.edges[2, 0]
    share, beta = torch.rand(8).softmax(0), 0.7
    scales = [None] * len(cell.paths)
    for i, p in zip(paths, share):
        scales[i] = (beta * p).expand(8)
    found = cell._edge(x, cell._quarter(x), paths, [i for i in paths if cell.paths[i].operation != "none"], scales, False)
    mixed = sum(p * cell.operation(i)(x[:, :2].contiguous()) for i, p in zip(paths, share) if cell.paths[i].operation != "none")
    whole = beta * torch.cat([mixed, x[:, 2:]], 1)
    expected = whole.view(4, 4, 2, 6, 6).transpose(1, 2).reshape(4, 8, 6, 6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    halved = net.cells[1]
    assert {m.norm.num_features for m in halved.modules() if isinstance(m, Pool)} == {4}, "16 channels, a quarter of them"
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_pc_darts_trains_both_kinds_of_logits_after_the_first_epochs():
    settings = PartialSettings(frozen_epochs=1, arch_lr=0.1)
    method = pc_darts.PartialDarts(spaces.get_space("darts_zero"), settings, CPU)
    method.begin_epoch(0)
    assert method.frozen
    method.begin_epoch(1)
    assert not method.frozen
    edges = torch.tensor(method.space.edges("normal"))
    betas = torch.zeros(14).index_add_(0, edges, method.weights()["normal"])
    assert [float(part.detach().sum()) for part in betas.split([2, 3, 4, 5])] == pytest.approx([1.0] * 4)
    before = [p.detach().clone() for p in method.parameters]
    loss = sum((w * torch.randn(len(w))).sum() for w in method.weights().values())
    method.update([*torch.autograd.grad(loss, method.parameters)])
    assert len(before) == 4 and all(not torch.equal(p, old) for p, old in zip(method.parameters, before))
    again = pc_darts.PartialDarts(method.space, settings, CPU)
    again.load_state_dict(method.state_dict())
    assert again.log() == method.log() and again.genotype() == method.genotype()


@pytest.mark.usefixtures("no_pictures")
def test_a_search_by_pc_darts_runs(images, tmp_path):
    run = searched(pc_darts.PartialDarts, PartialSettings(**TINY, lr=0.02, frozen_epochs=1, arch_lr=0.1), images, tmp_path)
    tmp_path.mkdir(exist_ok=True)
    start = [p.detach().clone() for p in run.method.parameters]
    run.run()
    assert run.rows[0].keys() == run.rows[1].keys() and "edge_entropy_reduce" in run.rows[1]
    assert all(not torch.equal(p, old) for p, old in zip(run.method.parameters, start))


# -- early stopping -----------------------------------------------------------------------------


def rows_of(eigenvalues):
    return [{"epoch": e, **({"eigenvalue": v} if v is not None else {})} for e, v in enumerate(eigenvalues, 1)]


def test_a_search_returns_to_the_epoch_before_the_eigenvalue_grew():
    settings = DartsSettings(early_stop=True)
    flat = [0.2 if e % 2 == 0 else None for e in range(50)]
    assert epoch_to_return_to(rows_of(flat), settings) is None
    growing = [None if e % 2 else 0.2 if e <= 20 else 0.2 * 1.5 ** (e - 20) for e in range(50)]
    stops = [epoch_to_return_to(rows_of(growing[:n]), settings) for n in range(1, 51)]
    first = next(epoch for epoch, stop in enumerate(stops, 1) if stop is not None)
    # the average of epochs 17 to 25 (0.2, 0.2, 0.2, 0.45, 1.0125) is the first that is 1.3 times the one four before it, at 13
    assert (first, stops[first - 1]) == (25, 13)
    assert epoch_to_return_to(rows_of([0.2 if e < 6 else 9.0 for e in range(12)]), settings) is None, "not before epoch 11"


def test_only_one_rule_chooses_the_epoch():
    with pytest.raises(ValueError, match="pick_below must be 0 with early_stop, which chooses the epoch itself, got 9"):
        DartsSettings(early_stop=True, pick_below=9)


def test_the_largest_eigenvalue_is_that_of_the_hessian():
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64)
    matrix = root + root.T
    x = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (5, 7)]
    loss = lambda: 0.5 * torch.cat(x) @ matrix @ torch.cat(x) + torch.cat(x).sum()
    expected = float(torch.linalg.eigvalsh(matrix)[-1])
    assert curvature.largest_eigenvalue(x, loss, tolerance=0.0) == pytest.approx(expected, rel=1e-6)


def test_the_eigenvalue_of_a_search_is_that_of_exact_second_derivatives():
    net = supernet("cherry", 2)
    method = darts.Darts(net.space, DartsSettings(space="cherry"), CPU)
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    loss = lambda: F.cross_entropy(net(images, method.weights()), labels)
    first = torch.cat(torch.autograd.grad(loss(), method.parameters, create_graph=True))
    rows = [torch.cat(torch.autograd.grad(g, method.parameters, retain_graph=True)) for g in first]
    expected = float(torch.linalg.eigvalsh(torch.stack(rows))[-1])
    with gradients.constant([*net.parameters()]):
        assert curvature.largest_eigenvalue(method.parameters, loss) == pytest.approx(expected, rel=0.01)


@pytest.mark.usefixtures("no_pictures")
def test_a_search_that_stops_early_returns_an_earlier_genotype(images, tmp_path, monkeypatch, capsys):
    values = iter([1.0, 1.0, 5.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(curvature, "largest_eigenvalue", lambda *args: next(values))
    options = {"eigenvalue_every": 1, "stop_window": 1, "stop_delay": 1, "stop_after": 1, "order": "first"}
    settings = DartsSettings(**{**TINY, "epochs": 6, "channels": 2}, **options, early_stop=True, drop_path=0.5, cutout=8)
    run = searched(darts.Darts, settings, images, tmp_path)
    row = run.run()
    assert len(run.rows) == 3 and row["epoch"] == 2 and run.epochs() == 3
    assert "stopped early after epoch 3: the result is the genotype after epoch 2" in capsys.readouterr().out
    assert (tmp_path / "genotype.json").read_text() == (tmp_path / "genotypes" / "epoch-002.json").read_text()
    assert run.train_batches.augment.cutout == 8 and run.train_batches.augment.cutout_share == pytest.approx(0.4)
    run.epoch = 5
    run.begin_epoch()
    assert run.net.drop_path == 0.5 and run.valid_batches.augment.cutout_share == 1.0


# -- drop path and cutout in searches -------------------------------------------------------------


def test_drop_path_in_a_search_acts_on_the_sums_of_edges():
    net = supernet("cherry", 2)
    cell = net.cells[0].train()
    for m in cell.modules():
        if isinstance(m, BatchNorm):
            m.eval()
    x = torch.randn(64, 6, 4, 4)
    run = lambda probability: cell(cnn.Source(x), cnn.Source(x), [None] * len(cell.paths), None, probability, last=True)
    torch.manual_seed(0)
    whole, first = run(0.0)[:, :2], run(0.5)[:, :2]  # node 2: two edges of two operations
    edges = [
        cell(cnn.Source(x), cnn.Source(x), [None] * len(cell.paths), [p.source == s for p in cell.paths], last=True)[:, :2]
        for s in (0, 1)
    ]
    torch.testing.assert_close(edges[0] + edges[1], whole)
    kinds = {tuple(bool(k) for k in found) for found in _kept(first, edges)}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}
    cell.eval()
    torch.testing.assert_close(run(0.5)[:, :2], run(0.0)[:, :2])


def _kept(found, edges):
    """For each sample which edges it has, each of them doubled."""
    for sample, a, b in zip(found, *edges):
        yield next((i, j) for i in (0, 1) for j in (0, 1) if torch.allclose(sample, 2 * (i * a + j * b), atol=1e-4))


def test_a_share_of_the_images_is_masked():
    images = torch.full((400, 3, 8, 8), 255, dtype=torch.uint8)
    masked = lambda share: Augment((0.0,) * 3, (1.0,) * 3, cutout=4, cutout_share=share)(images, torch.Generator().manual_seed(0))
    count = lambda share: int((masked(share) == 0).flatten(1).any(1).sum())
    assert count(0.0) == 0 and 140 < count(0.5) < 260 and count(1.0) == 400
    np.testing.assert_array_equal(
        masked(1.0), Augment((0.0,) * 3, (1.0,) * 3, cutout=4)(images, torch.Generator().manual_seed(0))
    )
