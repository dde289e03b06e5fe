"""Param groups from modules, and the report on what became of them."""

import re

import pytest
import torch
from torch import nn

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, SparseGroupLasso
from proxopt_torch import HAPG, ProxAdam, ProxSGD, groups, max_strength, sparsity_report


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def names(param_groups):
    return [[name for name, _ in g["params"]] for g in param_groups]


def every_parameter_once(model, param_groups):
    seen = [id(p) for g in param_groups for _, p in g["params"]]
    return len(seen) == len(set(seen)) and set(seen) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    "build",
    [
        lambda m: groups.output_channels(m, GroupL2(1.0)),
        lambda m: groups.output_channels(m, SparseGroupLasso(1.0), joint=True),
        lambda m: groups.output_channels(m, L1(1.0), exclude=nn.Linear),
        lambda m: groups.input_features(m, GroupL2(1.0)),
        lambda m: groups.input_features(m, ElasticNet(1.0), include="5"),
        lambda m: groups.modules(m, GroupL2(1.0), nn.Linear),
    ],
)
def test_every_parameter_is_in_one_group_and_only_the_last_has_no_penalty(build):
    net = convnet()
    found = build(net)
    assert every_parameter_once(net, found)
    unpenalised = [number for number, g in enumerate(found) if g.get("penalty") is None]
    assert unpenalised in ([], [len(found) - 1])
    ProxAdam(found)


def test_a_strong_penalty_on_channels_zeroes_whole_channels():
    net = convnet()
    optimizer = ProxAdam(groups.output_channels(net, GroupL2(1e4), exclude="5"), lr=0.1)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not bool(net[0].weight.any()) and not bool(net[3].weight.any()) and bool(net[5].weight.any())


def test_a_joint_channel_takes_its_bias_and_batch_norm_along():
    net = convnet()
    found = groups.output_channels(net, GroupL2(1e4), include="0", joint=True)
    assert names(found)[0] == ["0.weight", "1.weight", "1.bias"]
    optimizer = ProxSGD(found, lr=0.1)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not any(bool(p.any()) for p in (net[0].weight, net[1].weight, net[1].bias))
    row = sparsity_report(optimizer).rows[0]
    assert (row.name, row.groups, row.living) == ("0.weight + 1.weight + 1.bias", 8, 0)


def test_transposed_convolutions_count_channels_on_their_own_axis():
    net = nn.Sequential(nn.ConvTranspose2d(3, 5, 2))
    out = ProxAdam(groups.output_channels(net, GroupL2(1.0)))
    assert sparsity_report(out).rows[0].groups == 5
    assert sparsity_report(ProxAdam(groups.input_features(net, GroupL2(1.0)))).rows[0].groups == 3
    with pytest.raises(ValueError, match="0 must be excluded: output channels of a grouped transposed convolution"):
        groups.output_channels(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2)), GroupL2(1.0))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 4}])
def test_an_attention_head_is_all_that_belongs_to_it(options):
    model = Attention(**options)
    found = groups.attention_heads(model, GroupL2(1.0, weights="none"))
    assert every_parameter_once(model, found)
    optimizer = ProxSGD(found, lr=1.0)
    layer = model.attention
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        layer.out_proj.weight[:, :4] = 0.0
        for w in [layer.in_proj_weight] if layer.in_proj_weight is not None else [layer.q_proj_weight]:
            w[:4] *= 1e-3
        for p in optimizer.param_groups[0]["params"][1:-1]:
            p.zero_()
        if layer.in_proj_weight is not None:
            layer.in_proj_weight[8:].zero_()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    row = sparsity_report(optimizer).rows[0]
    assert (row.groups, row.living) == (2, 1)


def test_a_module_is_one_group():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.ReLU()})
    found = groups.modules(net, GroupL2(1e-3), ["a", "c"])
    assert names(found) == [["a.weight", "a.bias"], ["b.weight", "b.bias"]]
    assert found[0]["joint"]


def test_tied_weights_are_penalised_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    found = groups.output_channels(net, GroupL2(1.0))
    assert every_parameter_once(net, found)
    assert names(found) == [["0.weight"], ["0.bias", "1.bias"]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda m: groups.output_channels(m, GroupL2(1.0), include="fc"),
            "include must name layers of the model, got 'fc'; there are '0', '3', '5'",
        ),
        (lambda m: groups.output_channels(m, GroupL2(1.0), exclude=nn.LSTM), "exclude must name layers"),
        (lambda m: groups.output_channels(m, GroupL2(1.0), exclude="*"), "model must hold a Linear or Conv1d"),
        (lambda m: groups.output_channels(m, GroupL2(1.0, Groups.along(0))), "penalty must come without groups"),
        (
            lambda m: groups.input_features(m, GroupL2(1.0), include="3"),
            "3 must not be included: input channels",
        ),
        (lambda m: groups.attention_heads(m, GroupL2(1.0)), "model must hold a MultiheadAttention"),
        (lambda m: groups.modules(nn.Sequential(m), GroupL2(1.0), ["0", "0.0"]), "must be in one group"),
    ],
)
def test_a_wrong_choice_is_named(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(convnet())


def test_a_near_miss_gets_a_hint():
    net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="got 'encodr'; did you mean 'encoder'"):
        groups.output_channels(net, GroupL2(1.0), include="encodr")


def test_a_penalty_that_takes_no_groups_is_named():
    with pytest.raises(TypeError, match="penalty must be L1, ElasticNet, GroupL2 or SparseGroupLasso, got Nested"):
        groups.output_channels(convnet(), Nested(L1(1.0), GroupL2(1.0)))


def test_a_report_counts_zeros_and_living_groups():
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 1, 0], [0, 2, 3]]))
        net.bias.fill_(1.0)
    report = sparsity_report(net)
    assert (report.entries, report.zeros, report.share) == (8, 3, 3 / 8)
    optimizer = HAPG([{"params": [("w", net.weight)], "penalty": GroupL2(1.0, Groups.along(0))}, {"params": [("b", net.bias)]}])
    row, bias = sparsity_report(optimizer).rows
    assert (row.groups, row.living, row.shape, bias.groups) == (3, 2, "2x3", None)
    lines = str(sparsity_report(optimizer)).splitlines()
    assert re.search(r"w +2x3 +3 / 6 +50\.0% +2 / 3", lines[1]) and re.search(r"total +3 / 8 +37\.5%", lines[-1])
    assert sparsity_report(nn.ReLU()).share == 0.0
    with pytest.raises(TypeError, match="source must be a module or an optimizer of proxopt_torch, got SGD"):
        sparsity_report(torch.optim.SGD(net.parameters()))


def test_reports_count_a_hierarchy_by_its_outermost_groups():
    w = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    row = sparsity_report(HAPG([w], penalty=Nested(L1(1.0), GroupL2(1.0, Groups.along(1)), GroupL2(1.0)))).rows[0]
    assert (row.groups, row.living) == (1, 1)


def test_max_strength_zeroes_everything_and_a_little_less_does_not():
    torch.manual_seed(0)
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    penalty = SparseGroupLasso(1.0, 0.5, Groups.along(0))

    def survivors(strength):
        w = nn.Parameter(torch.zeros(3, 6, dtype=torch.float64))
        optimizer = HAPG([w], lr=0.1, penalty=SparseGroupLasso(strength, 0.5, Groups.along(0)))
        for _ in range(300):
            optimizer.zero_grad()
            ((x @ w.T - y) ** 2).mean().backward()
            optimizer.step()
        return 18 - sparsity_report(optimizer).zeros

    w = nn.Parameter(torch.zeros(3, 6, dtype=torch.float64))
    ((x @ w.T - y) ** 2).mean().backward()
    edge = max_strength([w], penalty)
    assert edge == max_strength(HAPG([w], penalty=penalty)) == max_strength(nn.ParameterList([w]), penalty)
    assert survivors(1.001 * edge) == 0 < survivors(0.95 * edge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_max_strength_zeroes_every_gradient_in_its_dtype(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    penalty = SparseGroupLasso(1.0, 0.5, Groups.along(0))
    for layer in net:
        layer.weight.grad = torch.randn_like(layer.weight)
    edge = max_strength(net, penalty)
    assert not any(penalty.with_strength(edge).prox(layer.weight.grad).any() for layer in net)
    lower = penalty.with_strength(edge * (1 - 8 * torch.finfo(dtype).eps))
    assert any(lower.prox(layer.weight.grad).any() for layer in net)


def test_max_strength_needs_gradients_and_a_penalty():
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"penalised parameter with a gradient, got none: call loss.backward\(\) first"):
        max_strength(net, L1(1.0))
    with pytest.raises(TypeError, match="penalty must be a penalty of proxopt, got None"):
        max_strength(net)
    with pytest.raises(ValueError, match="penalty must be None for an optimizer"):
        max_strength(HAPG(net.parameters(), penalty=L1(1.0)), L1(1.0))
    net.weight.grad = torch.full((2, 3), torch.nan)
    with pytest.raises(ValueError, match="finite"):
        max_strength(net, L1(1.0))
