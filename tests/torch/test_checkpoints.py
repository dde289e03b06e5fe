"""Checkpoints of earlier releases, of Adam, through hooks, and through torch.distributed.checkpoint."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_cases import problem, snapshot, train

from proxopt import L1, GroupL2, Groups
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD

HERE = Path(__file__).parents[1] / "checkpoints"
sys.path.insert(0, str(HERE))
import make_optimizers  # noqa: E402

SAVED = [
    (file.stem.removeprefix("optimizers_"), name) for file in sorted(HERE.glob("optimizers_*.pt")) for name in torch.load(file)
]


@pytest.mark.parametrize(("version", "name"), SAVED)
def test_what_an_earlier_release_saved_continues_as_it_would_have_there(version, name):
    saved = torch.load(HERE / f"optimizers_{version}.pt", weights_only=True)[name]
    net, x, y = problem()
    optimizer = make_optimizers.CASES[name](net)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    optimizer.train()
    train(optimizer, net, x, y, 5)
    for p, q in zip(snapshot(net, optimizer), saved["later"]):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def trained(make, steps=5):
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    optimizer = make(net.parameters())
    further(net, optimizer, steps)
    return net, optimizer


def further(net, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW], ids=lambda c: c.__name__)
def test_a_run_with_adam_continues_with_a_penalty(base):
    net, adam = trained(lambda p: base(p, lr=0.01, weight_decay=0.1))
    saved = copy.deepcopy(adam.state_dict())
    makers = {
        "ProxAdam": lambda p, **k: ProxAdam(p, lr=0.5, **k),
        "Proximal": lambda p, **k: Proximal(base(p), **k),
    }
    further(net, adam)
    for name, make in makers.items():
        for penalty in (None, L1(1e-3)):
            other, optimizer = trained(lambda p, make=make, penalty=penalty: make(p, penalty=penalty), steps=0)
            other.load_state_dict(trained(lambda p: base(p, lr=0.01, weight_decay=0.1))[0].state_dict())
            optimizer.load_state_dict(saved)
            group = optimizer.param_groups[0]
            assert optimizer.penalty_of(group) == penalty, name
            assert group["lr"] == 0.01 and group["weight_decay"] == 0.1
            assert group.get("decoupled_weight_decay", False) == (base is torch.optim.AdamW)
            if penalty is None:
                further(other, optimizer)
                for p, q in zip(other.parameters(), net.parameters()):
                    torch.testing.assert_close(p, q)


def test_a_checkpoint_of_amsgrad_is_refused():
    _, adam = trained(lambda p: torch.optim.Adam(p, amsgrad=True))
    _, optimizer = trained(lambda p: ProxAdam(p, penalty=L1(1e-3)))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"must hold the state .* of ProxAdam, got .*max_exp_avg_sq"):
        optimizer.load_state_dict(adam.state_dict())
    assert str(before) == str(optimizer.state_dict())


def test_a_key_that_a_checkpoint_lacks_stays_as_it_is():
    _, optimizer = trained(lambda p: HAPG(p, lr=0.1, extrapolation=0.25, penalty=L1(1e-3)))
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("extrapolation", "check_finite", "mode", "joint", "strength"):
        del saved["param_groups"][0][key]
    _, other = trained(lambda p: HAPG(p, lr=0.7, extrapolation=0.5, penalty=L1(2e-3)))
    other.eval()
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["lr"], group["extrapolation"], group["strength"], group["mode"]) == (0.1, 0.5, 2e-3, "train")


@pytest.mark.parametrize(
    "make", [lambda p: HAPG(p, penalty=L1(1e-3)), lambda p: Proximal(torch.optim.Adam(p), L1(1e-3))], ids=["HAPG", "Proximal"]
)
def test_hooks_run_before_the_checks_and_after_the_repairs(make):
    net, optimizer = trained(make)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: s["optimizer"])
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(optimizer.param_groups[0]["strength"]))
    wrapped = {"optimizer": copy.deepcopy(optimizer.state_dict())}
    optimizer.param_groups[0]["strength"] = 7.0
    optimizer.load_state_dict(wrapped)
    assert seen == [1e-3]
    with pytest.raises(ValueError, match="key 'state'"):
        optimizer.load_state_dict({"optimizer": {"nothing": 1}})
    optimizer.load_state_dict(wrapped)  # a failed attempt leaves no hook behind
    assert seen == [1e-3, 1e-3]
    further(net, optimizer)


@pytest.mark.parametrize(
    "make", [lambda p: ProxAdam(p, penalty=L1(1e-3)), lambda p: Proximal(torch.optim.Adam(p))], ids=["ProxAdam", "Proximal"]
)
def test_loading_shares_no_memory_with_the_checkpoint(make):
    _, optimizer = trained(make)
    saved = optimizer.state_dict()
    net, other = trained(make, steps=0)
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    further(net, other)
    for index, state in before["state"].items():
        assert all(torch.equal(v, saved["state"][index][k]) for k, v in state.items())


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    "make",
    [HAPG, ProxAdam, AdamHAPG, lambda g: ProxSGD(g, tau=2.0), lambda g: Proximal(torch.optim.Adam(g))],
    ids=["HAPG", "ProxAdam", "AdamHAPG", "ProxSGD", "Proximal"],
)
def test_joint_groups_pass_through_distributed_checkpoints(make, flatten):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

    def built():
        net = nn.Linear(4, 2)
        rows = Groups.labels([range(2)] * 2)
        return net, make([{"params": list(net.parameters()), "penalty": GroupL2(0.01, rows), "joint": True}])

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, optimizer = built()
    further(net, optimizer)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    other, resumed = built()
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    further(net, optimizer)
    further(other, resumed)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
    assert {tuple(s["step"].shape) for s in optimizer.state.values()} == {()} and len(optimizer.state) == 2
