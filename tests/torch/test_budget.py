"""Budget: strengths that make a network reach a share of its cost, counted without making the smaller network."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, Budget, ProxAdam, Proximal, ProxSGD, StrengthPath, compact, groups
from proxopt_torch.budgets import quantities
from proxopt_torch.budgets.control import STALLED, Controller, schedule_of, wanted_share
from proxopt_torch.budgets.counting import MultiplyAdds, Parameters
from proxopt_torch.dependencies import analyse, removable
from proxopt_torch.param_groups import entries


class Residual(nn.Module):
    """A residual connection of convolutions with norms, a depthwise and a transposed one."""

    def __init__(self, width=12):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner, self.norm1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.outer, self.norm2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        h = F.relu(self.norm0(self.stem(x)))
        h = h + self.norm2(self.outer(self.deep(F.relu(self.norm1(self.inner(h))))))
        return self.head(F.relu(h).mean((2, 3)))


class Transformer(nn.Module):
    """Attention with small heads, and an MLP."""

    def __init__(self, heads=8):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.layer = nn.TransformerEncoderLayer(16, heads, 256, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layer(self.embedding(x)).mean(1))


class Attention(nn.Module):
    """Projections of its own around the fused attention of torch, with products of matrices."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.norm, self.inner, self.table = nn.LayerNorm(16), nn.Linear(16, 10), nn.Parameter(torch.randn(10, 16))

    def forward(self, x):
        q, k, v = (layer(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return torch.einsum("btj,jd->btd", F.relu(self.inner(x)), self.table) @ self.table.T


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layers, self.head = kind(5, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.layers(x)[0][:, -1])


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.up, self.last = nn.Conv1d(3, 8, 3), nn.ConvTranspose1d(8, 6, 2, stride=2, bias=False), nn.Conv1d(6, 2, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.up(F.relu(self.first(x)))))


class Autocast(nn.Module):
    """Layers inside a region of autocast."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 80), nn.Linear(80, 60), nn.Linear(60, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.relu(self.second(F.relu(self.first(x))))
        return self.last(x.float())


def mlp():
    return nn.Sequential(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 60, bias=False), nn.Sigmoid(), nn.Linear(60, 4, bias=False))


def relu():
    return nn.Sequential(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 60), nn.ReLU(), nn.Linear(60, 4))


NETS = {
    "relu": (relu, lambda: torch.randn(64, 6)),
    "mlp": (mlp, lambda: torch.randn(64, 6)),
    "residual": (Residual, lambda: torch.randn(32, 3, 4, 4)),
    "transformer": (Transformer, lambda: torch.randint(0, 12, (16, 5))),
}
COUNTED = NETS | {
    "autocast": (Autocast, lambda: torch.randn(3, 6)),
    "attention": (Attention, lambda: torch.randn(2, 5, 16)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(3, 4, 5)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(3, 4, 5)),
    "transposed": (Transposed, lambda: torch.randn(2, 3, 9)),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(1, 8, 2), nn.Flatten(), nn.Linear(72, 3)), lambda: torch.randn(2, 1, 4, 4)),
}
OPTIMIZERS = {
    "prox_adam": lambda params: ProxAdam(params, lr=0.005),
    "adam_hapg": lambda params: AdamHAPG(params, lr=0.005),
    "hapg": lambda params: HAPG(params, lr=0.05),
    "prox_sgd": lambda params: ProxSGD(params, lr=0.05),
    "proximal": lambda params: Proximal(torch.optim.Adam(params, lr=0.005)),
}


class Training:
    """A network, made-up data, an optimizer with coupled groups and a budget."""

    def __init__(self, net="mlp", optimizer="prox_adam", penalty=None, make=groups.coupled, **options):
        torch.manual_seed(0)
        build, example = NETS[net]
        self.net, self.x = build(), example()
        self.y = torch.randint(0, 4, (len(self.x),))
        penalty = penalty or GroupL2(1e-3)
        params = make(self.net, self.x, penalty) if make is groups.coupled else make(self.net, penalty)
        self.optimizer = OPTIMIZERS[optimizer](params)
        options = options or {"macs": 0.5}
        self.budget = Budget(self.optimizer, self.net, self.x, **{"steps": 150, **options})

    def step(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(self.x), self.y).backward()
        self.optimizer.step()
        return self.budget.step()

    def run(self, count):
        for _ in range(count):
            record = self.step()
        return record

    def until_frozen(self, most):
        """Train until the zeros are frozen, and for a few steps more."""
        for _ in range(most):
            if self.step().frozen:
                break
        return self.run(4)

    def small(self):
        self.net.eval()
        with self.optimizer.at_prox_point():
            return compact(self.net, self.x)


# -- counting ---------------------------------------------------------------------------------


@torch.no_grad()
def zero_some(net, found):
    """Zero every second unit that may be removed."""
    for family in found.families:
        units = set(family.units[1::2].tolist()) if not family.reason else set()
        for name, dim in family.places:
            index = [i for i, u in enumerate(found.places[name][dim].tolist()) if u in units]
            if index and name in dict(net.named_parameters()):
                found.flow.trace.tensors[name].index_fill_(dim, torch.tensor(index), 0.0)


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_compact(name):
    torch.manual_seed(0)
    build, example = COUNTED[name]
    net, x = build().eval(), example()
    found = analyse(net, (x,))
    counters = MultiplyAdds(found), Parameters(found, list(dict(net.named_parameters())))
    zero_some(net, found)
    expected, removal = compact(net, x), removable(found)
    assert len(removal.units)
    for counter, (before, after) in zip(counters, (expected.multiply_adds, expected.parameters)):
        assert (counter.dense, counter.count(removal)) == (before, after) and after < before


def test_units_whose_number_is_written_in_the_code_do_not_count_as_removed():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(F.relu(self.second(F.relu(self.first(x)).view(-1, 12))))

    torch.manual_seed(0)
    net, x = Written(), torch.randn(3, 6)
    weights = [p.clone() for p in net.parameters()]
    quantity = quantities.Analysed("macs", net, x, None)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters())) and quantity.share() == 1
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.weight[2:], layer.bias[2:] = 0, 0
    before, after = compact(net, x).multiply_adds
    assert quantity.share() == after / before < 1


def test_modules_choose_what_counts():
    net, x = mlp(), torch.randn(2, 6)
    with torch.no_grad():
        net[0].weight[40:], net[0].bias[40:], net[2].weight[:, 40:] = 0, 0, 0
    shares = [quantities.Analysed("macs", net, x, modules).share() for modules in ("0", nn.Linear, "4")]
    assert shares == [0.5, (6 * 40 + 40 * 60 + 60 * 4) / (6 * 80 + 80 * 60 + 60 * 4), 1.0]
    assert quantities.Analysed("parameters", net, x, ["0", "2"]).share() == (40 * 7 + 40 * 60) / (80 * 7 + 80 * 60)
    assert quantities.NonzeroWeights(net, "0").share() == 0.5
    optimizer = ProxAdam(groups.output_channels(net, GroupL2(1.0)))
    assert quantities.NonzeroGroups(optimizer, net, "0").share() == 0.5
    assert quantities.NonzeroGroups(optimizer, net, None).share() == (40 + 60 + 4) / (80 + 60 + 4)
    assert quantities.NonzeroGroups(ProxAdam(net[0].parameters(), penalty=L1(1.0)), net, None).share() == 0.5


# -- the controller ---------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.02, 1.0])
@pytest.mark.parametrize("pace", [0.01, 1.0])
@pytest.mark.parametrize("measurements", [40, 400])
def test_controller_on_units_that_shrink(spread, pace, measurements):
    """Units whose norms fall by the strength and never come back, all at about the same time or one after the other."""
    norms = torch.linspace(1 - spread, 1 + spread, 401)[1:].double()
    control, schedule = Controller(0.02, measurements), schedule_of("cubic")
    control.start(1.0 / pace)
    for i in range(measurements):
        norms = (norms - pace * control.factor * (norms > 0) * 20 / measurements).clamp(min=0)
        share, time = float((norms > 0).double().mean()), (i + 1) / measurements
        if 0.23 <= share <= 0.26:
            break
        control.update(share, wanted_share(schedule, 0.25, time), float(norms.sum()), time)
    assert 0.23 <= share <= 0.26


def test_controller_stops_where_nothing_changes():
    control = Controller(0.02, 50)
    control.start(None)
    for i in range(1000):
        control.update(1.0, 0.5, 1.0, min(i / 50, 1.0))
    assert control.stalled and control.log_factor == pytest.approx(STALLED)


def test_controller_lowers_the_strength_below_the_wanted_share():
    control = Controller(0.02, 50)
    control.start(None)
    factors = []
    for _ in range(20):
        control.update(0.3, 0.5, 1.0, 0.5)
        factors.append(control.factor)
    assert factors == sorted(factors, reverse=True) and 0 < factors[-1] < 0.01


def test_schedules():
    assert [wanted_share(schedule_of("linear"), 0.5, t) for t in (-1, 0, 0.5, 1, 2)] == [1, 1, 0.75, 0.5, 0.5]
    assert wanted_share(schedule_of("cubic"), 0.5, 0.5) == 0.5 + 0.5 * 0.125
    assert wanted_share(schedule_of(lambda t: float(t > 0.5)), 0.5, 0.6) == 0.5
    with pytest.raises(ValueError, match=r"schedule\(0\.5\) must lie in \[0, 1\], got 2"):
        wanted_share(schedule_of(lambda t: 2.0), 0.5, 0.5)


# -- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.5, 0.25])
@pytest.mark.parametrize("net", ["mlp", "residual", "transformer"])
def test_the_target_is_met_and_the_cut_changes_nothing(net, target):
    training = Training(net, macs=target)
    record = training.until_frozen(170)
    small = training.small()
    before, after = small.multiply_adds
    assert record.reached and record.frozen and abs(record.share - target) <= 0.02
    assert after / before == record.share
    with training.optimizer.at_prox_point(), torch.no_grad():
        expected = training.net(training.x)
        assert (small.model(training.x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert training.budget.smallest < target


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_reaches_the_target(optimizer):
    assert Training("relu", optimizer, macs=0.5).until_frozen(160).reached


@pytest.mark.parametrize(
    ("make", "penalty", "options"),
    [
        (groups.coupled, SparseGroupLasso(1e-3), {"parameters": 0.5}),
        (groups.coupled, GroupL2(1e-3), {"living_groups": 0.6}),
        (groups.coupled, GroupL2(1e-3), {"macs": 0.5, "modules": "2", "every": 3, "start": 0.2, "schedule": "linear"}),
        (groups.output_channels, L1(1e-3), {"sparsity": 0.7}),
        (groups.output_channels, GroupL2(1e-3), {"living_groups": 0.5}),
    ],
)
def test_quantities_and_options(make, penalty, options):
    training = Training("mlp", penalty=penalty, make=make, **options)
    record = training.until_frozen(170)
    (name, target), *_ = options.items()
    assert record.reached and record.target == target and abs(record.share - target) <= 0.02
    rows = training.budget.log
    assert [r["step"] for r in rows][:3] == [n * options.get("every", 1) for n in (1, 2, 3)]
    assert set(rows[0]) >= {"step", "share", "target", "strength", "reached"}
    if options.get("start"):
        assert {r["strength"] for r in rows if r["step"] < 30} == {0.0} and all(r["wanted"] == 1 for r in rows if r["step"] < 30)
    label = {"parameters": "parameters", "living_groups": "nonzero groups", "macs": "multiply-adds", "sparsity": "zero weights"}
    assert str(training.budget).startswith(f"{label[name]} {record.share:.3f}, wanted")


@pytest.mark.parametrize(("net", "kind"), [("residual", "macs"), ("transformer", "macs"), ("relu", "parameters")])
@pytest.mark.parametrize("penalty", [GroupL2(1e-3), SparseGroupLasso(1e-3)])
def test_penalties_of_units_follow_what_their_removal_saves(net, kind, penalty):
    training = Training(net, penalty=penalty, **{kind: 0.5})
    start = torch.cat([p.detach().flatten() for p in training.net.parameters()])
    ratios = []
    for number, strength in training.budget._strengths.own.items():
        group = training.optimizer.param_groups[number]
        entry, *others = entries(group)
        assert group["joint"] and not others
        operator = training.optimizer.penalty_of(group).with_strength(strength)
        count = operator.groups.count(entry)
        saved = [p.detach().clone() for p in entry]
        with torch.no_grad():
            for p, keep in zip(entry, operator.groups.spread(torch.arange(count) % 2, entry)):
                p.mul_(keep)
            small = compact(training.net, training.x)
            for p, values in zip(entry, saved):
                p.copy_(values)
        before, after = small.multiply_adds if kind == "macs" else small.parameters
        ratios.append(float(operator.value(saved)) / (before - after))
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-4)
    assert torch.equal(start, torch.cat([p.detach().flatten() for p in training.net.parameters()]))
    kept = Training(net, penalty=penalty, by_cost=False, **{kind: 0.5})
    assert set(kept.budget._strengths.own.values()) == {1e-3}


def test_latency_is_measured_on_the_smaller_model(monkeypatch):
    training = Training(latency=0.5, steps=10, every=2)
    width = training.net[0].out_features
    times = []

    def seconds(model, given):
        times.append(model[0].out_features / width)
        return times[-1]

    monkeypatch.setattr(quantities, "seconds", seconds)
    with torch.no_grad():
        training.net[0].weight[20:], training.net[0].bias[20:] = 0, 0
    training.budget.step()
    record = training.budget.step()
    assert record.share == 20 / 80 and times.count(1.0) == times.count(0.25) and training.budget.smallest is None


def test_ratios_of_strengths_remain_and_freezing_ends_control():
    net, x = mlp(), torch.randn(8, 6)
    parts = [
        {"params": [net[0].weight], "penalty": GroupL2(1e-2, Groups.along(1))},
        {"params": [net[2].weight], "penalty": GroupL2(3e-2, Groups.along(1)), "strength": torch.tensor(3e-2)},
        {"params": [net[4].weight]},
    ]
    optimizer = ProxAdam(parts)
    budget = Budget(optimizer, net, x, macs=0.5, steps=4)
    assert [float(g["strength"]) for g in optimizer.param_groups] == [0, 0, 0]
    budget.step()  # without gradients: the strengths at construction
    first, second, _ = (float(g["strength"]) for g in optimizer.param_groups)
    assert second == pytest.approx(3 * first) and 0.01 <= first < 0.03
    with torch.no_grad():
        net[0].weight[38:], net[0].bias[38:], net[2].weight[:, 38:] = 0, 0, 0
    assert budget.step().frozen and all(g.get("zeros_frozen") for g in optimizer.param_groups[:2])
    strength = optimizer.param_groups[0]["strength"]
    assert budget.step().strength == pytest.approx(3 * strength)


def test_a_measurement_changes_nothing():
    training = Training("residual", "hapg", macs=0.5, steps=50)
    training.run(3)
    training.net.stem.eval()
    before = copy.deepcopy(training.net.state_dict())
    modes, random = [m.training for m in training.net.modules()], torch.get_rng_state()
    training.budget.step()
    assert [m.training for m in training.net.modules()] == modes and {g["mode"] for g in training.optimizer.param_groups} == {
        "train"
    }
    assert all(torch.equal(v, before[k]) for k, v in training.net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    training.optimizer.eval()
    training.budget.step()
    assert {g["mode"] for g in training.optimizer.param_groups} == {"eval"}


@pytest.mark.parametrize(("optimizer", "at"), [("prox_adam", 10), ("hapg", 60), ("prox_adam", 60)])
@pytest.mark.filterwarnings("ignore:the target macs=0.5 is not reached")
def test_resumes_bit_for_bit(tmp_path, optimizer, at):
    whole, part, resumed = (Training("relu", optimizer, macs=0.5, steps=60) for _ in range(3))
    whole.run(at + 8)
    part.run(at)
    parts = {"net": part.net, "optimizer": part.optimizer, "budget": part.budget}
    torch.save({name: p.state_dict() for name, p in parts.items()}, tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in ("budget", "net", "optimizer"):
        getattr(resumed, name).load_state_dict(states[name])
    assert resumed.budget.record == part.budget.record
    resumed.run(8)
    assert resumed.budget.log == whole.budget.log
    assert all(torch.equal(a, b) for a, b in zip(resumed.net.parameters(), whole.net.parameters()))


def test_compiled_models_stand_for_the_original():
    training = Training("mlp")
    budget = Budget(
        ProxAdam(groups.coupled(training.net, training.x, GroupL2(1e-3))),
        torch.compile(training.net),
        training.x,
        macs=0.5,
        steps=5,
    )
    assert budget.record.share == 1 and not budget.record.reached


# -- out of reach, errors ---------------------------------------------------------------------


def test_a_target_out_of_reach_is_reported_at_construction():
    net, x = mlp(), torch.randn(8, 6)
    optimizer = ProxAdam(groups.coupled(net, x, GroupL2(1e-3), include="0"))
    with pytest.warns(UserWarning, match=r"macs=0.01 is out of reach of the penalties: .* the share is 0.05"):
        budget = Budget(optimizer, net, x, macs=0.01, steps=5)
    weights = [p.clone() for p in net.parameters()]
    assert 0.05 < budget.smallest < 0.06 and all(torch.equal(a, b) for a, b in zip(weights, net.parameters()))


def test_a_target_that_is_not_reached_is_reported_once():
    training = Training(macs=0.5, steps=3)
    for group in training.optimizer.param_groups:
        group["lr"] = 1e-6  # no step of this run sets anything to zero, on any machine
    with pytest.warns(UserWarning, match=r"macs=0.5 is not reached after 3 steps, got 1: penalise more parameters") as found:
        record = training.run(5)
    assert len(found) == 1 and not record.reached and not record.frozen


def test_too_small_a_network_is_frozen_when_the_target_is_due():
    training = Training(macs=0.5, steps=2)
    with torch.no_grad():
        training.net[0].weight[20:], training.net[0].bias[20:], training.net[2].weight[:, 20:] = 0, 0, 0
    assert not training.budget.step().frozen
    with pytest.warns(UserWarning, match="measure more often"):
        record = training.budget.step()
    assert record.frozen and not record.reached and record.share < 0.48


def test_strengths_that_others_set_are_refused():
    training = Training(macs=0.5, steps=5)
    StrengthPath(training.optimizer, lambda epoch: 0.1)
    with pytest.raises(RuntimeError, match=r"must be set by the budget alone, 0\.0, got 0\.1: do not use a StrengthPath"):
        training.budget.step()


def test_arguments_are_checked():
    net, x = mlp(), torch.randn(4, 6)
    optimizer = ProxAdam(groups.coupled(net, x, GroupL2(1e-3)))
    good = {"macs": 0.5, "steps": 5}

    def refused(error, match, optimizer=optimizer, model=net, example=x, **options):
        with pytest.raises(error, match=match), warnings.catch_warnings():
            Budget(optimizer, model, example, **{**good, **options})

    refused(ValueError, "exactly one of macs, parameters, sparsity, living_groups, latency must be given, got none", macs=None)
    refused(ValueError, "must be given, got macs, latency", latency=0.5)
    refused(ValueError, r"macs must be a number in \(0, 1\), got 1", macs=1)
    refused(ValueError, r"macs must be a number in \(0, 1\), got -1", macs=-1)
    refused(TypeError, r"macs must be a number, got tensor\(0.5000\)", macs=torch.tensor(0.5))
    refused(TypeError, "macs must be a number, got '0.5'", macs="0.5")
    refused(ValueError, r"steps must be >= 1, got 0", steps=0)
    refused(TypeError, r"every must be an integer, got 2.0", every=2.0)
    refused(ValueError, r"start must lie in \[0, 1\), got 1", start=1)
    refused(ValueError, r"tolerance must be a number in \(0, 1\), got 0", tolerance=0)
    refused(ValueError, r"start must lie in \[0, 1\), got nan", start=float("nan"))
    refused(ValueError, "schedule must be 'cubic', 'linear' or a function, got 'quartic'", schedule="quartic")
    refused(ValueError, r"schedule must be 'cubic', 'linear' or a function, got \['cubic'\]", schedule=["cubic"])
    refused(ValueError, r"schedule\(0\) must lie in \[0, 1\], got nan", schedule=lambda t: float("nan"))
    refused(TypeError, "freeze must be True or False, got 1", freeze=1)
    refused(TypeError, "by_cost must be True, False or None, got 'yes'", by_cost="yes")
    refused(TypeError, "by_cost must be True, False or None, got 1", by_cost=1)
    refused(ValueError, "by_cost must be False or None for latency", macs=None, latency=0.5, by_cost=True)
    elements = ProxAdam(net.parameters(), penalty=L1(1e-3))
    refused(ValueError, r"by_cost must be False where a penalty has no groups, got L1\(", elements, by_cost=True)
    refused(ValueError, "modules must name layers of the model, got 'fc'", modules="fc")
    refused(ValueError, "modules must hold multiply-adds, got none in '1'", modules="1")
    refused(ValueError, r"example_inputs must be such that the model has multiply-adds, got shape \(0, 6\)", example=x[:0])
    refused(ValueError, r"example_inputs must be .* with which the model runs, got shape \(4, 6\): Runtime", example=x.double())
    refused(ValueError, "modules must be None for latency", macs=None, latency=0.5, modules="0")
    refused(TypeError, "optimizer must be an optimizer of proxopt_torch, got Adam", torch.optim.Adam(net.parameters()))
    refused(TypeError, "model must be an nn.Module, got int", model=3)
    refused(ValueError, "model must hold the parameters of the optimizer, got a Sequential", model=mlp())
    refused(ValueError, "penalty has a strength to set, got none", ProxAdam(net.parameters()))
    refused(ValueError, "strength of param group 0 must be > 0", ProxAdam(net.parameters(), penalty=L1(0.0)))
    assert {group["strength"] for group in optimizer.param_groups[:2]} == {1e-3}, "nothing was changed"

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = net[0]

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    refused(ValueError, "model must be one that torch.export can trace with example_inputs to count macs", model=Untraceable())
    Budget(optimizer, Untraceable(), None, sparsity=0.5, steps=5)


def test_a_constructor_that_ends_with_a_warning_as_an_error_changes_nothing():
    net, x = mlp(), torch.randn(8, 6)
    optimizer = ProxAdam(groups.coupled(net, x, GroupL2(1e-3), include="0"))
    before = [group["strength"] for group in optimizer.param_groups]
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="out of reach"):
        warnings.filterwarnings("error", message=".*out of reach")
        Budget(optimizer, net, x, macs=0.01, steps=5)
    assert [group["strength"] for group in optimizer.param_groups] == before


def test_the_number_of_steps_may_be_one_of_numpy():
    assert type(Training(macs=0.5, steps=np.int64(7)).budget.steps) is int


def test_a_state_of_other_groups_is_refused():
    state = Training().budget.state_dict()
    state["own"] = {5: 1.0}
    with pytest.raises(ValueError, match=r"whose param groups \[0, 1\] have penalties, got \[5\]"):
        Training().budget.load_state_dict(state)


def test_a_truncated_state_is_refused_and_changes_nothing():
    budget = Training().budget
    before = budget.state_dict()
    broken = [{"calls": 3}, [1], {**before, "calls": 9, "record": {}}, {**before, "calls": 9, "control": {"x": 1}}]
    broken += [{**before, "calls": calls} for calls in ("9", -1, 2.5)] + [{**before, "frozen": "no"}, {**before, "own": None}]
    for state in broken:
        with pytest.raises(ValueError, match=r"state_dict must be what state_dict\(\) of a Budget returned, got "):
            budget.load_state_dict(state)
    for strength in (float("nan"), -1.0, torch.ones(2)):
        with pytest.raises(ValueError, match="state_dict must hold a strength > 0 for param group 0, got "):
            budget.load_state_dict({**before, "calls": 9, "own": {0: strength, 1: 1.0}})
    assert budget.state_dict() == before


@pytest.mark.parametrize("other", [{"parameters": 0.5}, {"sparsity": 0.5}, {"macs": 0.3}])
def test_a_state_of_another_target_is_refused(other):
    """Else what was reached of one target would count as reached of the other."""
    state, ((name, target),) = Training(macs=0.5).budget.state_dict(), other.items()
    with pytest.raises(ValueError, match=f"state_dict must be of a budget with {name}={target}, got macs=0.5"):
        Training(**other).budget.load_state_dict(state)
    del state["kind"]  # as in earlier checkpoints
    Training(macs=0.5).budget.load_state_dict(state)


def test_a_resumed_budget_has_its_own_arguments():
    state = Training(macs=0.5, tolerance=0.02, steps=10).budget.state_dict()
    budget = Training(macs=0.5, tolerance=0.1, steps=40).budget
    budget.load_state_dict(state)
    assert (budget.state_dict()["control"]["tolerance"], budget.state_dict()["control"]["measurements"]) == (0.1, 40)


def cut_by_hand(training):
    """Half of the network, so that the next measurement finds the target reached."""
    with torch.no_grad():
        training.net[0].weight[38:], training.net[0].bias[38:], training.net[2].weight[:, 38:] = 0, 0, 0


def test_a_budget_does_not_say_that_zeros_are_frozen_which_are_not():
    training = Training(macs=0.5, steps=4)
    cut_by_hand(training)
    assert training.budget.step().frozen
    training.optimizer.freeze_zeros(False)
    with pytest.raises(RuntimeError, match="the zeros must stay frozen once the budget has frozen them, got an optimizer"):
        training.budget.step()
    resumed = Training(macs=0.5, steps=4)
    resumed.budget.load_state_dict(training.budget.state_dict())  # without that of the optimizer
    with pytest.raises(RuntimeError, match="load the states of both the optimizer and the budget"):
        resumed.budget.step()


def test_zeros_that_the_user_freezes_end_control():
    training = Training(macs=0.5, steps=4)
    before = training.budget.step()
    training.optimizer.freeze_zeros()
    assert training.budget.step().frozen and training.budget.record.strength == before.strength and not before.frozen
    training.optimizer.freeze_zeros(False)
    assert not training.budget.step().frozen


def test_a_budget_says_how_to_copy_it():
    with pytest.raises(TypeError, match=r"a Budget cannot be pickled or copied, .*: keep its state_dict\(\)"):
        copy.deepcopy(Training().budget)
