"""NAS-Bench-201: cells and their strings, the networks against a plain implementation, and searches by every method."""

import json

import nas
import nas_cifar10
import numpy as np
import pytest
import torch
import train_cifar10
from nas.bilevel.settings import CifarSearchSettings
from nas.data import cifar, cifar_files, image_sets
from nas.engine.distributed import WHOLE_BATCH, Share
from nas.methods import pc_darts, recovery, registry
from nas.methods.edges import strongest_genotype
from nas.methods.settings import darts, gsparsity, ista, sparse_supernet
from nas.methods.sparse_supernet import Guard
from nas.nets.torch import image_networks, nasbench201
from nas.nets.torch.operations import frozen_statistics, norms_of
from nas.space import drawing
from nas.space.genotype import CellGenotype, Genotype, Path, load_genotype, load_image_genotype
from nas.space.spaces import discrete, get_space, one_per_edge
from nas_cases import fake_cifar, rows_of, same, stopped
from torch import nn
from torch.nn import functional as F

EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
OPERATIONS = ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
MIXED = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|"
ALL_3X3 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
SPACE = get_space("nasbench201_nonzero")
CPU = torch.device("cpu")
SMALL = "--preset nasbench201_small --images 32 --batch 8 --channels 2 --layers 3 --epoch-steps 3 --valid-images 8".split()
TINY = [*SMALL, *"--epochs 2 --threads 1 --device cpu".split()]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    fake_cifar(root)
    return root


# cells


@pytest.mark.parametrize("text", [MIXED, ALL_3X3, "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"])
def test_a_string_comes_back_as_it_was(text, tmp_path):
    cell = CellGenotype.from_string(text)
    assert cell.to_string() == text
    cell.save(tmp_path / "cell.json")
    (tmp_path / "cell.txt").write_text(f"\ufeff{text}\n", encoding="utf-8")  # with a byte order mark, as editors of Windows write
    for source in (tmp_path / "cell.json", tmp_path / "cell.txt", text):
        assert load_genotype(source, CellGenotype) == load_image_genotype(source) == cell
    assert isinstance(load_image_genotype("DARTS_V2"), Genotype)


def test_the_paths_of_a_string_are_those_that_it_names():
    cell = CellGenotype.from_string(MIXED)
    assert cell.paths("cell") == (
        Path(1, 0, "nor_conv_3x3"),
        Path(2, 1, "skip_connect"),
        Path(3, 0, "avg_pool_3x3"),
        Path(3, 1, "nor_conv_1x1"),
        Path(3, 2, "nor_conv_3x3"),
    )
    assert cell.active_nodes("cell") == (1, 2, 3)
    assert cell.output_nodes("cell") == (3,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("|nor_conv_3x3~0|", "a cell must be 3 nodes separated by '\\+', got 1"),
        ("|nor_conv_3x3~1|+|none~0|none~1|+|none~0|none~1|none~2|", "node 1 must be .* with the sources 0 to 0, got '.nor_conv"),
        ("|none~\u0660|+|none~0|none~1|+|none~0|none~1|none~2|", "node 1 must be .* with the sources 0 to 0"),
        ("|none~0|+|none~0|+|none~0|none~1|none~2|", "node 2 must be .* with the sources 0 to 1, got '.none~0.'"),
        ("|nor_conv3x3~0|+|none~0|none~1|+|none~0|none~1|none~2|", "node 1: unknown operation 'nor_conv3x3'; did you mean 'nor_"),
    ],
)
def test_other_strings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        CellGenotype.from_string(text)


def test_a_string_names_one_operation_an_edge():
    cell = CellGenotype({"3": [["skip_connect", 0], ["nor_conv_1x1", 0]]})
    with pytest.raises(ValueError, match="one operation for each edge, got skip_connect and nor_conv_1x1 from 0 to 3"):
        cell.to_string()


def test_the_two_spaces_have_the_published_edges_and_operations():
    for name, operations in (("nasbench201", ("none", *OPERATIONS)), ("nasbench201_nonzero", OPERATIONS)):
        space = get_space(name)
        assert space.kind is CellGenotype
        assert space.paths("cell") == tuple(Path(*edge, operation) for edge in EDGES for operation in operations)


def test_one_operation_is_left_on_each_edge():
    point = torch.zeros(24)
    for edge, operation, weight in ((0, 1, 0.5), (0, 2, -0.7), (3, 0, 0.1), (3, 3, 0.1), (5, 2, 1e-9)):
        point[4 * edge + operation] = weight
    found = SPACE.genotype({"cell": point != 0})
    for values in (point, point.numpy()):
        cell = one_per_edge(SPACE, found, {"cell": values})
        assert cell.to_string() == "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|nor_conv_3x3~2|"
    assert discrete(SPACE, found, {"cell": point}) == cell
    other = load_genotype("DARTS_V2")
    assert discrete(get_space("darts"), other, {}) is other


def test_pictures_end_in_the_output_of_node_3():
    cell = CellGenotype.from_string("|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|")
    layout = drawing._place(cell, "cell")
    assert [link for link in layout.links if link[1] == "out"] == [(3, "out")]
    drawing.plt.close(drawing.cells(cell))


# networks


class Published(nn.Module):
    """A plain supernet, operation by operation."""

    def __init__(self, net: nasbench201.Supernet, path_norm: bool):
        super().__init__()
        self.net, self.path_norm = net, path_norm

    def cell(self, mixed, x, weights, active):
        nodes = [x]
        for node in (1, 2, 3):
            total = torch.zeros_like(x)
            for i, path in enumerate(mixed.paths):
                if path.node != node or path.operation == "none" or not active[i]:
                    continue
                y = nodes[path.source]
                if path.operation.startswith("nor_conv"):
                    y = mixed.operation(i)(F.relu(y))
                elif path.operation == "avg_pool_3x3":
                    y = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)
                if self.path_norm or path.operation.startswith("nor_conv"):
                    y = F.batch_norm(y, None, None, training=True)
                total = total + weights[i] * y
            nodes.append(total)
        return nodes[3]

    def forward(self, x, weights, active):
        net, number = self.net, 0
        x = net.stem(x)
        for kind, layer in zip(net.kinds, net.cells):
            if kind == "cell":
                x = self.cell(layer, x, weights[number] if weights.ndim == 2 else weights, active)
                number += 1
            else:
                x = layer(x)
        return net.classifier(F.relu(net.norm(x)).mean((2, 3)))


@pytest.mark.parametrize("space", ["nasbench201", "nasbench201_nonzero"])
@pytest.mark.parametrize("path_norm", [False, True])
@pytest.mark.parametrize(("transition", "by_cell"), [("residual", True), ("patch", False)])
def test_the_supernet_computes_every_path(space, path_norm, transition, by_cell):
    torch.manual_seed(0)
    space = get_space(space)
    net = nasbench201.Supernet(space, 3, 5, 7, path_norm=path_norm, transition=transition).double()
    plain, many = Published(net, path_norm), len(space.paths("cell"))
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    weights = torch.randn(3, many, dtype=torch.float64) if by_cell else torch.randn(many, dtype=torch.float64)
    for share in (1.0, 0.5):
        active = (torch.rand(many) < share).tolist()
        assert space.genotype({"cell": active}).clean().output_nodes("cell")
        ours, theirs = weights.clone().requires_grad_(), weights.clone().requires_grad_()
        with frozen_statistics(net):
            logits, expected = net(images, {"cell": ours}, {"cell": active}), plain(images, theirs, active)
        torch.testing.assert_close(logits, expected)
        tensors = list(net.parameters())
        found = torch.autograd.grad(logits.square().sum(), [ours, *tensors], allow_unused=True)
        wanted = torch.autograd.grad(expected.square().sum(), [theirs, *tensors], allow_unused=True)
        for a, b, tensor in zip(found, wanted, [ours, *tensors]):
            torch.testing.assert_close(*(torch.zeros_like(tensor) if g is None else g for g in (a, b)), rtol=1e-6, atol=1e-8)


def test_the_running_statistics_of_a_path_follow_it_alone():
    torch.manual_seed(0)
    net = nasbench201.Supernet(SPACE, 2, 3, path_norm=True)
    before = {name: b.clone() for name, b in net.named_buffers() if "running" in name}
    active = [path == Path(3, 0, "nor_conv_3x3") for path in SPACE.paths("cell")]
    net(torch.randn(4, 3, 8, 8), None, {"cell": active})
    changed = {name: (b != before[name]).nonzero().flatten().tolist() for name, b in net.named_buffers() if name in before}
    paths = {name: entries for name, entries in changed.items() if "norms" in name and entries}
    assert paths == {f"cells.0.norms.nor_conv_3x3_from_0.running_{what}": [4, 5] for what in ("mean", "var")}
    net.eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 8, 8), None, {"cell": active}).isfinite().all()
    assert len(norms_of(net)) == len({id(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)})


def test_a_cell_without_a_way_to_its_output_is_zero():
    net = nasbench201.Supernet(SPACE, 2, 3)
    weights = torch.ones(24, requires_grad=True)
    logits = net(torch.randn(4, 3, 8, 8), {"cell": weights}, {"cell": [path.node == 1 for path in SPACE.paths("cell")]})
    assert (logits == logits[0]).all()
    logits.sum().backward()
    assert weights.grad is None and net.classifier.bias.grad is not None


@pytest.mark.parametrize("probability", [0.9, torch.tensor(0.9)])
def test_drop_path_acts_in_training_mode_only(probability):
    torch.manual_seed(0)
    net, images = nasbench201.Supernet(SPACE, 2, 3), torch.randn(4, 3, 8, 8)
    for mode, equal in ((True, False), (False, True)):
        net.train(mode)
        net.drop_path = 0.0
        with frozen_statistics(net):
            whole = net(images)
            net.drop_path = probability
            assert torch.equal(net(images), whole) == equal


def test_each_path_has_parameters_of_its_own():
    net = nasbench201.Supernet(SPACE, 4, 8)
    found = net.path_parameters()
    assert list(found) == [("cell", path) for path in SPACE.paths("cell")]
    for (_, path), parameters in found.items():
        size = {"nor_conv_1x1": 1, "nor_conv_3x3": 9}.get(path.operation, 0)
        assert [p.numel() for p in parameters] == ([size * c * c for c in (4, 4, 8, 8, 16, 16)] if size else [])
    assert net.kinds == ["cell", "cell", "reduce", "cell", "cell", "reduce", "cell", "cell"]


def published_size(text: str) -> tuple[int, int]:
    """Parameters and multiply-adds of the published network by hand: stem, five cells a stage, two residual blocks, head."""
    kernels = [{"nor_conv_1x1": 1, "nor_conv_3x3": 9}.get(p.operation, 0) for p in CellGenotype.from_string(text).paths("cell")]
    parameters, macs = 27 * 16 + 32, 27 * 16 * 1024
    for stage, channels in enumerate((16, 32, 64)):
        pixels = 1024 // 4**stage
        for kernel in filter(None, kernels):
            parameters += 5 * (kernel * channels**2 + 2 * channels)
            macs += 5 * kernel * channels**2 * pixels
        if stage:
            half = channels // 2
            weights = 9 * half * channels + 9 * channels**2 + half * channels
            parameters, macs = parameters + weights + 4 * channels, macs + weights * pixels
    return parameters + 2 * 64 + 650, macs + 640


@pytest.mark.parametrize(
    ("text", "parameters", "macs"),  # in millions, as the benchmark prints them
    [
        # printed in issue 36 of github.com/D-X-Y/NATS-Bench
        ("|skip_connect~0|+|none~0|nor_conv_3x3~1|+|avg_pool_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|", 0.802426, 113.95),
        (ALL_3X3, 1.531546, 220.12),
        ("|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|", 1.288506, 184.73),
        ("|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_3x3~2|", 1.073466, 153.27),
        ("|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|", 0.316346, 43.17),  # counted, though not used
    ],
)
def test_networks_have_the_published_sizes(text, parameters, macs):
    found = image_networks.genotype_size(CellGenotype.from_string(text))
    assert (found["parameters"], found["macs"]) == published_size(text)
    assert (round(found["parameters"] / 1e6, 6), round(found["macs"] / 1e6, 2)) == (parameters, macs)


def test_a_network_trains_and_refuses_no_cell():
    for text in (MIXED, "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"):
        net = nasbench201.Network(CellGenotype.from_string(text), 2, 3, 5, drop_path=0.3)
        logits, auxiliary = net(torch.randn(2, 3, 8, 8))
        assert logits.shape == (2, 5) and auxiliary is None
        logits.sum().backward()
    with pytest.raises(ValueError, match="layers must be at least 3"):
        nasbench201.Network(CellGenotype.from_string(MIXED), 2, 1)


def test_settings_of_other_spaces_are_refused():
    with pytest.raises(ValueError, match="transition belongs to the space nasbench201, got 'patch' with 'cherry'"):
        image_networks.supernet(get_space("cherry"), CifarSearchSettings(transition="patch"), 10, 3)


def test_operations_of_pc_darts_see_a_quarter():
    torch.manual_seed(0)
    space = get_space("nasbench201")
    cell = pc_darts.OneInputCell(space.paths("cell"), 8, False).double()
    x, weights = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    active = [path == Path(3, 0, "skip_connect") for path in space.paths("cell")]
    found = cell(x, weights, active).view(2, 2, 4, 4, 4).transpose(1, 2).reshape(x.shape)  # before the channels are interleaved
    skip, beta = weights[active.index(True)], weights[15:20].sum()
    torch.testing.assert_close(found, torch.cat([skip * x[:, :2], beta * x[:, 2:]], 1))


# data


def test_images_are_reduced_by_averaging():
    pixels = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    assert image_sets.averaged(pixels, 2).tolist() == [[[[3, 5], [11, 13]]]]  # 2.5, 4.5, 10.5, 12.5 are rounded upwards
    drawn = np.random.default_rng(0).integers(0, 256, (9, 2, 16, 16), np.uint8)
    part = cifar_files.Images(drawn, np.zeros(9, np.int64))
    data = cifar_files.Dataset("x", part, part, 3, (0.1, 0.2), (0.3, 0.4))
    small = image_sets.reduced(data, 4)
    means = np.round(drawn.reshape(9, 2, 4, 4, 4, 4).mean((3, 5)) + 1e-9).astype(np.uint8)
    assert (small.train[0] == means).all()
    np.testing.assert_allclose(small.mean, means.mean((0, 2, 3)) / 255)
    np.testing.assert_allclose(small.std, means.std((0, 2, 3)) / 255)
    for wrong in (3, 6, 20):
        with pytest.raises(ValueError, match=f"pixels must be divisible by 4 and divide the side .* got {wrong} for 16x16"):
            image_sets.reduced(data, wrong)


def test_epochs_of_some_steps_see_every_image_before_any_again():
    data = cifar.Images(torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(11, 1, 4, 4), torch.arange(11))
    augment = cifar.Augment((0.0,), (1.0,), padding=1)
    make = lambda steps, share=WHOLE_BATCH: cifar.Batches(data, 2, 0, augment, 1, share, steps)
    labels = [label for epoch in range(10) for _, label in make(3).epoch(epoch)]
    passes = torch.cat(labels).view(6, 10)
    assert all(len(set(one.tolist())) == 10 for one in passes)
    assert not torch.equal(passes[0], passes[1])
    whole = [batch for epoch in range(6) for batch in make(0).epoch(epoch)]
    for steps in (3, 5, 7):  # the same batches, whatever the length of an epoch
        parts = [batch for epoch in range(30 // steps) for batch in make(steps).epoch(epoch)]
        assert all(torch.equal(a, b) for one, other in zip(parts, whole) for a, b in zip(one, other))
        resumed = [*make(steps).epoch(2, 1)]
        assert same([list(b) for b in resumed], [list(b) for b in make(steps).epoch(2)][1:])
    shares = [list(make(7, Share(rank, 2)).epoch(1)) for rank in (0, 1)]
    both = [torch.stack([a, b], 1).flatten() for (_, a), (_, b) in zip(*shares)]
    assert torch.equal(torch.cat(both), torch.cat([label for _, label in make(7).epoch(1)]))


# methods


def test_darts_leaves_out_the_zero_operation():
    space = get_space("nasbench201")
    weights = [0.6, 0.1, 0.1, 0.15, 0.05] * 6
    assert strongest_genotype(space, {"cell": weights}).to_string() == ALL_3X3


def test_ista_keeps_the_largest_entry_of_each_edge():
    members = recovery.members(SPACE, 1)["cell"]
    assert [len(m) for m in members] == [4, 8, 12]
    rng = np.random.default_rng(0)
    codes = [rng.normal(size=len(m)) for m in members]
    codes[2][:] = 0.0
    matrices, variables = [rng.normal(size=(7, len(m))) for m in members], rng.normal(size=(3, 7))
    found = recovery.support(members, codes, matrices, variables, 1, recovery.edges_of(SPACE, "cell"))
    assert found.paths.shape == (3, 3) and found.columns.shape == (3, 3, 7)
    edges = [[SPACE.edges("cell")[i] for i in set(row)] for row in found.paths.tolist()]
    assert sorted(map(sorted, edges)) == [[0], [1, 2], [3, 4, 5]]
    for node in (0, 1):
        for place in range(node + 1):
            own = codes[node][4 * place : 4 * place + 4]
            assert found.values[node, place] == own[np.abs(own).argmax()]
        assert not found.values[node, node + 1 :].any() and not found.columns[node, node + 1 :].any()
    with pytest.raises(ValueError, match="sparsity must be 1 in nasbench201_nonzero"):
        recovery.members(SPACE, 2)


def test_the_guard_keeps_a_way_to_the_output():
    guard = Guard(SPACE, "cell", CPU)
    point = torch.zeros(24)
    point[SPACE.paths("cell").index(Path(1, 0, "nor_conv_3x3"))] = 9.0
    assert not guard.connects(point)
    point[SPACE.paths("cell").index(Path(3, 1, "skip_connect"))] = 0.1
    assert guard.connects(point)
    assert torch.equal(guard.backbone(point), point != 0)


@pytest.mark.parametrize(
    "words",
    [
        "darts --order second",
        "pc_darts --channels 4 --frozen-epochs 1",
        "ista --space nasbench201 --recover-every 2",
        "gsparsity",
        "sparse_supernet --optimizer hapg --strength-step 5",
    ],
)
def test_every_method_ends_in_a_cell_of_one_operation_an_edge(words, images, tmp_path):
    method, *options = words.split()
    folders = ["--data-dir", str(images), "--out", str(tmp_path)]
    (row,) = nas_cifar10.main(["--method", method, *TINY, *folders, *options])
    cell = load_genotype(tmp_path / "genotype.json", CellGenotype)
    assert row["architecture"] == cell.to_string() == rows_of(tmp_path / "search.csv")[-1]["architecture"]
    assert json.loads((tmp_path / "result.json").read_text())["architecture"] == row["architecture"]
    for epoch in (1, 2):
        load_genotype(tmp_path / "genotypes" / f"epoch-00{epoch}.json", CellGenotype).to_string()
    page = (tmp_path / "report.html").read_text()
    assert row["architecture"] in page and "--preset nasbench201" in page and "cell cell" not in page


def test_a_search_resumes_in_the_middle_of_an_epoch(images, tmp_path):
    words = ["--method", "sparse_supernet", *TINY, "--checkpoint-minutes", "0", "--data-dir", str(images), "--out"]
    nas_cifar10.main([*words, str(tmp_path / "whole")])
    stopped(nas_cifar10.main, [*words, str(tmp_path / "parts")], 5)
    nas_cifar10.main([*words, str(tmp_path / "parts"), "--resume"])
    assert rows_of(tmp_path / "whole" / "search.csv") == rows_of(tmp_path / "parts" / "search.csv")


def test_seeds_are_compared_by_a_short_training_and_the_result_is_loaded(images, tmp_path, capsys):
    words = ["--method", "ista", *TINY, "--data-dir", str(images), "--out", str(tmp_path)]
    nas_cifar10.main([*words, "--epochs", "1", "--seeds", "0", "1", "--select-by-training", "1"])
    cell = load_genotype(tmp_path / "genotype.json", CellGenotype)
    rows = rows_of(tmp_path / "seeds.csv")
    assert cell.to_string() in {row["architecture"] for row in rows if row["selected"] == "1"}
    best = next(row["seed"] for row in rows if row["selected"] == "1")
    net = nas.load(tmp_path / f"seed-{best}" / "selection")
    assert net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


def test_a_string_is_trained(images, tmp_path, capsys):
    out = tmp_path / "train"
    sizes = "--channels 2 --layers 3 --epochs 1 --batch 8 --images 32 --valid-images 8 --threads 1 --device cpu".split()
    words = ["--genotype", MIXED, "--data-dir", str(images), "--out", str(out), *sizes]
    train_cifar10.main([*words, "--preset", "nasbench201"])
    net = nas.load(out)
    assert net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 10)
    train_cifar10.main(["--evaluate", str(out), "--data-dir", str(images), "--device", "cpu"])
    train_cifar10.main(["--genotype", MIXED, "--count", "--preset", "nasbench201"])
    parameters, macs = published_size(MIXED)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"parameters": parameters, "macs": macs}
    with pytest.raises(SystemExit, match=r"auxiliary must be 0\.0 for a cell of NAS-Bench-201"):
        train_cifar10.main([*words[:4], "--out", str(tmp_path / "other"), *sizes])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method ista --one-stage --preset small --space nasbench201_nonzero", "for a one-stage search"),
        ("--method ista --preset small --space nasbench201_nonzero", "sparsity must be 1 in nasbench201_nonzero"),
        ("--method darts --preset small --space cherry --transition patch", "transition belongs to the space nasbench201"),
    ],
)
def test_what_does_not_fit_the_space_is_refused_in_one_line(words, message, images, tmp_path):
    small = "--images 32 --batch 8 --epochs 1 --threads 1 --device cpu".split()
    with pytest.raises(SystemExit, match=message):
        nas_cifar10.main([*words.split(), *small, "--data-dir", str(images), "--out", str(tmp_path)])


def test_every_method_has_the_two_presets():
    for presets in (
        darts.CIFAR_PRESETS,
        darts.PARTIAL_PRESETS,
        ista.CIFAR_PRESETS,
        gsparsity.CIFAR_PRESETS,
        sparse_supernet.CIFAR_PRESETS,
    ):
        assert {"nasbench201", "nasbench201_small"} <= set(presets)
        published = presets["nasbench201"]
        assert (published.channels, published.layers, published.epochs, published.pixels) == (16, 17, 50, 0)
    assert gsparsity.CIFAR_PRESETS["nasbench201"].mu == 200
    assert registry.build("darts", nasbench201.Supernet(get_space("nasbench201"), 2, 3), darts.CIFAR_PRESETS["nasbench201"])
