"""Code on a device that is pretended (`pretended_device`): no operation mixes devices, and the results are those of the CPU."""

from dataclasses import replace

import nas_cifar10
import numpy as np
import pytest
import test_gpu
import torch
import train_ptb
from nas.bilevel.steps import CifarSteps, TextSteps
from nas.data import cifar, cifar_files
from nas.engine import report
from nas.methods import gsparsity, registry
from nas.methods.settings import gsparsity as gsparsity_settings
from nas.nets.torch import cnn, rnn
from nas.space import drawing, spaces
from nas.space.genotype import RecurrentGenotype
from nas_cases import fake_cifar
from pretended_device import pretended
from torch import nn
from torch_cases import MAKERS, PENALTIES, groups_of, problem, train

from proxopt import GroupL2, Groups
from proxopt_torch import ProxAdam, Proximal


def test_mixing_devices_is_refused_and_waiting_is_counted():
    net = nn.Linear(3, 2)
    with pretended() as device:
        x = torch.randn(4, 3, device="cuda")
        assert x.is_cuda and x.device.type == "cuda" and torch.zeros_like(x).is_cuda and not torch.zeros(3).is_cuda
        with pytest.raises(RuntimeError, match="same device, but aten::addmm got"):
            net(x)
        with pytest.raises(RuntimeError, match="same device, but aten::mul got"):
            x * torch.randn(3)
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            x.numpy()
        with pytest.raises(RuntimeError, match="Expected a 'cuda' generator"):
            torch.randn(3, generator=torch.Generator(), device="cuda")
        net.cuda()(x).sum().backward()
        assert net.weight.grad.is_cuda and (x * torch.tensor(2.0)).is_cuda
        assert (device.reads, device.uploads) == (0, 2)
        float(x[0, 0]), x.cpu().numpy()
        x[:, [0, 2]], x[torch.tensor([0, 1])]
        assert (device.reads, device.uploads) == (2, 4)


@pytest.mark.parametrize(
    ("name", "penalty"), [*((name, "sgl") for name in MAKERS), *(("ProxAdam", penalty) for penalty in PENALTIES)]
)
def test_steps_on_the_device_are_those_of_the_cpu(name, penalty):
    ours = test_gpu.on("cpu", name, PENALTIES[penalty], steps=3)
    with pretended():
        there = test_gpu.on("cuda", name, PENALTIES[penalty], steps=3)
    for a, b in zip(ours, there):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert torch.equal(a == 0, b == 0)


def waits(make, steps=2):
    """How often steps after the first, and a change of the mode, read from the device and copied to it."""
    with pretended() as device:
        net, x, y = problem()
        net, x, y = net.cuda(), x.cuda(), y.cuda()
        optimizer = make(net)
        train(optimizer, net, x, y, 1)
        device.reads = device.uploads = 0
        train(optimizer, net, x, y, steps)
        optimizer.eval()
        optimizer.train()
        return device.reads, device.uploads


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "penalty"),
    [*((name, "sgl") for name in MAKERS), *(("ProxAdam", p) for p in PENALTIES), ("ProxSGD", "labels"), ("AdamHAPG", "labels")],
)
def test_a_step_does_not_wait_for_the_device(name, penalty, capturable, foreach):
    make = lambda net: MAKERS[name](groups_of(net, PENALTIES[penalty]), capturable=capturable, foreach=foreach)
    assert waits(make) == (0, 0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["ProxSGD", "ProxSGD tau", "HAPG", "ProxAdamW", "AdamHAPG"])
def test_a_learning_rate_and_a_strength_on_the_device_are_not_read(name, capturable):
    def make(net):
        optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]), capturable=capturable)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"]).cuda()
        optimizer.param_groups[0]["strength"] = torch.tensor(0.02).cuda()
        return optimizer

    assert waits(make) == (0, 0)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_joint_group_does_not_wait_for_the_device(capturable):
    def make(net):
        joint = {"params": [net[0].weight, net[0].bias], "penalty": GroupL2(0.02, Groups.labels([range(5)] * 2)), "joint": True}
        return ProxAdam([joint, {"params": [*net[2].parameters(), *net[4].parameters()]}], lr=0.01, capturable=capturable)

    assert waits(make) == (0, 0)


@pytest.mark.parametrize("lr", [0.1, "on the device"])
def test_a_prox_behind_another_optimizer_does_not_wait_for_the_device(lr):
    def make(net):
        rate = torch.tensor(0.1).cuda() if lr == "on the device" else lr
        return Proximal(torch.optim.Adam(groups_of(net, PENALTIES["sgl"]), lr=rate, capturable=lr != 0.1))

    assert waits(make) == (0, 0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_moves_between_devices(name):
    with pretended():
        test_gpu.test_a_checkpoint_moves_between_devices(name)


def test_two_optimizers_go_on_from_one_state_dict():
    points = []
    first, others = torch.ones(3), []
    for _ in range(3):
        w = nn.Parameter(first.clone())
        others.append((w, ProxAdam([w], lr=0.1)))
    for w, optimizer in others[:1]:
        step(w, optimizer)
    saved = others[0][1].state_dict()
    for w, optimizer in others[1:]:
        w.data.copy_(others[0][0].detach())
        optimizer.load_state_dict(saved)
    for w, optimizer in others:
        step(w, optimizer)
        points.append(w.detach())
    assert torch.equal(points[0], points[1]) and torch.equal(points[0], points[2])


def step(w, optimizer):
    optimizer.zero_grad()
    (w**2).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_the_step_count_of_a_checkpoint_read_to_the_device_is_where_the_optimizer_counts(capturable):
    with pretended() as device:
        w = nn.Parameter(torch.ones(3).cuda())
        optimizer = ProxAdam([w], lr=0.1, capturable=capturable)
        step(w, optimizer)
        saved = optimizer.state_dict()
        saved["state"][0]["step"] = saved["state"][0]["step"].cuda()
        other = ProxAdam([w], lr=0.1, capturable=capturable)
        other.load_state_dict(saved)
        assert other.state[w]["step"].is_cuda == capturable
        device.reads = 0
        step(w, other)
        assert device.reads == 0


def test_what_the_device_tests_do_runs_as_far_as_it_can_be_pretended():
    with pretended():
        test_gpu.test_a_scaler_skips_the_step_with_inf()
        test_gpu.test_labels_and_whole_groups_live_on_the_device()
        for method in ("active_set", "homotopy"):
            test_gpu.test_codes_on_the_device_are_those_of_the_host(method)


def sides(of):
    """What a function of a device returns on the CPU and on a pretended one."""
    ours = of("cpu")
    with pretended():
        return ours, of("cuda")


def close(pairs):
    for ours, there in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, there, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["ista", "sparse_supernet", "darts"])
def test_a_search_step(method):
    def of(device):
        torch.manual_seed(0)
        settings = replace(registry.CIFAR[method].presets["paper"], order="first", batch=8, space="S2")
        net = cnn.Supernet(spaces.get_space("S2"), 2, 3).to(device)
        torch.manual_seed(1)
        chosen = registry.build(method, net, settings)
        chosen.begin_epoch(0)
        x, y = torch.randn(8, 3, 8, 8).to(device), torch.randint(10, (8,)).to(device)
        steps = CifarSteps(net, chosen, settings)
        steps.architecture(0, (x, y), (x, y))
        steps.weights((x, y))
        return [p.detach().cpu() for p in (*chosen.parameters, net.classifier.weight)]

    close(sides(of))


def test_a_search_step_of_second_order_on_text_copies_little_to_the_device():
    uploads = []

    def of(device, pretence=None):
        torch.manual_seed(0)
        settings = replace(registry.TEXT["sparse_supernet"].presets["paper"], batch=4, lr=1.0)
        net = rnn.RecurrentSupernet(spaces.get_space("recurrent", RecurrentGenotype), 20, 6).to(device)
        train, valid = torch.randint(20, (2, 2, 6, 4)).to(device)  # words and the words that follow them
        torch.manual_seed(1)
        steps = TextSteps(net, registry.build("sparse_supernet", net, settings), settings)
        before = pretence.uploads if pretence else 0
        steps.architecture(0, train, valid)
        steps.weights(train)
        uploads.append((pretence.uploads if pretence else 0) - before)
        return [p.detach().cpu() for p in (*steps.method.parameters, net.embedding, net.products["1"])]

    ours = of("cpu")
    with pretended() as device:
        close((ours, of("cuda", device)))
    assert uploads[1] < 50, "none for each word or node"


def image_steps(method, order):
    """A function that draws a batch and takes a step of a search on images, and the method."""
    settings = replace(registry.CIFAR[method].presets["small"], order=order, batch=8, space="S2")
    if method == "sparse_supernet":
        settings = replace(settings, probe_every=2)
    net = cnn.Supernet(spaces.get_space("S2"), 2, 3).to("cuda")
    chosen = registry.build(method, net, settings)
    data = cifar.Images(torch.randint(256, (48, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (48,))).to("cuda")
    batches = cifar.Batches(data, 8, 0, cifar.Augment((0.5, 0.4, 0.3), (0.2,) * 3, padding=4), 1).epoch(0)
    return CifarSteps(net, chosen, settings), lambda: next(batches)


def text_steps(method, order):
    """The same on text."""
    settings = replace(registry.TEXT[method].presets["small"], batch=4, lr=1.0, order=order)
    net = rnn.RecurrentSupernet(spaces.get_space("recurrent", RecurrentGenotype), 20, 6, rnn.Drops.of(settings)).to("cuda")
    window = torch.randint(20, (2, 6, 4)).to("cuda")  # words and the words that follow them
    return TextSteps(net, registry.build(method, net, settings), settings), lambda: window


@pytest.mark.parametrize(
    ("make", "method", "order"),
    [
        *((image_steps, method, "first") for method in ("sparse_supernet", "darts", "ista")),
        *((make, "sparse_supernet", "second") for make in (image_steps, text_steps)),
    ],
)
def test_a_search_step_does_not_wait_for_the_device(make, method, order):
    with pretended() as device:
        torch.manual_seed(0)
        steps, draw = make(method, order)
        steps.method.begin_epoch(0)
        for number in range(4):
            if number == 1:  # the first step reads the initial paths
                device.reads = device.uploads = 0
                device.waits.clear()
            train = draw()
            steps.architecture(number, train, train)
            steps.weights(train)
        assert (device.reads, device.uploads) == (0, 0)
        # the flags of the nonzero paths arrive while the device computes the weight step behind them
        assert all(queued > 100 for queued in device.waits)
        assert len(device.waits) == (3 if method == "sparse_supernet" else 0)


def test_groups_of_operations():
    def of(device):
        torch.manual_seed(0)
        net = cnn.Supernet(spaces.get_space("S2"), 2, 3)
        x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
        operations = gsparsity.OperationGroups(
            net.to(device), gsparsity_settings.GSparsitySettings(mu=5.0, lr=0.05, lr_min=0.05, space="S2")
        )
        nn.functional.cross_entropy(net(x.to(device), operations.weights()), y.to(device)).backward()
        operations.step()
        return [torch.tensor(list(operations.norms().values()))]

    close(sides(of))


def test_the_published_loops():
    import naive_ista
    import naive_rnn

    with pretended():
        model = naive_ista.NaiveIsta(2, 3).to("cuda")
        model.codes = [[np.arange(A.shape[1]) < 2.0 for A in matrices] for matrices in model.matrices]
        loop = naive_ista.NaiveIstaSearch(model)
        batch = torch.randn(2, 3, 8, 8, device="cuda"), torch.randint(10, (2,), device="cuda")
        loop.step(*batch, *batch)
        text = naive_rnn.NaiveTextSearch(naive_rnn.NaiveLanguageModel(20, 6).to("cuda"), 4, second_order=True)
        words = torch.randint(20, (2, 4, 4), device="cuda").unbind()
        text.step(words, words)


def test_batches_are_drawn_on_the_device():
    with pretended():
        test_gpu.test_a_batch_on_the_device_is_drawn_by_its_number()


def test_a_search_on_images_and_its_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_files, "SOURCES", dict(cifar_files.SOURCES))
    for module, name in ((report, "write"), (nas_cifar10, "describe")):  # which take longer than the search
        monkeypatch.setattr(module, name, lambda *args: None)
    fake_cifar(tmp_path)
    options = (
        "--method ista --preset small --space S2 --images 32 --epochs 1 --batch 8 --channels 2 --layers 3 --device cuda".split()
    )
    options += ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    with pretended():
        (first,) = nas_cifar10.main(options)
    with pretended():
        (again,) = nas_cifar10.main([*options, "--resume"])
    assert again == first


def test_a_training_on_text_and_its_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", lambda *args: None)
    words = [" ".join(f"w{i * k % 23}" for k in range(9)) for i in range(60)]
    (tmp_path / "own.txt").write_text("\n".join(words))
    options = "--preset small --epochs 1 --hidden 4 --batch 4 --bptt 20 --valid-batch 2 --test-batch 2 --device cuda".split()
    options += ["--genotype", "LSTM", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    with pretended():
        (first,) = train_ptb.main(options)
    with pretended():
        (again,) = train_ptb.main([*options, "--resume"])
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_the_digits_ablation_trains_on_the_device_what_it_trains_on_the_cpu(tmp_path):
    import digits_ablation
    from digits.problem import Settings

    settings = Settings(strengths=2, seeds=1, epochs=2, retrain_epochs=2, curves=("adam", "hapg", "adamhapg_exact"))
    ours, there = sides(lambda device: digits_ablation.run(settings, folder(tmp_path / device), device))
    for a, b in zip(ours, there, strict=True):
        assert a == pytest.approx(b, abs=0.01)


def folder(path):
    path.mkdir()
    return path


def test_optimizer_steps_are_timed_by_events_on_the_device():
    import optimizer_step

    with pretended():
        rows = optimizer_step.measure([(4, 3), (4,)], [optimizer_step.BASELINE, "ProxSGD", "AdamHAPG (median)"], 1, False, "cuda")
    assert [row["cuda_ms"] for row in rows] == [2.0] * 3
