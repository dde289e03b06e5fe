"""The dependency analysis: what must be removed together, what can be removed, and that nothing else is.

The tests need no surgery. A unit can be removed if the model computes the same after its columns are set to zero, everything else
that belongs to it to random numbers, and the biases have taken the constants.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from proxopt_torch.dependencies import NotTraceable, analyse, flat_tensors, removable
from proxopt_torch.dependencies.rules import RULES


class Net(nn.Module):
    """Layers by name, and a function of them and the inputs."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Module | nn.Parameter):
                setattr(self, name, layer)
            else:
                self.register_buffer(name, layer)

    def forward(self, *args):
        return self.function(self, *args)


class ClassToken(nn.Module):
    """A transformer whose code uses ``len`` of the batch, and a mask of which torch does not know that it is causal."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 6, 8))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6))
        layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.encoder(x, mask=self.mask)


def removed_units(net, args, zero=()):
    """The number of removable units by layer; the function must not depend on them.

    zero: (name of a tensor, dimension, indices) to set to zero before.
    """
    net = net.eval()
    found = analyse(net, args)
    if zero:
        assert removable(found).units.size == 0
    with torch.no_grad():
        for name, dim, indices in zero:
            net.get_parameter(name).movedim(dim, 0)[list(indices)] = 0
    removal = removable(found)
    other = copy.deepcopy(net)
    tensors = dict(other.named_parameters()) | dict(other.named_buffers())
    with torch.no_grad():
        for name, shift in removal.shifts.items():
            if name in tensors:
                tensors[name].add_(shift)
            else:
                other.get_submodule(name).bias = nn.Parameter(shift)
        for reads in (False, True):
            for name, dims in found.places.items():
                for dim, units in enumerate(dims):
                    gone = np.isin(units, removal.units) if units is not None else np.zeros(0, bool)
                    if gone.any() and (found.roles[name, dim] == "reads") == reads:
                        rows = tensors[name].movedim(dim, 0)
                        tied = name == "e.weight"  # computes and reads
                        rows[torch.from_numpy(gone)] = 0 if reads or tied else torch.rand_like(rows[torch.from_numpy(gone)])
    fresh = tuple(torch.randn(3, *x.shape[1:]) if x.is_floating_point() else x for x in args)
    for inputs in (args, fresh):
        with torch.no_grad():
            for a, b in zip(flat_tensors(net(*inputs)), flat_tensors(other(*inputs)), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    gone = set(removal.units.tolist())
    counts = {}
    for family in found.families:
        if both := len(gone & set(family.units.tolist())):
            counts[family.name] = counts.get(family.name, 0) + both
    return counts


def heads_of(net, args):
    return [(f.name, len(f.units)) for f in analyse(net.eval(), args).families if f.kind == "attention heads" and not f.reason]


def conv(a, b, k=1, **kwargs):
    return nn.Conv2d(a, b, k, **kwargs)


IMAGE = (torch.randn(2, 3, 8, 8),)
VECTOR = (torch.randn(2, 6),)
TOKENS = (torch.randn(2, 5, 8),)


def attention(self, x, *, heads=4, explicit=False):
    """Attention with a fused layer for queries, keys and values."""
    batch, length, _ = x.shape
    q, k, v = self.qkv(x).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if explicit:
        y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    return self.out(y.transpose(1, 2).reshape(batch, length, -1))


def einsum_attention(self, x):
    q, k, v = (layer(x).view(*x.shape[:2], 4, 2) for layer in (self.q, self.k, self.v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return self.out(torch.einsum("bhij,bjhd->bihd", scores, v).flatten(2))


def cosine_attention(self, x):
    q, k, v = (layer(x).view(*x.shape[:2], 4, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
    scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
    return self.out((scores @ v).transpose(1, 2).reshape(*x.shape[:2], -1))


def shared_head(self, x):
    """All queries share one key and value head."""
    q = self.q(x).view(*x.shape[:2], 4, 2).transpose(1, 2)
    k, v = (layer(x)[:, None].expand(-1, 4, -1, -1) for layer in (self.k, self.v))
    y = F.scaled_dot_product_attention(q, k, v)
    return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def squeeze_excite(self, x):
    h = F.relu(self.a(x))
    return self.b(h * torch.sigmoid(self.up(F.relu(self.down(h.mean((2, 3), keepdim=True))))))


def shuffled(self, x):
    h = self.a(x).view(len(x), 2, 4, 8, 8).transpose(1, 2).reshape(len(x), 8, 8, 8)
    return self.b(F.relu(h))


def written(self, x):
    h = F.relu(self.a(x))
    h[:, 0] = x[:, 0]
    return self.b(h)


def shortcut(self, x):
    h = self.a(x)
    return self.c(F.relu(F.pad(h, (0, 0, 0, 0, 2, 2)) + self.b(F.relu(h))))


def qkv_layers():
    return {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)}


def separate_layers(width=8):
    return {"q": nn.Linear(8, 8), "k": nn.Linear(8, width), "v": nn.Linear(8, width), "out": nn.Linear(8, 8)}


# name: (network, arguments, what is zero, the removable units by layer)
REMOVED = {
    "a unit that nothing reads": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
        VECTOR,
        [("2.weight", 1, [1])],
        {"0": 1},
    ),
    "a constant of an activation": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)),
        VECTOR,
        [("0.weight", 0, [1])],
        {"0": 1},
    ),
    "a constant next to zeros of a padding": (
        lambda: nn.Sequential(conv(3, 4), nn.Sigmoid(), conv(4, 2, 3, padding=1)),
        IMAGE,
        [("0.weight", 0, [1]), ("0.bias", 0, [1])],
        {},
    ),
    "a zero next to zeros of a padding": (
        lambda: nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2, 3, padding=1)),
        IMAGE,
        [("0.weight", 0, [1]), ("0.bias", 0, [1])],
        {"0": 1},
    ),
    "norms used in another order than registered": (
        lambda: Net(
            lambda s, x: s.last(s.b2(s.c2(F.relu(s.b1(s.c1(x)))))),
            c1=conv(3, 6),
            c2=conv(6, 6),
            b1=nn.BatchNorm2d(6),
            b2=nn.BatchNorm2d(6),
            last=conv(6, 2),
        ),
        IMAGE,
        [("b1.weight", 0, [2]), ("b2.weight", 0, [1, 3])],
        {"c1": 1, "c2": 2},
    ),
    "something is added to a row of zeros": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(x) + x.mean(1, keepdim=True))), a=conv(3, 6), b=conv(6, 2)),
        IMAGE,
        [("a.weight", 0, [1]), ("a.bias", 0, [1])],
        {},
    ),
    "a view between a linear layer and a convolution": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(x)).view(-1, 5, 3, 3)), a=nn.Linear(6, 45), b=conv(5, 2, 3)),
        VECTOR,
        [("b.weight", 1, [3])],
        {"a": 1},
    ),
    "one pixel of a channel": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(x)).view(-1, 5, 3, 3)), a=nn.Linear(6, 45), b=conv(5, 2, 3)),
        VECTOR,
        [("a.weight", 0, [1]), ("a.bias", 0, [1])],
        {},
    ),
    "flattened maps": (
        lambda: nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)),
        IMAGE,
        [("3.weight", 1, [4, 5, 6, 7, 8])],
        {"0": 1},
    ),
    "gated": (
        lambda: Net(lambda s, x: s.d(F.silu(s.g(x)) * s.u(x)), g=nn.Linear(8, 6), u=nn.Linear(8, 6), d=nn.Linear(6, 8)),
        TOKENS,
        [("g.weight", 0, [1, 2]), ("g.bias", 0, [1, 2])],
        {"g": 2},
    ),
    "halves of one layer": (
        lambda: Net(lambda s, x: s.b(F.glu(s.a(x))), a=nn.Linear(8, 12), b=nn.Linear(6, 8)),
        TOKENS,
        [("b.weight", 1, [1, 2])],
        {"a": 2},
    ),
    "chunks": (
        lambda: Net(lambda s, x: s.b(torch.mul(*s.a(x).chunk(2, -1))), a=nn.Linear(8, 12), b=nn.Linear(6, 8)),
        TOKENS,
        [("a.weight", 0, [1]), ("a.bias", 0, [1])],
        {"a": 1},
    ),
    "unequal halves": (
        lambda: Net(
            lambda s, x: (lambda p, q: s.b(p) + s.c(q))(*s.a(x).chunk(2, -1)),
            a=nn.Linear(8, 6),
            b=nn.Linear(3, 2),
            c=nn.Linear(3, 2),
        ),
        TOKENS,
        [("b.weight", 1, [0, 1]), ("c.weight", 1, [2])],
        {"a": 2},
    ),
    "depthwise": (
        lambda: nn.Sequential(conv(3, 6), conv(6, 12, 3, groups=6), nn.ReLU(), conv(12, 2)),
        IMAGE,
        [("3.weight", 1, [2, 3])],
        {"0": 1},
    ),
    "grouped": (
        lambda: nn.Sequential(conv(3, 8), conv(8, 4, 3, groups=4, padding=1), conv(4, 2)),
        IMAGE,
        [("0.weight", 0, [2, 3, 4]), ("0.bias", 0, [2, 3, 4]), ("1.bias", 0, [1])],
        {"0": 1},
    ),
    "transposed and grouped": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 4, 2, groups=4), conv(4, 2)),
        IMAGE,
        [("2.weight", 1, [1])],
        {"0": 1},
    ),
    "group norm": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 2)),
        IMAGE,
        [("3.weight", 1, [2, 3, 4])],
        {"0": 1},
    ),
    "squeeze and excite": (
        lambda: Net(squeeze_excite, a=conv(3, 6), down=conv(6, 3), up=conv(3, 6), b=conv(6, 2)),
        IMAGE,
        [("a.weight", 0, [1]), ("a.bias", 0, [1]), ("up.weight", 1, [0])],
        {"a": 1, "down": 1},
    ),
    "channel shuffle": (
        lambda: Net(shuffled, a=conv(3, 8), b=conv(8, 2)),
        IMAGE,
        [("b.weight", 1, [0, 1])],  # channel 0 of both groups
        {"a": 2},
    ),
    "half of a channel shuffle": (lambda: Net(shuffled, a=conv(3, 8), b=conv(8, 2)), IMAGE, [("b.weight", 1, [0])], {}),
    "pixel shuffle": (
        lambda: nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 2)),
        IMAGE,
        [("2.weight", 1, [1])],
        {"0": 1},
    ),
    "upsampling, pooling and skips": (
        lambda: Net(
            lambda s, x: s.c(torch.cat([s.a(x), F.interpolate(s.b(F.max_pool2d(s.a(x), 2)), scale_factor=2)], 1)),
            a=conv(3, 4),
            b=conv(4, 5),
            c=conv(9, 2),
        ),
        IMAGE,
        [("c.weight", 1, [1, 6]), ("b.weight", 1, [1])],
        {"a": 1, "b": 1},
    ),
    "concatenation with the input": (
        lambda: Net(lambda s, x: s.b(torch.cat([x, s.a(x)], 1)), a=conv(3, 4), b=conv(7, 2)),
        IMAGE,
        [("b.weight", 1, [0, 3])],
        {"a": 1},
    ),
    "padded channels": (
        lambda: Net(shortcut, a=conv(3, 4), b=conv(4, 8), c=conv(8, 2)),
        IMAGE,
        [("c.weight", 1, [0, 2]), ("b.weight", 1, [0])],
        {"a": 1},
    ),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2)),
        VECTOR,
        [("2.weight", 1, [1])],
        {"0.parametrizations.weight": 1},
    ),
    "a masked weight": (
        lambda: Net(
            lambda s, x: s.b(F.relu(F.linear(x, s.w * s.mask, s.c))),
            w=nn.Parameter(torch.randn(5, 6)),
            mask=torch.ones(5, 6).index_fill_(0, torch.tensor([2]), 0),
            c=nn.Parameter(torch.zeros(5)),
            b=nn.Linear(5, 2),
        ),
        VECTOR,
        [],
        {"": 1},
    ),
    "matrices without layers": (
        lambda: Net(
            lambda s, x: torch.einsum("bi,ij->bj", F.relu(x @ s.a), s.b),
            a=nn.Parameter(torch.randn(6, 5)),
            b=nn.Parameter(torch.randn(5, 2)),
        ),
        VECTOR,
        [("a", 1, [1])],
        {"": 1},
    ),
    "embedding, tied weight": (
        lambda: Net(
            lambda s, i: F.linear(s.f(F.relu(s.h(s.e(i)))), s.e.weight),
            e=nn.Embedding(9, 6),
            h=nn.Linear(6, 5),
            f=nn.Linear(5, 6),
        ),
        (torch.randint(9, (2, 4)),),
        [("h.weight", 0, [1]), ("e.weight", 1, [2]), ("f.weight", 0, [2]), ("f.bias", 0, [2])],
        {"h": 1, "e": 1},
    ),
    "a layer used twice": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(F.relu(s.a(x))))), a=nn.Linear(6, 6), b=nn.Linear(6, 2)),
        VECTOR,
        [("a.weight", 0, [1])],
        {},
    ),
    "a layer used twice, inside": (
        lambda: Net(lambda s, x: s.c(F.relu(s.b(F.relu(s.b(s.a(x)))))), a=nn.Linear(6, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 2)),
        VECTOR,
        [("c.weight", 1, [1]), ("b.weight", 1, [1])],
        {"a": 1},
    ),
    "two outputs": (
        lambda: Net(lambda s, x: {"y": s.b(F.relu(s.a(x))), "h": (s.a(x),)}, a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        VECTOR,
        [("b.weight", 1, [1])],
        {},
    ),
    "in place": (
        lambda: nn.Sequential(
            conv(3, 4), nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.Flatten(2, 3), nn.Conv1d(4, 2, 1)
        ),
        IMAGE,
        [("0.weight", 0, [1])],
        {"0": 1},
    ),
    "written through a view": (lambda: Net(written, a=conv(3, 4), b=conv(4, 2)), IMAGE, [("a.weight", 0, [0, 1])], {}),
    "every second channel": (
        lambda: Net(lambda s, x: s.b(s.a(x)[:, ::2]), a=conv(3, 4), b=conv(2, 2)),
        IMAGE,
        [("b.weight", 1, [1])],
        {},
    ),
    "softmax over channels": (
        lambda: Net(lambda s, x: s.b(s.a(x).softmax(1)), a=conv(3, 4), b=conv(4, 2)),
        IMAGE,
        [("b.weight", 1, [1])],
        {},
    ),
    "a positional parameter of which a part is used": (
        lambda: Net(
            lambda s, x: s.b(F.relu(s.a(x + s.p[:, : x.shape[1]]))),
            p=nn.Parameter(torch.zeros(1, 9, 8)),
            a=nn.Linear(8, 4),
            b=nn.Linear(4, 2),
        ),
        (torch.randn(2, 1, 8),),
        [("b.weight", 1, [1])],
        {"a": 1},
    ),
    "layer scale": (
        lambda: Net(
            lambda s, x: s.c(s.a(x) + s.g * s.b(x)),
            a=nn.Linear(8, 4),
            b=nn.Linear(8, 4),
            g=nn.Parameter(torch.ones(4)),
            c=nn.Linear(4, 2),
        ),
        TOKENS,
        [("a.weight", 0, [1]), ("g", 0, [1, 2])],
        {"a": 1},
    ),
    "heads of a fused layer": (lambda: Net(attention, **qkv_layers()), TOKENS, [("out.weight", 1, [2, 3])], {"qkv": 1}),
    "part of a head": (lambda: Net(attention, **qkv_layers()), TOKENS, [("out.weight", 1, [2])], {}),
    "a head whose values are constant": (
        lambda: Net(attention, **qkv_layers()),
        TOKENS,
        [("qkv.weight", 0, [18, 19])],
        {"qkv": 1},
    ),
    "heads by explicit products": (
        lambda: Net(lambda s, x: attention(s, x, explicit=True), **qkv_layers()),
        TOKENS,
        [("qkv.weight", 0, [18, 19]), ("qkv.bias", 0, [18, 19])],
        {"qkv": 1},
    ),
    "heads by einsum": (lambda: Net(einsum_attention, **separate_layers()), TOKENS, [("out.weight", 1, [2, 3])], {"q": 1}),
    "queries of one key": (lambda: Net(shared_head, **separate_layers(2)), TOKENS, [("out.weight", 1, [2, 3])], {"q": 1}),
    "cosine attention": (
        lambda: Net(cosine_attention, **separate_layers()),
        TOKENS,
        [("out.weight", 1, [2, 3])],
        {"q": 1},
    ),
    "one head": (lambda: Net(lambda s, x: attention(s, x, heads=1), **qkv_layers()), TOKENS, [("qkv.weight", 0, [1, 9])], {}),
    "torch attention": (
        lambda: nn.TransformerEncoderLayer(8, 4, 16, batch_first=True),
        TOKENS,
        [("self_attn.out_proj.weight", 1, [2, 3]), ("linear2.weight", 1, [5])],
        {"self_attn": 1, "linear1": 1},
    ),
    "torch attention with a causal mask and a class token": (
        ClassToken,
        TOKENS,
        [("encoder.layers.0.self_attn.out_proj.weight", 1, [2, 3]), ("encoder.layers.0.linear2.weight", 1, [5])],
        {"encoder.layers.0.self_attn": 1, "encoder.layers.0.linear1": 1},
    ),
    "a batch size that the code fixes": (
        lambda: Net(
            lambda s, x: s.b(F.relu(s.a(torch.cat([x, torch.zeros(len(x), 5, 1)], -1))).reshape(len(x) * 5, 6)).view(len(x), -1),
            a=nn.Linear(9, 6),
            b=nn.Linear(6, 2),
        ),
        TOKENS,
        [("b.weight", 1, [1])],
        {"a": 1},
    ),
}


@pytest.mark.parametrize("case", REMOVED)
def test_what_is_removed_has_no_effect_and_nothing_else_is_removed(case):
    torch.manual_seed(0)
    build, args, zero, expected = REMOVED[case]
    assert removed_units(build(), args, zero) == expected


@pytest.mark.parametrize(("cell", "last"), [(nn.LSTM, True), (nn.GRU, False), (nn.RNN, False), (nn.RNN, True)])
def test_recurrent_units(cell, last):
    torch.manual_seed(0)

    def forward(self, x):
        y, state = self.cell(x)
        state = state[0] if isinstance(state, tuple) else state
        return self.out(state[-1] if last else y)

    net = Net(forward, cell=cell(8, 6, num_layers=2, batch_first=True), out=nn.Linear(6, 2))
    gates = len(net.cell.weight_hh_l0) // 6
    rows = lambda *units: [6 * gate + u for gate in range(gates) for u in units]
    zero = [(f"cell.{kind}_l0", 0, rows(1, 2)) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    zero += [("out.weight", 1, [1]), ("cell.weight_hh_l1", 1, [1])]
    assert removed_units(net, TOKENS, zero) == {"cell": 2}  # one of each layer: both have the same hidden size


def test_units_of_a_residual_stream():
    net = Net(
        lambda s, x: s.head(s.stem(x) + s.outer(F.relu(s.norm(s.inner(s.stem(x)))))),
        **{"stem": conv(3, 4), "inner": conv(4, 6), "norm": nn.BatchNorm2d(6), "outer": conv(6, 4), "head": conv(4, 2)},
    )
    found = analyse(net, IMAGE)
    stream, inner = (f for f in found.families if not f.reason)
    assert (stream.kind, stream.name, len(stream.units)) == ("channels", "stem", 4)
    assert stream.places == (
        ("head.weight", 1),
        ("inner.weight", 1),
        ("outer.bias", 0),
        ("outer.weight", 0),
        ("stem.bias", 0),
        ("stem.weight", 0),
    )
    assert {found.roles[place] for place in inner.places if place[0].startswith("norm")} >= {"scales", "computes"}
    columns, *kernel = found.places["stem.weight"][1:]
    assert found.kept[int(columns[0])].startswith("conv2d in stem reads the input of the model")
    assert kernel == [None, None]


def test_why_zeros_stay():
    net = nn.Sequential(conv(3, 4), nn.Sigmoid(), conv(4, 2, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
    found = analyse(net, IMAGE)
    unit = int(found.places["0.weight"][0][1])
    assert removable(found).kept[unit] == "it is a constant that cannot be added to the bias of a layer that reads it"


def test_reasons_and_operators_without_rule():
    net = Net(lambda s, x: s.b(torch.linalg.matrix_exp(s.a(x))), a=conv(3, 4), b=conv(4, 2))
    found = analyse(net, IMAGE)
    assert found.unknown == {"aten.linalg_matrix_exp.default": ""}
    (made,) = (f for f in found.families if ("a.weight", 0) in f.places)
    assert made.reason == "linalg_matrix_exp in forward of the model has no rule"
    assert removable(found).units.size == 0


def test_a_rule_that_fails_is_a_barrier(monkeypatch):
    def fail(flow, node):
        raise IndexError

    monkeypatch.setitem(RULES, "relu", fail)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    nn.init.zeros_(net[2].weight)
    found = analyse(net, VECTOR)
    assert found.unknown == {"aten.relu.default": "1"}
    assert removable(found).units.size == 0


def test_sizes_of_views_without_some_units():
    net = Net(attention, **qkv_layers())
    found = analyse(net, TOKENS)
    (heads,) = (f for f in found.families if f.kind == "attention heads")
    view = next(v for v in found.views if v.sizes == (2, 5, 3, 4, 2))
    assert view.resized(heads.units[:1]) == (2, 5, 3, 3, 2)


def test_features_of_the_input():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[:, 1] = 0
    found = analyse(net, VECTOR, inputs=True)
    assert np.isin(found.inputs, removable(found).units).tolist() == [False, True, False, False, False, False]
    assert analyse(net, VECTOR).inputs is None


def test_a_model_without_graph(capfd):
    with pytest.raises(NotTraceable, match=r"torch\.export: the code depends on the values of a tensor: .* \(line \d+ of "):
        analyse(Net(lambda s, x: x if x.sum() > 0 else -x), VECTOR)
    assert capfd.readouterr().err == ""  # torch writes the graph that it has so far


def test_parts_that_must_stay_equal_stay_where_one_of_them_can_lose_nothing():
    def forward(self, x):
        a, b = self.a(x).chunk(2, -1)
        return a, self.b(F.relu(b))

    found = analyse(Net(forward, a=nn.Linear(6, 8), b=nn.Linear(4, 2)), VECTOR)
    first, second = (family.reason for family in found.families if ("a.bias", 0) in family.places)
    assert first == "they are an output of the model"
    assert second == "chunk in forward of the model splits them into 2 parts of the same size"


def test_recurrent_layers_have_one_size():
    net = Net(lambda s, x: s.norm(s.cell(x)[0]), cell=nn.RNN(8, 6, num_layers=2), norm=nn.LayerNorm(6))
    reasons = {family.reason for family in analyse(net, TOKENS).families if family.name == "cell"}
    assert "rnn_tanh in cell has one hidden size for all layers and directions" in reasons


def test_modes_of_the_model_stay():
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout())
    net[1].eval()
    analyse(net, VECTOR)
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
