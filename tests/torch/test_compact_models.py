"""compact on small networks of many kinds: what is removed, what stays and why, and that the result can be used without us."""

import copy
import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from compact_cases import ALL, KINDS, REMOVED, TiedEmbedding, Written, built, outputs, zero
from torch import nn

from proxopt import L1, GroupL2
from proxopt_torch import ProxAdam, compact, groups, load_compact

COMPACTED = {}


def compacted(kind):
    """A network that nothing changes, an example, and what compact returns, which takes longer than the tests."""
    if kind not in COMPACTED:
        net, example = built(kind)
        COMPACTED[kind] = net, example, compact(net, example)
    return COMPACTED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_units_are_removed_and_the_result_computes_the_same(kind):
    net, example = built(kind)
    before = copy.deepcopy(net.state_dict())
    small = compact(net, example)
    COMPACTED[kind] = net, example, small
    assert small.removed == REMOVED[kind] and not small.kept
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    torch.testing.assert_close(outputs(small.model, example), outputs(net, example), rtol=1e-4, atol=1e-5)
    assert small.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (net, small.model))
    assert small.parameters[1] < small.parameters[0] and small.multiply_adds[1] < small.multiply_adds[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_loads_into_a_network_of_full_size(kind):
    _, example, result = compacted(kind)
    small = result.model
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = load_compact(built(kind, seed=1, zeroed=False)[0], saved).eval()
    torch.testing.assert_close(outputs(again, example), outputs(small, example))


def test_sizes_can_be_passed_where_a_format_loses_the_metadata():
    _, example, small = compacted("layers of attention")
    assert small.sizes == {"0.num_heads": 2, "0.inner": 8, "2.num_heads": 1, "2.inner": 4}
    full = built("layers of attention", seed=1)[0]
    again = load_compact(full, dict(small.model.state_dict()), small.sizes).eval()
    torch.testing.assert_close(again(example), small.model(example))
    assert (again[0].num_heads, again[1].num_heads, again[2].num_heads, again[0].depth) == (2, 3, 1, 4)


def test_tied_weights_stay_tied_and_a_buffer_that_was_cut_is_saved():
    net, _, result = compacted("tied")
    small = result.model
    assert small.out.weight is small.embed.weight and small.embed.weight.shape == (20, 7)
    assert "position" in small.state_dict() and "position" not in net.state_dict()
    again = load_compact(TiedEmbedding(), small.state_dict())
    assert again.out.weight is again.embed.weight and torch.equal(again.position, small.position)


def test_a_size_that_is_written_in_code_is_the_reason_why_units_stay():
    torch.manual_seed(0)
    net, x = Written().eval(), torch.randn(3, 8)
    zero(net.conv.weight, ALL, 3)
    zero(net.out.weight, ALL, 2)
    small = compact(net, x)
    assert small.kept == {"fc": "the size 16 is written in the code of Written.forward"}
    assert small.removed == {"conv": 1}
    torch.testing.assert_close(small.model(x), net(x))


def test_excluded_layers_are_not_cut():
    torch.manual_seed(0)
    block = lambda n: nn.Sequential(nn.Linear(n, 5), nn.ReLU())
    net, x = nn.Sequential(block(4), block(5), nn.Linear(5, 2)), torch.randn(2, 4)
    zero(net[0][0].weight, 1)
    zero(net[1][0].weight, 2)
    for exclude in ("0*", ["0.0"]):
        small = compact(net, x, exclude=exclude)
        assert small.removed == {"1.0": 1} and small.kept == {"0.0": "0 is excluded" if exclude == "0*" else "0.0 is excluded"}
    assert not compact(net, x, exclude=nn.Linear).removed
    with pytest.raises(ValueError, match=r"exclude must name layers of the model, got '0.O'; did you mean .*'0.0'"):
        compact(net, x, exclude="0.O")


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def linear():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


X, NET = torch.randn(2, 4), linear()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: compact(linear().state_dict(), X), TypeError, "model must be an nn.Module, got OrderedDict"),
        (lambda: compact(Locked(), X), ValueError, "model must be one that copy.deepcopy can copy: TypeError: cannot pickle"),
        (lambda: compact(linear().to("meta"), X), ValueError, "model must hold numbers, got 0.weight on the meta device"),
        (lambda: compact(linear(), X[:, :3]), ValueError, r"with which the model runs, got shape \(2, 3\): RuntimeError: mat1"),
        (lambda: compact(linear(), [X]), ValueError, r"a tuple of arguments or a dict .* got list: TypeError: linear"),
        (lambda: compact(linear(), X, tolerance=-1), ValueError, "tolerance must be a number >= 0, got -1"),
        (lambda: compact(linear(), X, tolerance="1"), ValueError, "tolerance must be a number >= 0, got '1'"),
        (lambda: compact(linear(), X, exclude=3), TypeError, "exclude must be names and types of layers, got 3"),
        (lambda: load_compact(linear(), linear()), TypeError, "got Sequential and Sequential"),
        (lambda: load_compact(linear(), linear().state_dict(), {"0.heads": 2}), ValueError, "sizes must name .* got '0.heads'"),
        (lambda: compact(NET, X).optimizer(torch.optim.Adam), TypeError, "optimizer must be a torch.optim.Optimizer, got type"),
        (lambda: compact(NET, X).optimizer(torch.optim.LBFGS(NET.parameters())), ValueError, "a state for each .* got LBFGS"),
        (lambda: groups.coupled(X, linear(), GroupL2(1.0)), TypeError, "model must be an nn.Module, got Tensor"),
        (lambda: groups.coupled(linear(), X, GroupL2(1.0), linear()), TypeError, "include must be names and types of layers"),
    ],
)
def test_wrong_arguments_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_of_an_encoder_with_nested_tensors():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).eval()
    zero(net.layers[0].self_attn.out_proj.weight, ALL, slice(0, 4))
    x, padded = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padded[0, 3:] = True
    small = compact(net, x)
    assert small.removed == {"layers.0.self_attn": 1}
    with_mask = compact(net, {"src": x, "src_key_padding_mask": padded})  # padded positions are zeros, which would change
    assert not with_mask.removed and "outputs that differ" in with_mask.kept["layers.0.self_attn"]
    with torch.no_grad():
        want = net(x, src_key_padding_mask=padded)
        got = [s.model(x, src_key_padding_mask=padded) for s in (small, with_mask)]
    torch.testing.assert_close(got[0][~padded], want[~padded])
    torch.testing.assert_close(got[1], want)


def test_the_state_of_a_model_is_as_it_was():
    net, x = built("counting")
    small = compact(net, x).model
    assert float(net.calls) == float(small.calls) == 0.0 and net.last is small.last is None


def test_a_model_without_a_graph_is_returned_unchanged():
    class Data(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) if float(x.sum()) > 0 else x

    net, x = Data(), torch.ones(2, 3)
    small = compact(net, x)
    assert not small.removed and small.kept[""].startswith("torch.export: ")
    assert small.parameters == (12, 12)
    torch.testing.assert_close(small.model(x), net(x))


def test_the_result_is_a_table():
    lines = str(compacted("layers of attention")[2]).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["name", "kind", "removed", "kept", "because"],
        ["0.qkv", "attention", "heads", "1"],
        ["2.qkv", "attention", "heads", "2"],
    ]
    assert lines[3].startswith("parameters: 1,872 -> ") and lines[4].startswith("multiply-adds: ")


def test_an_optimizer_continues_on_the_smaller_network():
    net, x = built("encoder")
    optimizer = ProxAdam(net.parameters(), lr=1e-2, penalty=L1(1e-3))
    optimizer.freeze_zeros()

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    steps(net, optimizer, 2)
    small = compact(net, x)
    assert small.removed == REMOVED["encoder"]
    again = small.optimizer(optimizer)
    assert all(again.state[p]["exp_avg"].shape == p.shape for p in small.model.parameters())
    before = net(x)
    steps(net, optimizer, 3)
    steps(small.model, again, 3)
    assert (net(x) - before).abs().max() > 0.01
    torch.testing.assert_close(small.model(x), net(x), rtol=1e-4, atol=1e-5)
    del net, optimizer
    with pytest.raises(RuntimeError, match="the original model must exist"):
        small.optimizer(again)


def test_a_smaller_network_can_lose_more():
    _, x, result = compacted("layers of attention")
    small = copy.deepcopy(result.model)
    zero(small[1].proj.weight, ALL, slice(0, 4))
    again = compact(small, x)
    assert again.removed == {"1.qkv": 1}
    torch.testing.assert_close(again.model(x), small(x), rtol=1e-4, atol=1e-5)
    assert load_compact(built("layers of attention", seed=1)[0], again.model.state_dict())[0].num_heads == 2


WITHOUT_US = """
import pickle, sys, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("proxopt"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.append(sys.argv[2])
for net, x, expected in torch.load(sys.argv[1], weights_only=False):
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again(x), expected)
    again.train()(x).sum().backward()
    assert again.state_dict()._metadata[""] == net.state_dict()._metadata[""]
print("loaded")
"""


def test_a_pickled_network_loads_without_this_package(tmp_path):
    saved = []
    for kind in ("encoder", "layers of attention", "recurrent"):  # a replaced layer; sizes in the metadata; neither
        _, x, small = compacted(kind)
        saved.append((small.model, x, small.model(x).detach()))
    torch.save(saved, tmp_path / "nets.pt")
    command = [sys.executable, "-c", WITHOUT_US, tmp_path / "nets.pt", Path(__file__).parents[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "loaded\n", done.stderr


def test_the_result_is_exported():
    _, x, small = compacted("encoder")
    program = torch.export.export(small.model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), small.model(x))
