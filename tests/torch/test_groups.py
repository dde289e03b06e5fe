"""Param groups from modules, sparsity reports and the largest useful strength."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, SparseGroupLasso
from proxopt_torch import HAPG, ProxAdam, ProxSGD, groups, max_strength, sparsity_report

pytestmark = pytest.mark.filterwarnings("ignore:joint=True assumes")


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


def test_a_joint_channel_includes_its_bias_and_batch_norm():
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
def test_an_attention_head_is_one_group_of_all_its_weights(options):
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


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def pair(change=None, first=None):
    net = nn.Sequential(first or nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    if change is not None:
        change(net)
    return net


def as_buffer(module, key):
    value = getattr(module, key).detach().clone()
    delattr(module, key)
    module.register_buffer(key, value)


def as_plain_tensor(module, key):
    value = getattr(module, key).detach().clone()
    delattr(module, key)
    setattr(module, key, value)


REMOVE = "leave this layer out, or call torch.nn.utils.parametrize.remove_parametrizations first"
NO_PARAMETER = {  # changes of the first layer, and the error message about its weight
    "weight_norm": (lambda m: nn.utils.weight_norm(m), "computed by weight_norm: leave this layer out, or call torch.nn.utils"),
    "spectral_norm": (lambda m: nn.utils.spectral_norm(m), "computed by spectral_norm: leave this layer out, or call torch.nn"),
    "new weight_norm": (parametrizations.weight_norm, f"computed by a parametrization (_WeightNorm): {REMOVE}"),
    "new spectral_norm": (parametrizations.spectral_norm, f"computed by a parametrization (_SpectralNorm): {REMOVE}"),
    "orthogonal": (parametrizations.orthogonal, f"computed by a parametrization (_Orthogonal): {REMOVE}"),
    "own": (
        lambda m: parametrize.register_parametrization(m, "weight", Double()),
        f"computed by a parametrization (Double): {REMOVE}",
    ),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "masked by pruning: leave this layer out, or call torch.nn"),
    "buffer": (lambda m: as_buffer(m, "weight"), "a buffer: leave this layer out, or assign an nn.Parameter"),
    "plain tensor": (lambda m: as_plain_tensor(m, "weight"), "a plain tensor: leave this layer out, or assign an nn.Parameter"),
    "missing": (lambda m: m.register_parameter("weight", None), "missing: leave this layer out, or assign an nn.Parameter"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", NO_PARAMETER)
def test_a_weight_that_is_no_parameter_is_named(kind):
    change, reason = NO_PARAMETER[kind]
    message = re.escape(f"0.weight must be a parameter, but is {reason}")
    net = pair(lambda m: change(m[0]))
    for build in (groups.output_channels, groups.input_features):
        with pytest.raises(ValueError, match=message):
            build(net, GroupL2(1.0))
        assert names(build(net, GroupL2(1.0), exclude="0"))[0] == ["2.weight"]
    with pytest.raises(ValueError, match=message):
        groups.output_channels(net, GroupL2(1.0), joint=True)
    if kind in ("pruned", "buffer", "plain tensor", "missing"):  # zero parameters give a zero weight, or no weight is computed
        assert every_parameter_once(net, groups.modules(net, GroupL2(1.0), "0"))
    else:
        with pytest.raises(ValueError, match=message):
            groups.modules(net, GroupL2(1.0), "0")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: parametrize.register_parametrization(m[0], "bias", Double()), "0.bias"),
        (lambda m: prune.l1_unstructured(m[0], "bias", 0.5), "0.bias"),
        (lambda m: as_buffer(m[0], "bias"), "0.bias"),
        (lambda m: parametrize.register_parametrization(m[1], "weight", Double()), "1.weight"),
        (lambda m: as_buffer(m[1], "bias"), "1.bias"),
    ],
)
def test_a_joint_channel_consists_of_parameters(change, name):
    net = pair(change)
    with pytest.raises(ValueError, match=f"{name} must be a parameter, but is "):
        groups.output_channels(net, GroupL2(1.0), joint=True)
    assert every_parameter_once(net, groups.output_channels(net, GroupL2(1.0)))


def test_an_excluded_parametrized_layer_is_updated_without_penalty():
    net = pair(lambda m: parametrizations.weight_norm(m[2]))
    found = groups.output_channels(net, GroupL2(1e4), exclude="2", joint=True)
    assert every_parameter_once(net, found) and names(found)[0] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    optimizer = ProxAdam(found, lr=0.1)
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert not bool(net[0].weight.any()) and bool(net[2].weight.any())


def test_a_layer_may_have_submodules():
    first = nn.Linear(4, 4)
    first.fake_quantize = nn.Identity()  # as layers of quantization-aware training do
    found = groups.output_channels(pair(first=first), GroupL2(1.0), joint=True)
    assert names(found)[0] == ["0.weight", "0.bias", "1.weight", "1.bias"]


NORMS = {
    "BatchNorm1d": (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LazyBatchNorm1d()),
    "BatchNorm2d": (nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.LazyBatchNorm2d()),
    "BatchNorm3d": (nn.ConvTranspose3d(4, 8, 1), nn.BatchNorm3d(8), nn.LazyBatchNorm3d()),
    "SyncBatchNorm": (nn.Conv2d(4, 8, 1), nn.SyncBatchNorm(8), None),
    "InstanceNorm1d": (nn.Conv1d(4, 8, 1), nn.InstanceNorm1d(8, affine=True), nn.LazyInstanceNorm1d(affine=True)),
    "InstanceNorm2d": (nn.Conv2d(4, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.LazyInstanceNorm2d(affine=True)),
    "InstanceNorm3d": (nn.Conv3d(4, 8, 1), nn.InstanceNorm3d(8, affine=True), nn.LazyInstanceNorm3d(affine=True)),
}
ACROSS_CHANNELS = [nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.LocalResponseNorm(2), nn.InstanceNorm1d(8)]


@pytest.mark.parametrize("kind", NORMS)
def test_a_joint_channel_includes_every_norm_that_treats_channels_alone(kind):
    layer, norm, lazy = NORMS[kind]
    found = groups.output_channels(nn.Sequential(layer, norm), GroupL2(1.0), joint=True)
    assert names(found)[0] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    if lazy is not None:
        with pytest.raises(ValueError, match=r"1\.weight must have a shape, but is of a lazy layer"):
            groups.output_channels(nn.Sequential(layer, lazy), GroupL2(1.0), joint=True)


@pytest.mark.parametrize("norm", ACROSS_CHANNELS, ids=lambda norm: type(norm).__name__)
def test_a_norm_over_channels_or_without_weights_is_in_no_joint_channel(norm):
    found = groups.output_channels(nn.Sequential(nn.Linear(4, 8), norm), GroupL2(1.0), joint=True)
    assert names(found)[0] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("key", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_attention_heads_need_parameters(key):
    model = Attention()
    owner = model.get_submodule("attention." + key.rpartition(".")[0] if "." in key else "attention")
    parametrize.register_parametrization(owner, key.rpartition(".")[2], Double())
    with pytest.raises(ValueError, match=re.escape(f"attention.{key} must be a parameter, but is computed by a parametrization")):
        groups.attention_heads(model, GroupL2(1.0))


@pytest.mark.parametrize("layer", [lambda: nn.LazyLinear(4), lambda: nn.LazyConv1d(4, 1), lambda: nn.LazyConvTranspose2d(4, 1)])
def test_a_lazy_layer_needs_a_forward_pass_first(layer):
    for build in (groups.output_channels, groups.input_features):
        with pytest.raises(
            ValueError, match=r"0\.weight must have a shape, but is of a lazy layer: run one forward pass of the model"
        ):
            build(nn.Sequential(layer()), GroupL2(1.0))


def test_lazy_layers_are_accepted_after_one_forward_pass():
    net = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    assert every_parameter_once(net, groups.output_channels(net, GroupL2(1.0), include="0"))
    with pytest.raises(ValueError, match=r"1\.weight must have a shape, but is of a lazy layer"):
        groups.output_channels(net, GroupL2(1.0), include="0", joint=True)
    optimizer = ProxAdam(groups.modules(net, GroupL2(1e4), "2"), lr=0.1)  # a group of whole modules needs no shape
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert not any(bool(p.any()) for p in net[2].parameters())
    assert names(groups.output_channels(net, GroupL2(1.0), include="0", joint=True))[0][2:] == ["1.weight", "1.bias"]


def test_a_partly_frozen_channel_is_refused():
    net = pair(lambda m: m[1].requires_grad_(False))
    message = (
        r"1\.weight must require grad like the rest of its group \(0\.weight, 0\.bias, 1\.weight, 1\.bias\), which is updated as"
    )
    with pytest.raises(ValueError, match=message):
        groups.output_channels(net, GroupL2(1.0), joint=True)
    assert names(groups.output_channels(net, GroupL2(1.0), joint=True, exclude="0"))[0] == ["2.weight", "2.bias"]
    net[0].requires_grad_(False)
    before = net[0].weight.detach().clone()
    optimizer = ProxSGD(groups.output_channels(net, GroupL2(1e4), joint=True), lr=0.1)
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(net[0].weight, before) and not bool(net[2].weight.any())


def test_a_tied_weight_is_in_one_channel_only():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(
        ValueError, match=r"0\.weight must be in one group, but is in that of 0\.weight already: leave one of the layers"
    ):
        groups.output_channels(net, GroupL2(1.0), joint=True)
    assert names(groups.output_channels(net, GroupL2(1.0), joint=True, exclude="1")) == [["0.weight", "0.bias"], ["1.bias"]]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_and_those_on_the_meta_device_have_groups_too():
    for net in (nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 0)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to("meta")):
        for found in (
            groups.output_channels(net, GroupL2(1.0)),
            groups.output_channels(net, GroupL2(1.0), joint=True),
            groups.input_features(net, SparseGroupLasso(1.0)),
            groups.modules(net, GroupL2(1.0), "0"),
        ):
            assert every_parameter_once(net, found)
            optimizer = ProxAdam(found)
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            if not p.is_meta:
                optimizer.step()


def test_quantized_layers_and_modules_without_parameters_are_named():
    quantized = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    with pytest.raises(
        ValueError, match="got none in Sequential; a quantized layer holds no parameters, build the groups before"
    ):
        groups.output_channels(nn.Sequential(quantized()), GroupL2(1.0))
    net = nn.Sequential(quantized(), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=re.escape("got '1', a torch.nn.modules.activation.ReLU; there are '2'")):
        groups.output_channels(net, GroupL2(1.0), include=["1", "2"])
    with pytest.raises(ValueError, match="include must name modules that have parameters, got '0', '1'"):
        groups.modules(net, GroupL2(1.0), ["0", "1"])


def test_a_misspelt_name_gets_a_suggestion():
    net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="got 'encodr'; did you mean 'encoder'"):
        groups.output_channels(net, GroupL2(1.0), include="encodr")


def test_a_hierarchy_gets_the_groups_in_its_outermost_level():
    first, *_ = groups.output_channels(convnet(), Nested(L1(1.0), GroupL2(1.0)))
    assert first["penalty"].penalties[0] == L1(1.0) and first["penalty"].groups.kind == "along"


def test_an_object_that_is_no_penalty_is_named():
    with pytest.raises(TypeError, match=r"penalty must be a penalty \(an object with value and prox\) or None, got 1.0"):
        groups.output_channels(convnet(), 1.0)


def test_a_report_counts_zeros_and_nonzero_groups():
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
    with pytest.raises(TypeError, match=r"penalty must be a proxopt\.Penalty, got None"):
        max_strength(net)
    with pytest.raises(ValueError, match="penalty must be None for an optimizer"):
        max_strength(HAPG(net.parameters(), penalty=L1(1.0)), L1(1.0))
    net.weight.grad = torch.full((2, 3), torch.nan)
    with pytest.raises(ValueError, match="finite"):
        max_strength(net, L1(1.0))
