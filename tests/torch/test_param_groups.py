"""ParamGroups: sums, and the table that is printed before training."""

import copy
import pickle

import pytest
import torch
from torch import nn

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, ProxSGD, groups


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def names(found):
    return [[name for name, _ in group["params"]] for group in found]


def occurrences(found):
    return sorted(id(p) for group in found for _, p in group["params"])


def test_a_sum_penalises_both_and_holds_every_parameter_once():
    model = net()
    a, b = (groups.output_channels(model, GroupL2(strength), layer) for strength, layer in ((1e-3, "0"), (1e-2, "2")))
    found = a + b
    assert isinstance(found, groups.ParamGroups)
    assert names(found) == [["0.weight"], ["2.weight"], ["0.bias", "2.bias", "4.weight", "4.bias"]]
    assert occurrences(found) == sorted(map(id, model.parameters()))
    assert [group["penalty"].strength for group in found[:2]] == [1e-3, 1e-2] and "penalty" not in found[2]
    assert names(a) == [["0.weight"], ["0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]]  # the summands are unchanged


def test_a_sum_is_associative_and_in_place():
    model = net()
    a, b, c = (groups.output_channels(model, GroupL2(1.0), layer) for layer in ("0", "2", "4"))
    assert names((a + b) + c) == names(a + (b + c)) == [["0.weight"], ["2.weight"], ["4.weight"], ["0.bias", "2.bias", "4.bias"]]
    found = a
    found += b
    assert names(found) == names(a + b) and len(a) == 2


def test_a_parameter_that_both_summands_penalise_is_named():
    model = net()
    with pytest.raises(ValueError, match=r"2\.weight must be penalised by one of the summands of \+, but is by both"):
        groups.output_channels(model, GroupL2(1.0)) + groups.input_features(model, GroupL2(1.0), "2")


def test_a_plain_list_of_param_groups_can_be_added_on_either_side():
    model, loss = net(), nn.Linear(2, 2)
    found = groups.output_channels(model, GroupL2(1.0), "0")
    extra = [{"params": [("loss.weight", loss.weight)], "lr": 0.5}, {"params": [("0.bias", model[0].bias)], "penalty": L1(1.0)}]
    for total in (found + extra, extra + found):
        assert isinstance(total, groups.ParamGroups)
        assert occurrences(total) == sorted(map(id, [*model.parameters(), loss.weight]))
        assert [group["lr"] for group in total if "lr" in group] == [0.5]
        ProxAdam(total)
    with pytest.raises(TypeError):
        found + 1


def test_options_of_the_unpenalised_groups_are_kept():
    model = net()
    a, b = groups.output_channels(model, GroupL2(1.0), "0"), groups.output_channels(model, GroupL2(1.0), "2")
    a[-1]["weight_decay"] = 0.1
    found = a + b
    assert found[-1]["weight_decay"] == 0.1 and names(found)[-1] == ["0.bias", "2.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize("make", [ProxAdam, AdamHAPG, HAPG, lambda g: ProxSGD(g, lr=0.1)])
def test_the_groups_are_a_list_for_every_optimizer_and_print_before_and_after(make):
    found = groups.output_channels(net(), GroupL2(1e-3), "0") + groups.input_features(net(), SparseGroupLasso(1e-3), "2")
    before = str(found)
    make(found)
    assert str(found) == before


def test_copies_and_pickles_keep_their_table():
    found = groups.output_channels(net(), GroupL2(1e-3))
    assert str(copy.deepcopy(found)) == str(pickle.loads(pickle.dumps(found))) == str(found)
    assert isinstance(copy.copy(found), groups.ParamGroups)


def test_the_table_shows_kind_counts_sizes_weights_and_shares():
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    text = str(
        groups.output_channels(model, GroupL2(1e-3), "0") + groups.input_features(model, GroupL2(1e-2, weights="none"), "2")
    )
    head, first, second, total, rest = (line.split("  ") for line in text.splitlines())
    assert [c.strip() for c in head if c] == ["kind", "layer", "tensors", "groups", "entries", "weight", "strength", "share"]
    a, b = 1e-3 * 4 * 6, 1e-2 * 4 * 2
    shares = [f"{100 * v / (a + b):.1f}%" for v in (a, b)]
    assert [c.strip() for c in first if c] == ["output channels", "0", "1", "4", "6", "2.45", "0.001", shares[0]]
    assert [c.strip() for c in second if c] == ["input features", "2", "1", "4", "4", "1", "0.01", shares[1]]
    assert [c.strip() for c in total if c] == ["total", "2", "8", "100.0%"]
    assert rest == ["without penalty: 18 entries in 0.bias, 2.bias, 4.weight, 4.bias"]


def test_a_table_of_a_model_without_numbers_or_groups():
    text = str(groups.output_channels(net().to("meta"), GroupL2(1e-3)))
    assert "%" not in text and "0.bias" in text
    text = str(groups.output_channels(net(), L1(1e-3), "0"))
    assert text.splitlines()[1].split()[-2:] == ["0.001", "100.0%"]
    plain = groups.ParamGroups([{"params": list(net().parameters()), "penalty": GroupL2(1.0, Groups.whole())}])
    assert len(str(plain).splitlines()) == 8 and str(groups.ParamGroups()) == ""
    assert str(groups.ParamGroups([{"params": [nn.Parameter(torch.ones(3))]}])) == "without penalty: 3 entries in 3"


def test_a_joint_guess_warns_and_points_to_coupled():
    with pytest.warns(UserWarning, match=r"groups\.coupled\(model, example_inputs, penalty\) follows the data"):
        groups.output_channels(net(), GroupL2(1.0), joint=True)
