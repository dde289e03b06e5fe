"""Every penalty in the torch optimizers: fused, stacked and reference steps, param groups of models, reports and checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from every_penalty import ROWS, GroupLog, Log, Ridge, SquareRootGroup
from torch import nn

import proxopt.kernels
from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, Penalty, Shrinkage, SparseGroupLasso, updates
from proxopt.penalties import declared
from proxopt.testing import check_prox
from proxopt_torch import (
    HAPG,
    AdamHAPG,
    ProxAdam,
    Proximal,
    ProximalOptimizer,
    ProxSGD,
    StrengthPath,
    groups,
    kernels,
    max_strength,
    sparsity_report,
)

MAKERS = {
    "ProxSGD": lambda params: ProxSGD(params, lr=0.05),
    "HAPG": lambda params: HAPG(params, lr=0.05),
    "ProxAdam": lambda params: ProxAdam(params, lr=0.05),
    "AdamHAPG": lambda params: AdamHAPG(params, lr=0.05),
    "Proximal": lambda params: Proximal(torch.optim.SGD(params, lr=0.05)),
}
SINGLE = [row for row in ROWS if len(row.shapes) == 1]
every_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
every_single_row = pytest.mark.parametrize("row", SINGLE, ids=[row.name for row in SINGLE])
every_optimizer = pytest.mark.parametrize("name", MAKERS)


class SignDescent(ProximalOptimizer):
    """``x <- prox(x - lr sign(g), lr)``: an optimizer defined outside of the package, without fused implementation."""

    def __init__(self, params, lr=1e-3, **options):
        super().__init__(params, {"lr": lr}, **options)

    def update(self, group, penalty, x, grad, state, count):
        moved = self.each(lambda w, g: w - group["lr"] * g.sign(), x, grad)
        return self.prox(penalty, moved, group["lr"]), ()


def takes(row, name):
    """Whether the optimizer supports the penalty: Adam has a step for each entry, several levels of groups need one for all."""
    return not (row.name == "Nested of groups" and name in ("ProxAdam", "AdamHAPG"))


def entries_of(row, copies):
    torch.manual_seed(0)
    many = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(copies) for shape in row.shapes]
    return many, [{"params": many, "penalty": row.penalty, "joint": len(row.shapes) > 1}]


def run(optimizer, params, steps=4):
    torch.manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = p.detach() + torch.randn_like(p)
        optimizer.step()
    with optimizer.at_prox_point():
        return [p.detach().clone() for p in params]


@every_row
@every_optimizer
def test_fused_and_stacked_steps_equal_the_reference(row, name, monkeypatch):
    if not takes(row, name):
        pytest.skip("refused: see test_bad_input")
    params, param_groups = entries_of(row, copies=1 if len(row.shapes) > 1 else 6)
    start = [p.detach().clone() for p in params]
    fast = run(MAKERS[name](param_groups), params)
    monkeypatch.setattr(kernels, "fits", lambda *_: False)
    monkeypatch.setattr(kernels, "plain_tensor", lambda _: False)
    for p, value in zip(params, start):
        p.data.copy_(value)
    for a, b in zip(fast, run(MAKERS[name](param_groups), params)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert ((a == 0) == (b == 0)).all()


@every_single_row
def test_small_tensors_are_updated_as_one_stack(row, monkeypatch):
    params, param_groups = entries_of(row, copies=6)
    calls = []
    monkeypatch.setattr(kernels, "run", lambda kernel, group, penalty, x, *rest, run=kernels.run: (calls.append(x.shape),
                        run(kernel, group, penalty, x, *rest)))  # fmt: skip
    with proxopt.kernels.enabled(False):
        run(ProxSGD(param_groups, lr=0.05), params, steps=1)
    stacked = declared.batched(row.penalty, 2) is not None
    assert calls == ([(6, 4, 3)] if stacked else [(4, 3)] * 6) and stacked == (row.name != "Ridge")


@every_row
@every_optimizer
def test_checkpoints_resume_bit_for_bit(row, name):
    if not takes(row, name):
        pytest.skip("refused: see test_bad_input")
    params, param_groups = entries_of(row, copies=1)
    optimizer = MAKERS[name](param_groups)
    run(optimizer, params)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    others = copy.deepcopy(params)
    again = MAKERS[name]([{**param_groups[0], "params": others, "penalty": row.penalty.with_strength(7.0)}])
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.penalty_of(again.param_groups[0]) == row.penalty
    for a, b in zip(run(optimizer, params), run(again, others)):
        assert torch.equal(a, b)


@every_row
def test_reports_and_strengths(row):
    params, param_groups = entries_of(row, copies=1)
    optimizer = ProxSGD(param_groups, lr=0.05)
    for p in params:
        p.grad = -torch.ones_like(p)  # a positive gradient is no reason for a nonnegative entry to grow
    optimizer.step()
    rows = sparsity_report(optimizer).rows
    assert rows[0].groups == (None if row.penalty.partition is None else row.penalty.partition.count(params))
    StrengthPath(optimizer, lambda epoch: 0.25)
    assert optimizer.penalty_of(optimizer.param_groups[0]).strength == 0.25
    if row.name != "Ridge":
        assert max_strength(optimizer) > 0


@pytest.mark.parametrize("penalty", [Log(0.1), GroupLog(0.1), SquareRootGroup(0.1), Ridge(0.1)], ids=repr)
@pytest.mark.parametrize("joint", [False, True])
def test_param_groups_of_a_model_accept_any_penalty(penalty, joint):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    optimizer = ProxSGD(groups.output_channels(net, penalty, joint=joint), lr=0.1)
    net(torch.randn(5, 2, 4, 4)).square().sum().backward()
    optimizer.step()
    first = optimizer.penalty_of(optimizer.param_groups[0])
    assert type(first) is type(penalty)
    if penalty.partition is not None:
        assert first.groups is not None
        optimizer.param_groups[0]["strength"] = 1e9
        optimizer.step()
        assert sparsity_report(optimizer).rows[0].living == 0


def test_param_groups_of_a_model_accept_any_operator():
    class Wrapped:
        def __init__(self, inner):
            self.value, self.prox = inner.value, inner.prox

    net = nn.Linear(3, 2)
    optimizer = ProxSGD(groups.output_channels(net, Wrapped(GroupL2(1e6, Groups.along(1)))), lr=0.1)
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    assert not net.weight.any()


@every_row
def test_an_optimizer_of_a_user_needs_no_fused_implementation(row):
    params, param_groups = entries_of(row, copies=1 if len(row.shapes) > 1 else 6)
    optimizer = SignDescent(param_groups, lr=0.05)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for size in range(0, len(params), len(row.shapes)):
        moved = [p - 0.05 for p in before[size : size + len(row.shapes)]]
        expected = row.penalty.prox(moved if len(moved) > 1 else moved[0], 0.05)
        for p, q in zip(params[size:], expected if len(moved) > 1 else [expected]):
            torch.testing.assert_close(p.detach(), q)
    optimizer.load_state_dict(optimizer.state_dict())
    assert sparsity_report(optimizer).entries == sum(p.numel() for p in params)


class Signum(ProximalOptimizer):
    """Sign descent with momentum: an optimizer defined outside of the package, with a state and a hyperparameter."""

    state_names = ("momentum",)
    metric = "exact"

    def __init__(self, params, lr=1e-3, beta=0.9, **options):
        super().__init__(params, {"lr": lr, "beta": beta}, **options)

    def check_hyperparameters(self, group):
        if not 0 <= group["beta"] < 1:
            raise ValueError(f"beta must lie in [0, 1), got {group['beta']}")

    def update(self, group, penalty, x, grad, state, count):
        assert isinstance(count, int)
        momentum = self.each(lambda m, g: group["beta"] * m + (1 - group["beta"]) * g, state[0], grad)
        return self.prox(penalty, self.each(lambda w, m: w - group["lr"] * m.sign(), x, momentum), group["lr"]), (momentum,)


@every_row
def test_an_optimizer_of_a_user_has_state_checkpoints_and_checks(row):
    params, param_groups = entries_of(row, copies=1)
    optimizer = Signum(param_groups, lr=0.05, beta=0.5, weight_decay=0.1)
    run(optimizer, params)
    assert all(set(s) == {"step", "momentum"} and int(s["step"]) == 4 for s in optimizer.state.values())
    others = copy.deepcopy(params)
    again = Signum([{**param_groups[0], "params": others, "penalty": row.penalty}])
    again.load_state_dict(optimizer.state_dict())
    for a, b in zip(run(optimizer, params), run(again, others)):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"must hold the state \('momentum',\) of Signum, got \['point'\]"):
        again.load_state_dict({**optimizer.state_dict(), "state": {0: {"step": 1.0, "point": params[0]}}})


def test_mistakes_in_an_optimizer_of_a_user_are_named():
    class Forgetful(Signum):
        def update(self, *arguments):
            return super().update(*arguments)[0], ()

    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\), got 1"):
        Signum([w], beta=1)
    with pytest.raises(ValueError, match=r"must return the state tensors \('momentum',\), got 0 of them"):
        Forgetful([w]).step()
    with pytest.raises(NotImplementedError, match=r"must define update\(group, penalty, x, grad, state, count\)"):
        ProximalOptimizer([w], {"lr": 0.1}).step()
    with pytest.raises(ValueError, match=r"defaults must hold the learning rate 'lr', got \['rate'\]"):
        ProximalOptimizer([w], {"rate": 0.1})
    with pytest.raises(TypeError, match="momentum"):
        Signum([w], momentum=0.1)
    assert torch.equal(w, torch.ones(2))


def test_a_penalty_that_is_not_plain_data_stays_an_object():
    @dataclass(frozen=True, eq=False)
    class Weighed(Ridge):
        weigh: Callable = torch.abs

    w = nn.Parameter(torch.ones(2))
    optimizer = HAPG([w], lr=0.1, penalty=Weighed(0.5))
    assert isinstance(optimizer.param_groups[0]["penalty"], Weighed) and optimizer.param_groups[0]["strength"] == 0.5
    w.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.ones(2) / 1.05)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["penalty"]["kind"] == "foreign"
    again = HAPG([w], lr=0.1, penalty=Weighed(3.0))
    again.load_state_dict(saved)
    assert again.penalty_of(again.param_groups[0]).strength == 0.5  # that of the checkpoint
    StrengthPath(again, lambda epoch: 0.25)
    assert again.penalty_of(again.param_groups[0]).strength == 0.25
    again.param_groups[0]["penalty"] = Weighed(4.0)
    assert again.penalty_of(again.param_groups[0]).strength == 4.0 == again.param_groups[0]["strength"]


def test_a_penalty_with_a_tensor_among_its_fields_stays_an_object():
    @dataclass(frozen=True, eq=False)
    class Scaled(Ridge):
        scale: torch.Tensor | None = None

        def _prox(self, xs, steps):
            return [x / (1 + s * self.strength * self.scale) for x, s in zip(xs, steps)]

    w = nn.Parameter(torch.ones(2))
    optimizer = HAPG([w], lr=1.0, penalty=Scaled(1.0, torch.tensor([1.0, 3.0])))
    w.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.5, 0.25]))


class NonNegative(L1):
    """The L1 norm where all entries are >= 0, else infinite: a subclass with an equation of its own."""

    convex = True

    def _value(self, xs):
        return self.strength * sum(x.sum() if (x >= 0).all() else torch.inf for x in xs)

    def _prox(self, xs, steps):
        return [(x - s * self.strength).clip(0) for x, s in zip(xs, steps)]


@every_optimizer
def test_a_subclass_with_its_own_prox_is_stepped_with_it(name):
    w = nn.Parameter(torch.tensor([-2.0, 3.0]))
    optimizer = MAKERS[name]([{"params": [w], "penalty": NonNegative(1e-3)}])
    w.grad = torch.full((2,), 1e-2)
    optimizer.step()
    with optimizer.at_prox_point():
        assert w[0] == 0 and 2.9 < w[1] < 3
    check_prox(NonNegative(1.0), torch.tensor([-2.0, 3.0]), 0.3)
    w.grad = torch.tensor([-5.0, 3.0])
    assert max_strength([w], NonNegative(1.0)) == 5.0


def test_two_classes_of_one_name_are_not_confused():
    def make(factor):
        @dataclass(frozen=True, eq=False)
        class Scaled(Ridge):
            def _prox(self, xs, steps):
                return [x / (1 + s * self.strength * factor) for x, s in zip(xs, steps)]

        return Scaled

    first, _ = make(1), make(5)
    w = nn.Parameter(torch.ones(1))
    optimizer = ProxSGD([w], lr=1.0, penalty=first(1.0))
    optimizer.param_groups[0]["strength"] = 3.0
    w.grad = torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.25]))


def test_a_constructor_that_is_not_that_of_the_fields_keeps_the_object():
    class Scaled(Ridge):
        def __init__(self, strength, factor=1.0):
            object.__setattr__(self, "strength", strength)
            object.__setattr__(self, "factor", factor)

        def _prox(self, xs, steps):
            return [x / (1 + s * self.strength * self.factor) for x, s in zip(xs, steps)]

    w = nn.Parameter(torch.ones(1))
    optimizer = ProxSGD([w], lr=1.0, penalty=Scaled(1.0, 3.0))
    w.grad = torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.25]))
    with pytest.raises(TypeError, match="Scaled must be a dataclass with the __init__ of its own fields to change strength"):
        Scaled(1.0).with_strength(2.0)


@pytest.mark.parametrize("strength", [torch.tensor([0.1, 0.2], dtype=torch.bfloat16), torch.tensor(0.1, requires_grad=True)])
def test_strengths_are_tensors_of_any_kind(strength):
    ProxSGD([nn.Parameter(torch.ones(2))], penalty=L1(strength))


def test_numbers_of_numpy_are_plain_data():
    optimizer = ProxSGD([nn.Parameter(torch.ones(2))], penalty=SparseGroupLasso(0.1, np.float64(0.5)))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    ProxSGD([nn.Parameter(torch.ones(2))], penalty=ElasticNet(0.1, np.float32(0.5)))


def test_strengths_of_a_hierarchy_may_differ_between_columns():
    x = torch.randn(600, 600)
    strength = torch.rand(600, 1)
    w = nn.Parameter(x.clone())
    optimizer = HAPG([w], lr=0.1, penalty=Nested(L1(1.0), strength=strength))
    w.grad = torch.zeros_like(x)
    optimizer.step()
    torch.testing.assert_close(w.detach(), L1(strength).prox(x, 0.1))


def test_what_a_prox_returns_is_checked_before_it_is_written():
    class Summed(Ridge):
        def _prox(self, xs, steps):
            return [x.sum(0) for x in xs]

    w = nn.Parameter(torch.ones(4, 3))
    optimizer = ProxSGD([w], lr=1.0, penalty=Summed(1.0))
    w.grad = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"Summed\._prox must return an array of shape \(4, 3\), got \(3,\)"):
        optimizer.step()


def test_a_form_without_a_field_for_groups_is_stacked_too():
    @dataclass(frozen=True, eq=False)
    class Whole(Penalty):
        strength: float

        def shrinkage(self):
            return Shrinkage(l2=self.strength, weights="none")

    stacked = declared.batched(Whole(1.0), 1)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(stacked.prox(x), torch.stack([Whole(1.0).prox(row) for row in x]))
    with pytest.raises(ValueError, match="penalty must have a field 'groups', they are chosen here, got Whole"):
        groups.output_channels(nn.Linear(3, 2), Whole(1.0))


def test_a_checkpoint_of_a_class_with_other_fields_is_refused_before_anything_is_loaded():
    optimizer = ProxSGD([nn.Parameter(torch.ones(2))], penalty=Log(0.1))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["penalty"] = {"kind": "own_penalty.Log", "former": 1.0}
    with pytest.raises(ValueError, match=r"state_dict must hold a penalty that can be rebuilt in param_groups\[0\]: .*former"):
        optimizer.load_state_dict(saved)


def test_updates_accept_any_operator():
    x = torch.tensor([1.0, -3.0])
    new, _ = updates.hapg(x, torch.zeros(2), updates.HAPGState(x, 0), Ridge(1.0), lr=0.5, extrapolation=0.0)
    torch.testing.assert_close(new, x / 1.5)


def test_the_benchmark_compares_both_sides(tmp_path):
    import penalty_step

    penalty_step.main(["--tensors", "6", "--rounds", "1", "--out", str(tmp_path / "steps.csv")])
    rows = (tmp_path / "steps.csv").read_text().splitlines()
    assert len(rows) == 1 + len(penalty_step.OPTIMIZERS) * len(penalty_step.PAIRS)


@pytest.mark.commands
def test_the_example_finds_the_coefficients(capsys):
    import own_penalty

    own_penalty.main([])
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {"L1", "Log"}
