"""Which parameter belongs to which joint problem, on results of the analysis that are written by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from proxopt import L1, ElasticNet, GroupL2, Nested, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD, StrengthPath, max_strength, sparsity_report
from proxopt_torch.dependencies import Dependencies, Family
from proxopt_torch.groups.coupling import _check_penalty, from_dependencies


class Residual(nn.Module):
    """A stem, one block around which the stream is added, and a classifier."""

    def __init__(self, stream=4, inner=3):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, stream, 3, padding=1), nn.BatchNorm2d(stream)
        self.conv1, self.bn1 = nn.Conv2d(stream, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, stream, 3, padding=1), nn.BatchNorm2d(stream)
        self.fc = nn.Linear(stream, 2)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.fc(x.mean((2, 3)))


STREAM, INNER, CLASSES = np.array([40, 41, 42, 43]), np.array([7, 5, 6]), np.array([90, 91])


def by_hand(kept=None):
    """What the analysis finds in ``Residual``; units are numbered arbitrarily."""
    places, roles = {}, {}
    for name, out, read in (("stem", STREAM, None), ("conv1", INNER, STREAM), ("conv2", STREAM, INNER), ("fc", CLASSES, STREAM)):
        places[f"{name}.weight"] = (out, read) + ((None, None) if name != "fc" else ())
        places[f"{name}.bias"] = (out,)
        roles |= {(f"{name}.weight", 0): "computes", (f"{name}.weight", 1): "reads", (f"{name}.bias", 0): "computes"}
    for name, units in (("bn", STREAM), ("bn1", INNER), ("bn2", STREAM)):
        for key in ("weight", "bias", "running_mean", "running_var"):
            places[f"{name}.{key}"], roles[(f"{name}.{key}", 0)] = (units,), "scales"
    families = [Family("channels", "stem", STREAM), Family("hidden units", "conv1", INNER)]
    families.append(Family("channels", "fc", CLASSES, reason="outputs of the model"))
    return Dependencies(
        places, roles, dict(kept or {}) | {90: "outputs of the model", 91: "outputs of the model"}, families, [], {}
    )


def names(found):
    return [[name for name, _ in group["params"]] for group in found]


def every_parameter_once(model, found):
    return sorted(id(p) for g in found for _, p in g["params"]) == sorted(map(id, model.parameters()))


IN_STREAM = [
    "stem.weight",
    "stem.bias",
    "bn.weight",
    "bn.bias",
    "conv2.weight",
    "conv2.bias",
    "bn2.weight",
    "bn2.bias",
    "fc.weight",
]
IN_BLOCK = ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"]


def test_a_weight_belongs_to_what_it_computes_else_to_what_it_reads():
    model = Residual()
    found = from_dependencies(model, by_hand(), GroupL2(1e-3))
    assert names(found) == [IN_STREAM, IN_BLOCK, ["fc.bias"]] and every_parameter_once(model, found)
    assert [g.get("joint") for g in found] == [True, True, None]
    axes = dict(zip(names(found)[0], found[0]["penalty"].groups.axis))
    assert axes.pop("fc.weight") == 1 and set(axes.values()) == {0}
    assert found[0]["penalty"].groups.count([p for _, p in found[0]["params"]]) == 4


def test_a_weight_whose_outputs_stay_belongs_to_its_inputs():
    model = Residual()
    pinned = by_hand()
    pinned.families[0] = Family("channels", "stem", STREAM, reason="mixed by a norm")
    found = from_dependencies(model, pinned, GroupL2(1e-3))
    assert names(found)[0] == ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "conv2.weight"]
    assert found[0]["penalty"].groups.axis == (0, 0, 0, 0, 1) and every_parameter_once(model, found)
    assert "4 channels of stem: mixed by a norm" in str(found)


@pytest.mark.parametrize("penalty", [GroupL2(0.7), SparseGroupLasso(0.7, 0.3), GroupL2(0.4, weights="none")])
def test_the_joint_prox_is_that_of_the_groups_taken_by_hand(penalty):
    torch.manual_seed(0)
    model = Residual()
    found = from_dependencies(model, by_hand(), penalty)
    values = [p.detach().clone() for _, p in found[0]["params"]]
    result = found[0]["penalty"].prox(values, 0.5)
    for unit in range(4):
        rows = [v[:, unit] if name == "fc.weight" else v[unit] for name, v in zip(IN_STREAM, values)]
        alone = penalty.prox(torch.cat([r.reshape(-1) for r in rows]), 0.5)
        ours = [v[:, unit] if name == "fc.weight" else v[unit] for name, v in zip(IN_STREAM, result)]
        torch.testing.assert_close(torch.cat([r.reshape(-1) for r in ours]), alone)


def test_groups_do_not_depend_on_how_units_are_numbered():
    model = Residual()
    other = by_hand()
    renamed = {old: new for new, old in enumerate(reversed([*STREAM, *INNER, *CLASSES]))}
    other.places = {
        n: tuple(None if u is None else np.array([renamed[i] for i in u]) for u in d) for n, d in other.places.items()
    }
    other.kept = {renamed[u]: reason for u, reason in other.kept.items()}
    for family in other.families:
        family.units = np.array([renamed[u] for u in family.units])
    first, second = (from_dependencies(model, d, GroupL2(1.0)) for d in (by_hand(), other))
    assert [g.get("penalty") for g in first] == [g.get("penalty") for g in second]


def test_problems_that_share_a_parameter_are_one():
    model = Residual()
    joined = by_hand()
    joined.places["conv1.bias"] = (np.array([40, 5, 6]),)  # one parameter with units of both families
    found = from_dependencies(model, joined, GroupL2(1e-3))
    assert sorted(names(found)[0]) == sorted(IN_STREAM + IN_BLOCK) and every_parameter_once(model, found)
    assert str(found).splitlines()[1].startswith("channels and hidden units  stem, conv1       13       7")


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        ("channels", None, [IN_STREAM]),
        ("hidden units", None, [IN_BLOCK]),
        (None, "channels", [IN_BLOCK]),
        ("conv1", None, [IN_BLOCK]),
        ("conv2", None, [IN_STREAM]),
        (["conv1", "bn2"], None, [IN_STREAM, IN_BLOCK]),
        (nn.Conv2d, None, [IN_STREAM, IN_BLOCK]),
        (None, "bn1", [IN_STREAM]),
        (None, "fc", [[n for n in IN_STREAM if n != "fc.weight"], IN_BLOCK]),
        (None, nn.Linear, [[n for n in IN_STREAM if n != "fc.weight"], IN_BLOCK]),
    ],
)
def test_units_are_selected_by_layers_that_compute_them_and_by_kind(include, exclude, wanted):
    model = Residual()
    found = from_dependencies(model, by_hand(), GroupL2(1e-3), include, exclude)
    assert names(found)[:-1] == wanted and every_parameter_once(model, found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "conv7"}, "include must name layers of the model, got 'conv7'; did you mean 'conv"),
        ({"exclude": nn.LSTM}, "exclude must name layers of the model, got <class"),
        ({"include": "attention heads"}, "include must name kinds of units in the model, got 'attention heads'; there are"),
        ({"include": "fc"}, "got none to penalise in Residual .*2 channels of fc: outputs of the model"),
        ({"exclude": "*"}, r"got none to penalise in Residual \(4 channels of stem: excluded; 3 hidden units of conv1: excluded"),
        ({"penalty": GroupL2(1.0, weights=np.ones(4))}, "weights of the penalty must be a rule"),
    ],
)
def test_a_wrong_choice_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        _check_penalty(arguments.get("penalty", GroupL2(1.0)))
        from_dependencies(Residual(), by_hand(), **{"penalty": GroupL2(1.0)} | arguments)


def test_selections_of_one_model_add_up_to_the_whole():
    model = Residual()
    parts = [from_dependencies(model, by_hand(), GroupL2(s), include) for s, include in ((1e-3, "channels"), (1e-2, "conv1"))]
    assert "not included" in str(parts[0])
    found = parts[0] + parts[1]
    assert names(found) == [IN_STREAM, IN_BLOCK, ["fc.bias"]]
    assert [g["penalty"].strength for g in found[:-1]] == [1e-3, 1e-2]
    assert "not included" not in str(found) and "2 channels of fc: outputs of the model" in str(found)


def test_what_training_cannot_zero_is_left_out_with_its_reason():
    model = Residual()
    model.conv1.weight.requires_grad_(False)
    found = from_dependencies(model, by_hand(), GroupL2(1.0))
    assert names(found)[0] == IN_STREAM and "3 hidden units of conv1: conv1.weight is frozen" in str(found)
    model = Residual()
    model.bn.requires_grad_(False)  # its output is constant for a zeroed channel all the same
    assert names(from_dependencies(model, by_hand(), GroupL2(1.0)))[0] == [n for n in IN_STREAM if not n.startswith("bn.")]


def test_units_that_a_buffer_computes_are_left_out_where_it_is_not_zero():
    model = Residual()
    model.register_buffer("position", torch.tensor([[0.0, 1.0, 2.0, 0.0]] * 2))
    hand = by_hand()
    hand.places["position"], hand.roles[("position", 1)] = (None, STREAM), "computes"
    found = from_dependencies(model, hand, GroupL2(1.0))
    assert "2 channels of stem: position is a buffer, which is not trained" in str(found)
    assert str(found).splitlines()[1].split()[:4] == ["channels", "stem", "9", "2"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [nn.utils.weight_norm, parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_is_computed_from_others_is_left_out(change):
    model = Residual()
    change(model.conv1)
    hand = by_hand()
    computed = [n for n, _ in model.named_parameters() if n.startswith("conv1.") and n != "conv1.bias"]
    for name in computed:
        hand.places[name], hand.roles[(name, 0)] = (INNER, *[None] * 3), "computes"
    found = from_dependencies(model, hand, GroupL2(1.0))
    assert names(found)[0] == IN_STREAM
    assert "3 hidden units of conv1: conv1.weight is computed by" in str(found) and "call torch.nn.utils" in str(found)


def test_a_pruned_weight_is_penalised():
    model = Residual()
    prune.l1_unstructured(model.conv1, "weight", 0.5)
    hand = by_hand()
    hand.places["conv1.weight_orig"] = hand.places.pop("conv1.weight")
    hand.roles |= {("conv1.weight_orig", 0): "computes", ("conv1.weight_orig", 1): "reads"}
    assert "conv1.weight_orig" in names(from_dependencies(model, hand, GroupL2(1.0)))[1]


KEPT = {40: "read by a layer that mixes", 42: "read by a layer that mixes"}


@pytest.mark.parametrize("rule", ["sqrt_size", "none"])
def test_units_that_stay_inside_a_parameter_have_the_weight_zero(rule):
    torch.manual_seed(0)
    model = Residual()
    found = from_dependencies(model, by_hand(KEPT), GroupL2(1e3, weights=rule))
    assert names(found) == [IN_STREAM, IN_BLOCK, ["fc.bias"]]
    values = [p.detach() for _, p in found[0]["params"]]
    result = dict(zip(IN_STREAM, found[0]["penalty"].prox(values, 1.0)))
    for name, before in zip(IN_STREAM, values):
        after = result[name] if name != "fc.weight" else result[name].T
        before = before if name != "fc.weight" else before.T
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and not after[[1, 3]].any()
    reference = from_dependencies(model, by_hand(), GroupL2(1e3, weights=rule))[0]["penalty"]
    size = sum(v.numel() for v in values) / 4
    assert reference.groups.weights(values, rule) == pytest.approx(size**0.5 if rule == "sqrt_size" else 1.0)
    line = str(found).splitlines()[1].split()
    assert line[3] == "2" and float(line[5]) == pytest.approx(size**0.5 if rule == "sqrt_size" else 1.0, rel=1e-2)


@pytest.mark.parametrize("penalty", [SparseGroupLasso(1e3), L1(1e3), Nested(L1(1.0), GroupL2(1e3)), ElasticNet(1e3)])
def test_a_penalty_of_entries_leaves_out_a_parameter_of_which_a_part_stays(penalty):
    model = Residual()
    found = from_dependencies(model, by_hand(KEPT), penalty)
    assert names(found)[0] == IN_BLOCK and every_parameter_once(model, found)
    assert "2 channels of stem: this penalty cannot leave out a part of stem." in str(found)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: ProxSGD(g, lr=0.1),
        lambda g: ProxAdam(g, lr=0.1),
        lambda g: AdamHAPG(g, lr=0.1),
        lambda g: HAPG(g, lr=0.1),
        lambda g: Proximal(torch.optim.SGD(g, lr=0.1)),
    ],
)
@pytest.mark.parametrize("kept", [{}, KEPT])
def test_every_optimizer_zeroes_the_groups_and_resumes_from_a_checkpoint(make, kept):
    torch.manual_seed(0)
    model = Residual()
    optimizer = make(from_dependencies(model, by_hand(kept), GroupL2(1.0)))
    path = StrengthPath(optimizer, lambda epoch: 1e4 * epoch)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        path.step()
    row, block, _ = sparsity_report(optimizer).rows
    free = 1 if kept else 0  # the group of weight 0 is not penalised
    assert (row.groups, row.living, block.groups, block.living) == ((3 if kept else 4), free, 3, 0)
    other = make(from_dependencies(model, by_hand(kept), GroupL2(1.0)))
    other.load_state_dict(optimizer.state_dict())
    assert [g["strength"] for g in other.param_groups] == [g["strength"] for g in optimizer.param_groups]


@pytest.mark.parametrize("kept", [{}, KEPT])
def test_the_largest_useful_strength_zeroes_all_units_that_are_penalised(kept):
    torch.manual_seed(0)
    model = Residual().double()
    optimizer = HAPG(from_dependencies(model, by_hand(kept), GroupL2(1.0)))
    model(torch.randn(4, 3, 5, 5, dtype=torch.float64)).square().sum().backward()
    edge = max_strength(optimizer)

    def survivors(strength):
        found = from_dependencies(model, by_hand(kept), GroupL2(strength))
        proxes = [g["penalty"].prox([p.grad for _, p in g["params"]]) for g in found[:-1]]
        return sum(g["penalty"].groups.norms(p).count_nonzero().item() for g, p in zip(found, proxes))

    least = 1 if kept else 0
    assert survivors(edge) == least < survivors(0.99 * edge)
