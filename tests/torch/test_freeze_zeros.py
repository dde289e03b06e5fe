"""freeze_zeros: zeros of the prox point stay zero, everything else moves as without penalty."""

import copy

import pytest
import torch

from proxopt import L1, GroupL2, Groups
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD, groups

MAKE = {
    "hapg": lambda groups: HAPG(groups, lr=0.05),
    "adam_hapg": lambda groups: AdamHAPG(groups, lr=0.05),
    "prox_adam": lambda groups: ProxAdam(groups, lr=0.05),
    "prox_sgd": lambda groups: ProxSGD(groups, lr=0.05),
    "prox_sgd_tau": lambda groups: ProxSGD(groups, lr=0.3, tau=10.0),
    "sgd": lambda groups: Proximal(torch.optim.SGD(groups, lr=0.02, momentum=0.5)),
    "plain_sgd": lambda groups: Proximal(torch.optim.SGD(groups, lr=0.05)),
    "adam": lambda groups: Proximal(torch.optim.Adam(groups, lr=0.05)),
}
TARGET = torch.linspace(-2, 2, 24).reshape(4, 6)


def start(name, penalty=None, steps=5):
    """An optimizer of a matrix with a penalty and a bias without, after a few steps, with some zeros."""
    torch.manual_seed(0)
    w, bias = torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.zeros(4))
    penalty = penalty if penalty is not None else L1(2.0)
    optimizer = MAKE[name]([{"params": [w], "penalty": penalty}, {"params": [bias]}])
    for _ in range(steps):
        step(optimizer, w, bias)
    return optimizer, w, bias


def step(optimizer, w, bias):
    optimizer.zero_grad()
    (((w + bias[:, None]) - TARGET) ** 2).sum().backward()
    optimizer.step()


def point(optimizer, w):
    with optimizer.at_prox_point():
        return w.detach().clone()


@pytest.mark.parametrize("name", MAKE)
def test_zeros_stay_and_the_rest_moves_without_penalty(name):
    optimizer, w, bias = start(name)
    zeros = point(optimizer, w) == 0
    assert zeros.any() and not zeros.all()
    optimizer.freeze_zeros()
    assert (w.detach()[zeros] == 0).all(), "the search point has the zeros of the prox point from now on"
    plain, v, b = copy.deepcopy((optimizer, w, bias))
    plain.freeze_zeros(False)
    plain.param_groups[0]["strength"] = 0.0
    for _ in range(4):
        step(optimizer, w, bias)
        plain.zero_grad()
        (((v + b[:, None]) - TARGET) ** 2).sum().backward()
        v.grad[zeros] = 0  # entries do not influence each other in any of these steps, but through the bias
        plain.step()
        with torch.no_grad():
            v[zeros] = 0
            if "point" in plain.state[v]:
                plain.state[v]["point"][zeros] = 0
        assert (w.detach()[zeros] == 0).all() and (point(optimizer, w)[zeros] == 0).all()
    torch.testing.assert_close(w.detach(), v.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bias.detach(), b.detach(), rtol=1e-6, atol=1e-7)
    assert (bias.detach() != 0).all(), "a zero without penalty is not frozen"


@pytest.mark.parametrize("name", MAKE)
def test_a_checkpoint_holds_the_frozen_zeros(name, tmp_path):
    optimizer, w, bias = start(name)
    optimizer.freeze_zeros()
    step(optimizer, w, bias)
    torch.save((optimizer.state_dict(), w.detach(), bias.detach()), tmp_path / "checkpoint.pt")
    saved, *values = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other, v, b = start(name, steps=0)
    with torch.no_grad():
        v.copy_(values[0]), b.copy_(values[1])
    other.load_state_dict(saved)
    for _ in range(3):
        step(optimizer, w, bias)
        step(other, v, b)
    assert torch.equal(v, w) and torch.equal(b, bias)
    other.load_state_dict({**start(name)[0].state_dict()})
    assert not other.param_groups[0]["zeros_frozen"], "a checkpoint from before says that nothing is frozen"
    strength = optimizer.param_groups[0]["strength"]
    optimizer.freeze_zeros(False)
    assert optimizer.param_groups[0]["strength"] == strength and not any("zeros" in s for s in optimizer.state.values())


@pytest.mark.parametrize("name", MAKE)
def test_before_the_first_step_and_in_eval_mode(name):
    optimizer, w, bias = start(name, steps=0)
    with torch.no_grad():
        w[1] = 0
    optimizer.freeze_zeros()
    for _ in range(2):
        step(optimizer, w, bias)
    assert (w[1] == 0).all() and (w[[0, 2, 3]] != 0).all()
    optimizer, w, bias = start(name)
    optimizer.eval()
    zeros = w.detach() == 0
    optimizer.freeze_zeros()
    optimizer.train()
    assert (w.detach()[zeros] == 0).all()
    step(optimizer, w, bias)
    assert (w.detach()[zeros] == 0).all()


@pytest.mark.parametrize("name", ["prox_adam", "hapg", "adam"])
def test_joint_groups_closures_and_a_parameter_without_gradient(name):
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[1] = 0
        net[0].bias[1] = 0
    optimizer = MAKE[name](groups.output_channels(net, GroupL2(1e-3), include="0", joint=True))
    optimizer.freeze_zeros()
    x = torch.randn(8, 6)

    def closure():
        optimizer.zero_grad()
        loss = ((net[0](x).sigmoid()) ** 2).sum()  # the second layer has no gradient
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert (net[0].weight[1] == 0).all() and net[0].bias[1] == 0 and (net[0].weight[0] != 0).all()
    net(x).sum().backward()
    optimizer.step()  # the first step of the second layer


def test_groups_of_zeros_and_another_call_takes_in_new_zeros():
    optimizer, w, bias = start("prox_adam", GroupL2(3.0, Groups.along(1)), steps=0)
    optimizer.freeze_zeros()
    step(optimizer, w, bias)
    assert (w != 0).all()
    with torch.no_grad():
        w[2] = 0
    optimizer.freeze_zeros()
    step(optimizer, w, bias)
    assert (w[2] == 0).all() and (w[[0, 1, 3]] != 0).all()
    with pytest.raises(TypeError, match="frozen must be True or False, got 1"):
        optimizer.freeze_zeros(1)
