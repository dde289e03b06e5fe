"""compact on small networks of many kinds: what is removed, what stays and why, and that the result can be used without us."""

import copy
import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from compact_cases import ALL, KINDS, REMOVED, TOKENS, Attention, TiedEmbedding, Written, built, outputs, zero
from torch import distributed, nn

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


def compiled(net):
    return torch.compile(net, backend="eager", fullgraph=True)


def compiled_parts(net):
    for name, part in list(net.named_children()):
        setattr(net, name, compiled(part))
    return net


def compiled_and_called(net):
    """Compiled for the full size before the smaller state_dict comes."""
    called = compiled(net.eval())
    called(torch.randn(TOKENS))
    return called


WRAPPED = {
    "compiled": compiled,
    "compiled and called": compiled_and_called,
    "compiled parts": compiled_parts,
    "DataParallel": nn.DataParallel,
    "both": lambda net: compiled(nn.DataParallel(net)),
    "both, the other way": lambda net: nn.DataParallel(compiled(net)),
    "not wrapped": lambda net: net,
}


@pytest.mark.parametrize("saved", WRAPPED)
@pytest.mark.parametrize("model", WRAPPED)
def test_a_wrapped_model_takes_the_state_dict_of_one_that_is_not_and_vice_versa(model, saved):
    kind = "layers of attention"
    _, example, small = compacted(kind)
    assert small.sizes
    state_dict = WRAPPED[saved](copy.deepcopy(small.model)).state_dict()
    full = WRAPPED[model](built(kind, seed=1)[0])
    assert load_compact(full, state_dict) is full
    torch.testing.assert_close(full.eval()(example), small.model(example))
    full = WRAPPED[model](built(kind, seed=1)[0])
    load_compact(full, dict(state_dict), small.sizes)
    torch.testing.assert_close(full.eval()(example), small.model(example))


class Holder(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, **inputs):
        return self.part(**inputs)


@pytest.mark.parametrize("wrap", [lambda m: m, compiled, nn.DataParallel], ids=["bare", "compiled", "DataParallel"])
def test_a_wrapped_layer_of_attention_with_fewer_heads_is_replaced(wrap):
    kind = "attention alone"
    _, example, small = compacted(kind)
    expected = outputs(small.model, example)
    found = load_compact(wrap(built(kind, seed=1)[0]), small.model.state_dict()).eval()
    assert isinstance(found, torch.fx.GraphModule)
    torch.testing.assert_close(outputs(found, example), expected)
    held = Holder(wrap(built(kind, seed=1)[0]))
    state_dict = Holder(small.model).state_dict()
    if wrap is nn.DataParallel:  # of a part of the model: the names are others
        state_dict = {name.replace("part.", "part.module."): value for name, value in state_dict.items()}
    assert load_compact(held, state_dict) is held
    torch.testing.assert_close(outputs(held.eval(), example), expected)


def test_a_module_may_be_called_module():
    net = nn.ModuleDict({"module": nn.Linear(4, 8)})
    shapes = {"module.weight": torch.ones(3, 4), "module.bias": torch.ones(3)}
    for wrap in (lambda m: m, nn.DataParallel, compiled):
        for prefix in ("", "module.", "_orig_mod.", "_orig_mod.module."):
            wrapped = wrap(copy.deepcopy(net))
            load_compact(wrapped, {f"{prefix}{name}": value for name, value in shapes.items()})
            assert [tuple(p.shape) for p in wrapped.parameters()] == [(3, 4), (3,)]


def test_a_model_in_distributed_data_parallel_is_refused():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(linear())
    finally:
        distributed.destroy_process_group()
    before = copy.deepcopy(net.module.state_dict())
    with pytest.raises(ValueError, match=r"model must be loaded before it is wrapped in DistributedDataParallel"):
        load_compact(compiled(net), before)


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


class Autoencoder(nn.Module):
    """The decoder reads a size from an attribute; nn.Flatten holds none."""

    def __init__(self):
        super().__init__()
        self.channels = 8
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.middle, self.expand, self.out = nn.Linear(128, 5), nn.Linear(5, 128), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        return self.out(torch.relu(self.expand(self.middle(self.encoder(x)))).view(-1, self.channels, 4, 4))


class WrittenAutoencoder(Autoencoder):
    def forward(self, x):
        return self.out(torch.relu(self.expand(self.middle(self.encoder(x)))).view(-1, 8, 4, 4))


@pytest.mark.parametrize("net", [Autoencoder, WrittenAutoencoder])
def test_a_layer_that_takes_its_sizes_from_its_input_is_not_the_cause(net):
    torch.manual_seed(0)
    net, x = net().eval(), torch.randn(2, 1, 4, 4)
    zero(net.encoder[0].weight, slice(0, 8, 2))
    zero(net.encoder[0].bias, slice(0, 8, 2))
    zero(net.out.weight, ALL, slice(0, 4))
    small = compact(net, x)
    if isinstance(net, WrittenAutoencoder):
        assert small.removed == {"encoder.0": 4}
        assert small.kept == {"expand": "the size 8 is written in the code of WrittenAutoencoder.forward (4 of them)"}
    else:
        assert small.removed == {"encoder.0": 4, "expand": 4} and not small.kept
        assert small.model.channels == 4
    torch.testing.assert_close(small.model(x), net(x))


class Rows(nn.Module):
    """A layer with its own views, which holds the number of its outputs."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return torch.mm(x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class SplitAttention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.embed_dim, self.split_size, self.num_heads, self.head_dim = size, size, heads, size // heads
        self.qkv, self.proj = Rows(size, 3 * size), Rows(size, size)

    def forward(self, x):
        q, k, v = (t.view(*t.shape[:-1], -1, self.head_dim).transpose(1, 2) for t in self.qkv(x).split(self.split_size, dim=2))
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(*x.shape[:-2], -1))


def test_one_head_in_one_layer_with_fused_projections():
    torch.manual_seed(0)
    net, x = nn.Sequential(SplitAttention(8, 4), nn.LayerNorm(8), SplitAttention(8, 4)).eval(), torch.randn(2, 5, 8)
    zero(net[0].proj.weight, slice(2, 4))
    small = compact(net, x)
    assert small.removed == {"0.qkv": 1} and not small.kept
    assert small.sizes == {"0.split_size": 6} and net[0].split_size == small.model[2].split_size == 8
    torch.testing.assert_close(small.model(x), net(x))


class Branches(nn.Module):
    """Sizes of unequal parts in a tuple, and a size beside a buffer."""

    def __init__(self):
        super().__init__()
        self.splits, self.channels = (10, 6, 6), 22
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1, groups=6)
        self.register_buffer("blur", torch.rand(22, 1, 2, 2), persistent=False)

    def forward(self, x):
        x, a, b = torch.split(x, self.splits, dim=1)
        return nn.functional.conv2d(torch.cat([x, self.a(a), self.b(b)], 1), self.blur, groups=self.channels)


def test_sizes_of_parts_and_of_buffers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 22, 1), Branches(), nn.Conv2d(22, 3, 1)).eval()
    zero(net[2].weight, ALL, [1, 4, 9, 10, 16, 18])
    x = torch.randn(2, 2, 5, 5)
    small = compact(net, x)
    assert small.removed == {"0": 6} and not small.kept
    assert (small.model[1].splits, small.model[1].channels, net[1].splits) == ((7, 5, 4), 16, (10, 6, 6))
    torch.testing.assert_close(small.model(x), net(x))


class Cancelling(nn.Module):
    """A large sum that is subtracted again: in float32 the order of the terms decides about the output."""

    def __init__(self, changes=False):
        super().__init__()
        self.changes = changes
        self.fc, self.out = nn.Linear(64, 256), nn.Linear(256, 3)
        zero(self.out.weight, ALL, slice(0, 256, 2))
        with torch.no_grad():
            self.out.bias.copy_(-2e3 * self.out.weight.sum(1))

    def forward(self, x):
        h = self.out(torch.relu(self.fc(x)) + 2e3)
        return h * (1 + 2e-4 * (self.fc.out_features < 256)) if self.changes else h


@pytest.mark.parametrize("changes", [False, True])
def test_rounding_is_no_other_function(changes):
    torch.manual_seed(0)
    net, x = Cancelling(changes).eval(), torch.randn(8, 64)
    small = compact(net, x)
    assert small.removed == ({} if changes else {"fc": 128})
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        torch.testing.assert_close(small.model.double()(x.double()), exact)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x)
        return self.out(torch.relu(x + self.b(x)))


def test_zeroed_units_that_stay_have_a_reason():
    def kept(net, x, weight, *index):
        zero(weight(net), *index)
        return compact(net.eval(), x).kept

    x = torch.randn(3, 4)
    normed = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    assert kept(normed, x, lambda m: m[0].weight, 1) == {"0": "layer_norm in 1 combines all of them"}
    assert kept(Residual(), x, lambda m: m.b.weight, [1, 2]) == {"a": "another layer computes it too (2 of them)"}
    assert kept(Attention(), torch.randn(TOKENS), lambda m: m.proj.weight, ALL, [0, 5]) == {
        "qkv": "only a part of it is zero (2 of them)"
    }
    assert kept(nn.Sequential(nn.Linear(4, 6)), x, lambda m: m[0].weight, 2) == {"0": "they are an output of the model"}
    assert kept(nn.Sequential(nn.Linear(4, 6)), x, lambda m: m[0].weight, ALL, 2) == {}  # a feature of the input


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
    (reason,) = with_mask.kept.values()  # torch 2.9 does not export nested tensors
    assert not with_mask.removed and ("outputs that differ" in reason or "nested_tensor" in reason)
    with torch.no_grad():
        want = net(x, src_key_padding_mask=padded)
        got = [s.model(x, src_key_padding_mask=padded) for s in (small, with_mask)]
    torch.testing.assert_close(got[0][~padded], want[~padded])
    torch.testing.assert_close(got[1], want)


def test_the_state_of_a_model_is_as_it_was():
    net, x = built("counting")
    small = compact(net, x).model
    groups.coupled(net, x, GroupL2(1.0))
    assert float(net.calls) == float(small.calls) == 0.0 and net.last is small.last is None
    assert net.every == small.every == {"outputs": []}


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
    # In float32 Adam takes full steps along gradients that are zero but for rounding, which differs between processors.
    net, x = net.double(), x.double()
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
