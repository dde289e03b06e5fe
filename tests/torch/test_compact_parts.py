"""The parts of compact: smaller attention, sizes in code, fresh inputs, loading, and optimizer state."""

import copy
import io
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_torch import AdamHAPG, ProxAdam, Proximal
from proxopt_torch.compaction import attention, integers, layers, optimizers, slicing, verification

HEADS = [0, 1, 2, 3, 8, 9, 10, 11]  # what remains of three heads of size 4 without the second


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def with_a_zeroed_head(**options):
    layer = nn.MultiheadAttention(12, 3, **options).eval()
    with torch.no_grad():
        layer.out_proj.weight[:, 4:8] = 0
    return layer


def sliced(layer):
    """A copy whose tensors have lost the second head."""
    layer, rows = copy.deepcopy(layer), torch.tensor(HEADS)
    take = lambda t, axis, index: nn.Parameter(t.detach().index_select(axis, index))
    for key in ("in_proj_weight", "in_proj_bias"):
        if getattr(layer, key) is not None:
            setattr(layer, key, take(getattr(layer, key), 0, torch.cat([rows, rows + 12, rows + 24])))
    for key in attention.SEPARATE:
        if getattr(layer, key) is not None:
            setattr(layer, key, take(getattr(layer, key), 0, rows))
    for key in ("bias_k", "bias_v"):
        if getattr(layer, key) is not None:
            setattr(layer, key, take(getattr(layer, key), 2, rows))
    layer.out_proj.weight = take(layer.out_proj.weight, 1, rows)
    return layer


OPTIONS = list(itertools.product((True, False), (True, False), (None, 5), (True, False), (True, False)))


@pytest.mark.parametrize("batch_first, bias, keys, add_bias_kv, add_zero_attn", OPTIONS)
def test_smaller_attention_computes_the_same(batch_first, bias, keys, add_bias_kv, add_zero_attn):
    torch.manual_seed(0)
    layer = with_a_zeroed_head(
        bias=bias, kdim=keys, vdim=keys, batch_first=batch_first, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn
    )
    small = attention.smaller(sliced(layer))
    length, batch = (5, 4) if batch_first else (4, 5)
    q, k = torch.randn(4, 5, 12), torch.randn((4, 6, keys or 12) if batch_first else (6, 5, keys or 12))
    padding = torch.zeros(batch, 6, dtype=torch.bool)
    padding[0, 3:] = True
    mask = torch.zeros(length, 6, dtype=torch.bool).triu(2)
    assert set(small.state_dict()) == set(layer.state_dict())
    for module in (small, copy.deepcopy(pickled(small))):
        assert (bool(module.batch_first), bool(module._qkv_same_embed_dim)) == (batch_first, False)
        for more in ({}, {"need_weights": False}, {"key_padding_mask": padding}, {"attn_mask": mask, "need_weights": False}):
            torch.testing.assert_close(module(q, k, k, **more)[0], layer(q, k, k, **more)[0])
        torch.testing.assert_close(module(q[0], k[0], k[0])[0], layer(q[0], k[0], k[0])[0])  # sequences without batch
        assert module(q, k, k, average_attn_weights=False)[1].shape[1] == 2


@pytest.mark.parametrize("batch_first, norm_first, bias", list(itertools.product((True, False), repeat=3)))
def test_an_encoder_with_smaller_attention_runs_trains_and_is_copied(batch_first, norm_first, bias):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=batch_first, norm_first=norm_first, bias=bias)
    net = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    with torch.no_grad():
        net.layers[0].self_attn.out_proj.weight[:, 4:8] = 0
    small = copy.deepcopy(net)
    small.layers[0].self_attn = attention.smaller(sliced(small.layers[0].self_attn))
    small = copy.deepcopy(pickled(small))
    x, mask = torch.randn(4, 5, 12), nn.Transformer.generate_square_subsequent_mask(5 if batch_first else 4)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x))
        torch.testing.assert_close(small(x, mask=mask, is_causal=True), net(x, mask=mask, is_causal=True))
    for mode in (True, False):
        small.train(mode)
        assert torch.equal(small(x), small(x)) != mode  # dropout while training, also after a copy and a pickle
    small.train()
    small(x).sum().backward()
    assert small.layers[0].self_attn.in_proj_weight.grad.shape == (24, 12)


@dataclass
class Config:
    heads: int = 4
    depth: int = 2


class Splits(nn.Module):
    """Its code reads the number of heads from a configuration, and the inner size from a tuple."""

    def __init__(self, config):
        super().__init__()
        self.config, self.shape, self.depth = config, (4, 12), 4
        self.fc, self.out = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.fc(x).view(len(x), self.config.heads, 3).flip(1)
        return self.out(x.reshape(len(x), self.shape[1]))


def test_integers_of_code_are_found_and_set_in_copies_of_what_holds_them():
    config = Config()
    net = nn.Sequential(Splits(config), Splits(config))
    assert dict(integers.integers(net[0])) == {
        ("config", "heads"): 4,
        ("config", "depth"): 2,
        ("shape", 0): 4,
        ("shape", 1): 12,
        ("depth",): 4,
    }
    changed = [integers.Changed("0", net[0], {4: [3], 12: [9]})]
    choices = integers.Choices(changed)
    seen = set()
    while True:
        sizes = choices.apply()
        seen.add(tuple(sorted(sizes.items())))
        if sizes == {"0.config.heads": 3, "0.shape.1": 9}:
            break
        assert choices.advance([net[0]])
    assert net[0].config.heads == 3 and net[0].shape == (4, 9) and net[0].depth == 4
    assert net[1].config.heads == 4 and config.heads == 4
    assert () in seen
    for module, path, number in integers.located(net, {"1.config.heads": 2, "1.shape.0": 7}):
        integers.assign(module, path, number)
    assert net[1].config.heads == 2 and net[1].shape == (7, 12) and config.heads == 4


def test_the_search_goes_on_in_other_classes_and_from_where_the_model_got_furthest():
    class Inner(Splits):
        pass

    outer, inner = Splits(Config()), Inner(Config())
    choices = integers.Choices([integers.Changed("a", outer, {4: [3]}), integers.Changed("b", inner, {12: [9]})])
    assert choices.apply() == {}
    tried = []
    while choices.advance([inner, outer], (0, int("b.shape.1" in choices.apply()))):
        tried.append(choices.apply())
    assert tried[:2] == [{"b.shape.1": 9}, {"b.shape.1": 9, "a.config.heads": 3}]
    assert {"a.depth": 3} in tried and len(tried) == 15  # all but the first of 8 sets of the one, times 2 of the other
    assert not choices.advance([nn.ReLU()])


def test_an_attribute_that_has_an_old_size_by_chance_is_set_in_the_other_modules_alone():
    first, second = Splits(Config()), Splits(Config())
    choices = integers.Choices([integers.Changed("a", first, {12: [9]}), integers.Changed("b", second, {12: [8]})])
    sizes, tried = choices.apply(), 0
    while sizes != {"a.shape.1": 9}:
        assert choices.advance([second] if "a.shape.1" in sizes else [first], (0, int("a.shape.1" in sizes)))
        sizes, tried = choices.apply(), tried + 1
    assert tried == 2 and second.shape == (4, 12)


def test_integers_that_are_written_in_methods():
    assert {1, 5, 6, 12} <= integers.literals(Splits) and 7 not in integers.literals(Splits)
    assert 128 not in integers.literals(nn.Flatten)


def test_fresh_inputs_have_the_statistics_of_the_example():
    example = 3 + torch.randn(50, 40).exp()
    ((x,), _) = verification.fresh(((example,), {}), 1, torch.Generator().manual_seed(0))
    assert example.min() <= x.min() and x.max() <= example.max()
    assert abs(x.mean() - example.mean()) < 0.5 and x.std() < 1.2 * example.std()


def test_fresh_inputs_have_the_types_and_ranges_of_the_example():
    example = ((torch.zeros(2, 3), torch.randint(3, 9, (2, 40))), {"mask": torch.tensor([[True], [False]]), "scale": 2.0})
    (x, ids), more = verification.fresh(example, 1, torch.Generator().manual_seed(0))
    assert x.shape == (3, 3) and len(x.unique()) == 9  # constants are no ranges
    assert ids.shape == (3, 40) and ids.dtype == torch.int64 and ids.min() >= 3 and ids.max() <= 8
    assert more["mask"].tolist() == [[True], [False], [True]] and more["scale"] == 2.0
    additive = torch.tensor([[0.0, -torch.inf]])
    assert torch.equal(verification.fresh(((additive,), {}), 0, torch.Generator())[0][0], additive)


def test_differences_of_outputs_are_named():
    one = [torch.ones(2), torch.arange(2)]
    assert verification.difference(one, [torch.ones(2) + 1e-6, torch.arange(2)], 1e-4) == ""
    assert verification.difference(one, [torch.ones(2) * 2, torch.arange(2)], 1e-4) == "outputs that differ by 1 of 1"
    assert verification.difference(one, [torch.ones(2), torch.ones(2).long()], 1e-4) == "integer outputs that differ"
    assert verification.difference(one, one[:1], 1e-4) == "1 output tensors instead of 2"
    assert verification.difference([torch.ones(2)], [torch.ones(3)], 1e-4) == "an output of shape (3,) instead of (2,)"
    nan = [torch.tensor([torch.nan, 1.0])]
    assert verification.difference(nan, nan, 1e-4) == ""
    assert verification.difference([torch.ones(2)], nan, 1e-4) == "other outputs that are not finite"


def trained(build, steps=2):
    """A network of which two hidden units are zeroed, its optimizer, and the network without them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    optimizer = build(net)
    for _ in range(steps):
        net(torch.ones(3)).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        for state in [net[0].weight, net[0].bias]:
            state[[1, 3]] = 0
    small = copy.deepcopy(net)
    left = torch.tensor([0, 2])
    kept = {"0.weight": (left, None), "0.bias": (left,), "2.weight": (None, left)}
    slicing.cut(small, kept)
    layers.refresh(small)
    return net, optimizer, small, kept


def step(net, optimizer, x):
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


LABELS = Groups.labels([range(4), range(4), range(4)], axis=(0, 0, 1))
JOINT = SparseGroupLasso(1e-6, groups=LABELS, weights=[1.0, 2.0, 3.0, 4.0])
OPTIMIZERS = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, amsgrad=True),
    "two groups": lambda net: torch.optim.Adam([{"params": net[0].parameters()}, {"params": [net[2].weight], "lr": 0.5}]),
    "ProxAdam": lambda net: ProxAdam(net.named_parameters(), lr=0.1, penalty=GroupL2(1e-6, groups=Groups.whole())),
    "Proximal": lambda net: Proximal(
        torch.optim.RMSprop(net.parameters()), penalty=GroupL2(1e-6, groups=Groups.whole(), weights="none")
    ),
    "joint": lambda net: ProxAdam([{"params": list(net.parameters()), "penalty": JOINT, "joint": True}], lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_sliced_along(name):
    net, optimizer, small, kept = trained(OPTIMIZERS[name])
    again = optimizers.sliced(optimizer, net, small, kept, {})
    assert type(again) is type(optimizer)
    for (path, p), q in zip(net.named_parameters(), small.parameters()):
        for key, value in optimizer.state[p].items():
            new = again.state[q][key]
            assert torch.equal(new, slicing.selected(value, kept[path]) if value.shape == p.shape else value)
    x = torch.rand(3)
    step(net, optimizer, x)
    step(small, again, x)
    if name in ("SGD", "AdamW", "two groups", "joint"):  # the others have groups that span all units
        for p, q, cut in zip(net.parameters(), small.parameters(), kept.values()):
            torch.testing.assert_close(q, slicing.selected(p, cut))


def test_labels_weights_and_strengths_are_those_of_what_remains():
    labels = Groups.labels(["a", "b", "a", "c"])
    net = nn.Linear(3, 4)
    small = copy.deepcopy(net)
    kept = {"weight": (torch.tensor([2, 3]), None), "bias": (torch.tensor([2, 3]),)}
    slicing.cut(small, kept)
    optimizer = ProxAdam(
        [
            {"params": [net.weight], "penalty": GroupL2(1e-3, groups=labels, weights=[1.0, 2.0, 3.0])},
            {"params": [net.bias], "penalty": L1(torch.tensor([1e-3, 2e-3, 3e-3, 4e-3]))},
        ]
    )
    again = optimizers.sliced(optimizer, net, small, kept, {})
    first, second = again.param_groups
    assert first["penalty"]["groups"]["labels"] == ["a", "c"] and first["penalty"]["weights"] == [1.0, 3.0]
    assert second["strength"].tolist() == pytest.approx([3e-3, 4e-3])


def test_an_optimizer_in_eval_mode_stays_in_it_and_constants_move_its_points_too():
    net, optimizer, small, kept = trained(lambda net: AdamHAPG(net.parameters(), lr=0.1, penalty=L1(1e-6)))
    optimizer.eval()
    with torch.no_grad():
        small[0].bias += 1
    again = optimizers.sliced(optimizer, net, small, kept, {"0.bias": torch.ones(2)})
    state = again.state[small[0].bias]
    torch.testing.assert_close(state["search_point"], optimizer.state[net[0].bias]["search_point"][[0, 2]] + 1)
    with pytest.raises(RuntimeError, match=r"call optimizer\.train"):
        again.step()
    again.train()
    step(small, again, torch.rand(3))


def test_an_optimizer_of_another_model_is_refused():
    net, optimizer, small, kept = trained(OPTIMIZERS["SGD"])
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model that was compacted, got 3 others of 3"):
        optimizers.sliced(optimizer, copy.deepcopy(net), small, kept, {})


def test_a_new_bias_joins_the_optimizer_without_penalty():
    net, optimizer, small, kept = trained(OPTIMIZERS["ProxAdam"])
    small[2].bias = nn.Parameter(torch.ones(2))
    again = optimizers.sliced(optimizer, net, small, kept, {})
    assert again.param_groups[-1]["penalty"] is None and again.param_groups[-1]["param_names"] == ["2.bias"]
    step(small, again, torch.rand(3))
    assert bool((small[2].bias != 1).all())
