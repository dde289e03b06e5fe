"""The sound rule of SparseNAS: its steps, what they keep, and the switches that make it."""

import json
from dataclasses import replace

import nas_cifar10
import nas_ptb
import numpy as np
import pytest
import torch
from nas.bilevel.steps import CifarSteps
from nas.engine import report
from nas.engine.resume import expand
from nas.methods.settings import sparse_supernet as settings_of
from nas.methods.settings.darts import DartsSettings
from nas.methods.sparse_supernet import SparseSupernet
from nas.nets.torch import nasbench201
from nas.nets.torch.operations import frozen_statistics
from nas.nets.torch.replicas import Replicas
from nas.space import spaces
from nas_cases import TINY, TINY_TEXT, same, stopped

from proxopt_torch import HAPG

SPACE = spaces.get_space("nasbench201_nonzero")
EDGES, NODES = np.array(SPACE.edges("cell")), np.array(SPACE.nodes("cell"))
SETTINGS = settings_of.sound(settings_of.CIFAR_PRESETS["nasbench201_small"])


def method(**changes):
    torch.manual_seed(0)
    made = SparseSupernet(SPACE, replace(SETTINGS, **changes), torch.device("cpu"))
    made.begin_epoch(made.settings.epochs - 1)
    return made


def held(x, labels):
    """x with norm 1 in each group of labels; zero groups stay zero."""
    norms = np.array([np.linalg.norm(x[labels == label]) for label in labels])
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def plain_prox(x, t, l1_ratio):
    """The prox of t (l1_ratio ||x||_1 + (1 - l1_ratio) sum_n sqrt(size_n) ||x_n||_2) with x >= 0."""
    x = np.maximum(x - t * l1_ratio, 0)
    for node in set(NODES.tolist()):
        own = node == NODES
        norm = np.linalg.norm(x[own])
        x[own] *= max(1 - t * (1 - l1_ratio) * np.sqrt(own.sum()) / norm, 0) if norm else 0
    return x


@pytest.mark.parametrize("parts", ["edge", "node", "cell"])
def test_steps_follow_the_printed_formulas(parts):
    labels = {"edge": EDGES, "node": NODES, "cell": np.zeros(len(EDGES))}[parts]
    made = method(hold_norm=parts, l1_ratio=0.5, arch_lr=0.1, strength=0.3)
    (a,) = made.parameters
    search = before = a.detach().double().numpy().copy()
    np.testing.assert_allclose(search, held(search, labels), atol=1e-6)
    rng = np.random.default_rng(0)
    for t in range(1, 12):
        grad = rng.normal(size=len(search))
        made.update([torch.tensor(grad, dtype=torch.float32)])
        found = plain_prox(search - 0.1 * grad, 0.1 * 0.3, 0.5)
        search = held(found + min(0.9, max(0, (t - 2) / (t + 1))) * (found - before), labels) * (found != 0)
        before = point = held(found, labels)
        np.testing.assert_allclose(made.point()["cell"].numpy(), point, atol=2e-5)
        np.testing.assert_allclose(a.detach().numpy(), search, atol=2e-5)
    assert 0 < (point == 0).sum() < len(point)


def test_a_zero_stays_zero_and_is_not_computed():
    made = method(strength=2.0, arch_lr=0.1)
    (a,) = made.parameters
    zero = torch.zeros(len(a), dtype=torch.bool)
    for _ in range(20):
        assert not made.needs_zeroed_paths(0)
        active = torch.tensor(made.active_paths()["cell"]) if made.active_paths() else ~zero
        made.update([torch.where(active, torch.randn(len(a)), 0.0)])
        now = made.point()["cell"] == 0
        assert bool((now | ~zero).all()) and bool((a[now] == 0).all()) and bool((made.point()["cell"] >= 0).all())
        zero = now
    assert zero.any() and not zero.all()


@pytest.mark.parametrize("parts", ["edge", "node", "cell"])
def test_a_route_that_the_guard_restores_has_the_norm_that_is_held(parts):
    made = method(hold_norm=parts, strength=100.0, arch_lr=1.0)
    before = made.point()["cell"].numpy()
    made.update([torch.zeros(len(before))])
    labels = {"edge": EDGES, "node": NODES, "cell": np.zeros(len(EDGES))}[parts]
    kept = made.guards["cell"].backbone(torch.tensor(before)).numpy()
    for found in (made.point()["cell"], made.parameters[0].detach()):
        np.testing.assert_allclose(found.numpy(), held(before * kept, labels), atol=1e-6)
    assert made.log()["guarded_cell"] == 1


def test_the_architecture_waits_for_the_weights_and_its_strength_grows_to_the_end():
    made = method(warmup=0.4, epochs=10)
    strengths, waits = [], []
    for epoch in range(10):
        made.begin_epoch(epoch)
        strengths.append(made.strength)
        waits.append(made.frozen)
    assert waits == [True] * 4 + [False] * 6
    np.testing.assert_allclose(strengths, [0] * 4 + [SETTINGS.strength * k / 6 for k in range(1, 7)])
    assert replace(SETTINGS, warmup=0.9, epochs=2).frozen_epochs == 1, "an epoch is left for the architecture"


def test_a_joint_step_takes_both_gradients_at_the_same_weights():
    made = method()
    net = nasbench201.Supernet(SPACE, 2, 3, 10, path_norm=True)
    steps = CifarSteps(net, made, replace(SETTINGS, channels=2, layers=3))
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    with frozen_statistics(net):
        loss = torch.nn.functional.cross_entropy(net(images, made.weights()), labels)
        expected = torch.autograd.grad(loss, [*steps.params, *made.parameters])
    seen = {}
    made.update = lambda grads: seen.update(arch=grads)
    steps.sgd.step = lambda: seen.update(weights=[p.grad.clone() for p in steps.params])
    steps.settings = replace(steps.settings, clip=0.0)
    steps.joint(0, (images, labels))
    for found, wanted in zip([*seen["weights"], *seen["arch"]], expected):
        torch.testing.assert_close(found, wanted)
    made.clips_together = True  # the architecture counts in the norm, and is not clipped itself
    steps.settings = replace(steps.settings, clip=0.1)
    steps.joint(0, (images, labels))
    factor = 0.1 / (torch.cat([g.flatten() for g in expected]).norm() + 1e-6)
    for found, wanted in zip([*seen["weights"], *seen["arch"]], [*(factor * g for g in expected[:-1]), expected[-1]]):
        torch.testing.assert_close(found, wanted)


def test_each_change_of_the_rule_is_a_setting_of_its_own():
    published = settings_of.CIFAR_PRESETS["nasbench201_small"]
    changed = {n for n, v in vars(SETTINGS).items() if v != getattr(published, n)}
    for name in changed - {"levels", "order"}:
        back = {name: getattr(published, name)}
        back |= {"cap": 1.0} if name == "optimizer" else {}
        back |= {"constant_arch_lr": False} if name == "optimizer" else {}
        method(**back)
    assert isinstance(method().optimizer, HAPG)
    with pytest.raises(ValueError, match="order must be 'first' with levels=1"):
        replace(SETTINGS, order="second")
    with pytest.raises(ValueError, match="belong to hapg and adamhapg"):
        replace(SETTINGS, optimizer="adam")


def test_one_level_is_refused_where_two_are_needed_and_named_in_reports():
    with pytest.raises(ValueError, match=r"levels must be 2 with early_stop, .* got 1"):
        DartsSettings(levels=1, order="first", early_stop=True)
    with pytest.raises(ValueError, match="valid_images must be at most half of the 200 images, got 150"):
        DartsSettings(images=200, valid_images=150)
    assert report.evaluation("darts", SPACE, {"levels": 1}) == "held-out training images"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("command", ["cherry", "nasbench201", "text"])
def test_what_is_stopped_goes_on_bit_for_bit(command, images, corpus, tmp_path):
    rule = ["--rule", "sound", "--warmup", "0.5"]
    if command == "text":
        main, words = nas_ptb.main, [*TINY_TEXT, *rule, "--data-dir", str(corpus)]
    else:
        main, words = nas_cifar10.main, [*TINY, *rule, "--data-dir", str(images), "--valid-images", "8"]
    if command == "cherry":  # cells of DARTS with two operations, as networks with all of them take long to count
        words += ["--space", "cherry", "--epoch-steps", "4"]
    if command == "nasbench201":
        words += ["--space", "nasbench201_nonzero", "--layers", "3", "--pixels", "8", "--epoch-steps", "2"]
    words += ["--checkpoint-minutes", "0"]
    (whole,) = main([*words, "--out", str(tmp_path / "whole")])
    stopped(main, [*words, "--out", str(tmp_path / "parts")], saves=3)
    (rest,) = main(["--resume", "--out", str(tmp_path / "parts")])
    assert {k: v for k, v in whole.items() if k != "seconds"} == {k: v for k, v in rest.items() if k != "seconds"}
    states = [torch.load(tmp_path / part / "checkpoint.pt", weights_only=False) for part in ("whole", "parts")]
    assert same(states[0]["state"], states[1]["state"])


def test_a_rule_is_not_mixed_with_the_settings_of_a_file(tmp_path):
    saved = {"command": "nas_cifar10", "method": "sparse_supernet", "seed": 0, "seeds": [0], "hold_norm": "edge"}
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    expanded = lambda *words: expand(words, "nas_cifar10", "runs/nas_cifar10")
    assert "--hold-norm" in expanded("--resume", "--out", str(tmp_path))
    assert "--hold-norm" not in expanded("--resume", "--out", str(tmp_path), "--rule", "published")
    with pytest.raises(SystemExit, match="--config and --rule exclude each other"):
        expanded("--config", str(tmp_path), "--rule", "sound")


def test_other_methods_have_no_sound_rule(images):
    with pytest.raises(SystemExit, match="--rule sound belongs to --method sparse_supernet"):
        nas_cifar10.main(["--method", "darts", "--rule", "sound", *TINY, "--data-dir", str(images)])


def test_replicas_are_trained_as_if_alone_and_the_architecture_by_their_mean():
    torch.manual_seed(0)
    nets = [nasbench201.Supernet(SPACE, 2, 3, 10, path_norm=True) for _ in range(2)]
    both, weights = Replicas(nets), method().weights()["cell"].detach()
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)

    def gradients(net, images, labels):
        a = weights.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(net(images, {"cell": a}), labels)
        return torch.autograd.grad(loss, [a, *net.parameters()])

    alone = [gradients(net, *part) for net, part in zip(nets, zip(images.split(4), labels.split(4)))]
    arch, *rest = gradients(both, images, labels)
    torch.testing.assert_close(arch, (alone[0][0] + alone[1][0]) / 2)
    for found, wanted in zip(rest, [*alone[0][1:], *alone[1][1:]], strict=True):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 replicas, got 64"):
        replace(SETTINGS, replicas=3)
