"""On a CUDA device: the same steps as on a CPU, graphs and the compiler included. Skipped where there is none.

What of it needs no kernel of a device, `test_pretended_device.py` runs everywhere.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from nas.bilevel.steps import CifarSteps, TextSteps
from nas.data import cifar
from nas.engine import checkpoint
from nas.methods import registry
from nas.methods.gsparsity import OperationGroups
from nas.methods.settings import gsparsity as gsparsity_settings
from nas.nets.torch import cnn, rnn
from nas.space import spaces
from nas.space.genotype import RecurrentGenotype
from torch import nn
from torch_cases import MAKERS, PENALTIES, groups_of, problem, snapshot, train

from proxopt import GroupL2, Groups, SparseGroupLasso, sparse_code
from proxopt_torch import Budget, ProxAdam, Proximal, compact, groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def full_precision():
    """cuDNN would round the factors of convolutions to ten bits, which is more than the two sides may differ by."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on(device, name, penalty, steps=50, **options):
    net, x, y = problem()
    net, x, y = net.to(device), x.to(device), y.to(device)
    optimizer = MAKERS[name](groups_of(net, penalty), **options)
    train(optimizer, net, x, y, steps)
    return [p.cpu() for p in snapshot(net, optimizer)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_the_device_takes_the_steps_of_the_cpu(name, penalty):
    for ours, there in zip(on("cpu", name, PENALTIES[penalty]), on("cuda", name, PENALTIES[penalty])):
        torch.testing.assert_close(ours, there, rtol=1e-6, atol=1e-7)
        assert torch.equal(ours == 0, there == 0)


@pytest.mark.parametrize(
    ("name", "foreach", "penalty"),
    [*((name, foreach, "sgl") for name in MAKERS for foreach in (False, True)), ("AdamHAPG", False, "labels")],
)
def test_capturable_steps_replay_as_a_graph(name, foreach, penalty):
    points = []
    for graphed in (False, True):
        net, x, y = problem(torch.float32)
        net, x, y = net.cuda(), x.cuda(), y.cuda()
        optimizer = MAKERS[name](groups_of(net, PENALTIES[penalty]), capturable=True, foreach=foreach)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which still copies the network to the device
        with torch.cuda.stream(stream):
            train(optimizer, net, x, y, 3)
            if graphed:
                graph = torch.cuda.CUDAGraph()
                optimizer.zero_grad(set_to_none=False)
                with torch.cuda.graph(graph, stream=stream):
                    train_once(optimizer, net, x, y)
                for _ in range(5):
                    graph.replay()
            else:
                train(optimizer, net, x, y, 5)
        torch.cuda.synchronize()
        points.append(snapshot(net, optimizer))
    for a, b in zip(*points):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def train_once(optimizer, net, x, y):
    for p in net.parameters():
        p.grad.zero_()
    ((net(x) - y) ** 2).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_the_compiled_step_equals_the_eager_one(name):
    points = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net, x, y = problem()
        net, x, y = net.cuda(), x.cuda(), y.cuda()
        optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for _ in range(4):
            optimizer.zero_grad()
            ((net(x) - y) ** 2).mean().backward()
            step()
        points.append(snapshot(net, optimizer))
    for a, b in zip(*points):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_scaler_skips_the_step_with_inf():
    w = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = Proximal(torch.optim.Adam([w], lr=0.1, fused=True), GroupL2(1.0))
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale((w * torch.tensor([1.0, float("inf"), 1.0], device="cuda")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(w, torch.ones_like(w))


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_moves_between_devices(name):
    net, x, y = problem()
    optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
    train(optimizer, net, x, y, 5)
    there = copy.deepcopy(net).cuda()
    other = MAKERS[name](groups_of(there, PENALTIES["sgl"]))
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, net, x, y, 5)
    train(other, there, x.cuda(), y.cuda(), 5)
    for p, q in zip(net.parameters(), there.parameters()):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-6, atol=1e-7)


def test_a_network_on_the_device_compacts_there():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).cuda()
    with torch.no_grad():
        net[0].weight[:3] = 0
    x = torch.randn(4, 6, device="cuda")
    small = compact(net, x, inputs=True)
    assert small.removed == {"0": 3}
    torch.testing.assert_close(small.model(x[:, small.inputs]), net(x))


def test_coupled_groups_budgets_and_frozen_zeros_on_the_device():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 2)).cuda()
    x = torch.randn(4, 5, 6, device="cuda")
    optimizer = ProxAdam(groups.coupled(net, x, GroupL2(1e-2)), lr=1e-2)
    budget = Budget(optimizer, net, x, macs=0.8, steps=40)
    for _ in range(40):
        optimizer.zero_grad()
        (net(x) - x.mean((1, 2), keepdim=True)).square().mean().backward()
        optimizer.step()
        record = budget.step()
    optimizer.freeze_zeros()
    zeros = [(p == 0) & p.is_cuda for p in net.parameters()]
    optimizer.step()
    assert all(bool((p[z] == 0).all()) for p, z in zip(net.parameters(), zeros) if p.ndim > 1)
    small = compact(net.eval(), x)
    assert small.removed and record.share < 1
    assert all(t.is_cuda for t in (*small.model.parameters(), *small.model.buffers()))
    other = torch.randn(3, 7, 6, device="cuda")
    torch.testing.assert_close(small.model(other), net(other), rtol=1e-4, atol=1e-5)


def test_labels_and_whole_groups_live_on_the_device():
    x = torch.randn(6, 5, device="cuda")
    for split in (Groups.labels([0, 1, 0, 2, 2, 1], axis=0), Groups.whole(), Groups.along(1)):
        for metric in ("exact", "median", "support"):
            penalty = SparseGroupLasso(0.3, 0.5, split, metric=metric)
            step = torch.rand(6, 5, device="cuda") + 0.1
            torch.testing.assert_close(penalty.prox(x, step).cpu(), penalty.prox(x.cpu(), step.cpu()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["auto", "active_set", "homotopy"])
def test_codes_on_the_device_are_those_of_the_host(method):
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(20, 30)), rng.normal(size=(4, 20))
    expected = sparse_code(A, b, 1.0, method=method)
    found = sparse_code(torch.tensor(A, device="cuda"), torch.tensor(b, device="cuda"), 1.0, method=method)
    assert found.x.is_cuda and bool(found.success.all())
    torch.testing.assert_close(found.x.cpu(), torch.tensor(expected.x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["ista", "sparse_supernet", "darts"])
def test_a_search_step_on_the_device_is_that_of_the_host(method):
    sides = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        settings = replace(registry.CIFAR[method].presets["paper"], order="first", batch=16)
        net = cnn.Supernet(spaces.get_space(settings.space), 4, 4)
        generator = torch.Generator().manual_seed(1)
        batches = [(torch.randn(8, 3, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in "ab"]
        net = net.to(device)
        torch.manual_seed(2)
        chosen = registry.build(method, net, settings)
        chosen.begin_epoch(0)
        train, valid = [(x.to(device), y.to(device)) for x, y in batches]
        steps = CifarSteps(net, chosen, settings)
        steps.architecture(0, train, valid)
        steps.weights(train)
        sides.append([p.detach().cpu() for p in (*chosen.parameters, net.classifier.weight)])
    for ours, there in zip(*sides):
        torch.testing.assert_close(ours, there, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_search_step_on_text_on_the_device_is_that_of_the_host(compiled):
    sides = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        settings = replace(registry.TEXT["sparse_supernet"].presets["paper"], batch=8, lr=1.0)
        net = rnn.RecurrentSupernet(
            spaces.get_space("recurrent", RecurrentGenotype), 50, 16
        )  # nothing is left out: nothing is drawn
        train, valid = (torch.randint(50, (2, 6, 8)) for _ in "ab")
        net = net.to(device)
        if compiled and device == "cuda":
            net.fuse()
        torch.manual_seed(2)
        steps = TextSteps(net, registry.build("sparse_supernet", net, settings), settings)
        steps.architecture(0, train.to(device), valid.to(device))
        steps.weights(train.to(device))
        sides.append([p.detach().cpu() for p in (*steps.method.parameters, net.embedding, net.products["1"])])
    for ours, there in zip(*sides):
        torch.testing.assert_close(ours, there, rtol=1e-2, atol=1e-3)


def test_the_generators_of_the_device_go_on_from_a_checkpoint(tmp_path):
    device = torch.device("cuda")
    checkpoint.save(tmp_path / "random.pt", checkpoint.random_state(device))
    expected = torch.rand(5, device=device), torch.rand(5)
    checkpoint.restore_random_state(checkpoint.load(tmp_path / "random.pt", device), device)
    for ours, wanted in zip((torch.rand(5, device=device), torch.rand(5)), expected):
        assert torch.equal(ours, wanted)


def test_a_batch_on_the_device_is_drawn_by_its_number():
    images = cifar.Images(torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (12,))).to("cuda")
    batches = cifar.Batches(images, 4, seed=0, augment=cifar.Augment((0.5,) * 3, (0.2,) * 3, padding=4, cutout=8))
    (x, y), (again, labels) = list(batches.epoch(1))[2], next(iter(batches.epoch(1, start=2)))
    assert x.is_cuda and torch.equal(x, again) and torch.equal(y, labels)


def test_groups_of_operations_step_on_the_device():
    sides = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = cnn.Supernet(spaces.get_space("darts"), 4, 3)
        x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
        operations = OperationGroups(net.to(device), gsparsity_settings.GSparsitySettings(mu=5.0, lr=0.05, lr_min=0.05))
        nn.functional.cross_entropy(net(x.to(device), operations.weights()), y.to(device)).backward()
        operations.step()
        sides.append(list(operations.norms().values()))
    assert sides[0] == pytest.approx(sides[1], rel=1e-2, abs=1e-4)
    assert [n == 0 for n in sides[0]] == [n == 0 for n in sides[1]]
