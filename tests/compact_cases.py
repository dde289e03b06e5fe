"""Small networks with zeroed units, for the tests of compact."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Attention with one layer for queries, keys and values, whose sizes are attributes, as in many vision transformers."""

    def __init__(self, size=12, heads=3):
        super().__init__()
        self.num_heads, self.inner, self.depth = heads, size, 4
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(batch, length, self.inner))


class Written(nn.Module):
    """A size is written in the code."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv, self.out = nn.Linear(8, 64), nn.Conv2d(16, 6, 1), nn.Conv2d(6, 1, 1)

    def forward(self, z):
        return self.out(torch.relu(self.conv(torch.relu(self.fc(z)).view(-1, 16, 2, 2))))


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("position", torch.randn(8), persistent=False)

    def forward(self, ids):
        return self.out(torch.relu(self.hidden(self.embed(ids) + self.position)))


class Named(nn.Module):
    """Keyword arguments, and outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x, scale=None):
        return {"out": self.b(F.relu(self.a(x))), "more": (x.sum(), None)}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(5, 6, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(12, 2)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


class Counting(nn.Module):
    """Its output depends on how often it ran."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last, self.every = nn.Linear(4, 6), nn.Linear(6, 2), None, {"outputs": []}
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = self.b(F.relu(self.a(x))) * self.calls
        self.every["outputs"].append(self.last)
        return self.last


class PlainNorm(nn.Module):
    """A GroupNorm without weight: no tensor determines its size."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12, affine=False), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.out(F.relu(self.norm(self.conv(x))))


def zero(tensor, *index):
    with torch.no_grad():
        tensor[index] = 0


def built(kind, seed=0, zeroed=True):
    """A network with some units zeroed, and an example."""
    torch.manual_seed(seed)
    net, example, zeros = KINDS[kind]()
    net.eval()
    if zeroed:
        for tensor, index in zeros(net):
            zero(tensor, *index)
    return net, example


def zeros_of_recurrent(net):
    """Units 1 and 4 in all layers and directions, which have one size."""
    read = [getattr(net.lstm, f"weight_hh_l{k}{side}") for k in (0, 1) for side in ("", "_reverse")]
    above = [net.lstm.weight_ih_l1, net.lstm.weight_ih_l1_reverse, net.out.weight]
    return [(w, (ALL, [1, 4])) for w in read] + [(w, (ALL, [1, 4, 7, 10])) for w in above]


ALL = slice(None)
TOKENS = (2, 5, 12)
KINDS = {
    "fused attention": lambda: (Attention(), torch.randn(TOKENS), lambda m: [(m.proj.weight, (ALL, slice(4, 8)))]),
    "layers of attention": lambda: (
        nn.Sequential(Attention(), Attention(), Attention()),
        torch.randn(TOKENS),
        lambda m: [(m[0].proj.weight, (ALL, slice(4, 8))), (m[2].proj.weight, (ALL, slice(0, 8)))],
    ),
    "encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), 2, enable_nested_tensor=False),
        torch.randn(TOKENS),
        lambda m: [(m.layers[0].self_attn.out_proj.weight, (ALL, slice(4, 8))), (m.layers[1].linear2.weight, (ALL, slice(0, 5)))],
    ),
    "attention alone": lambda: (
        nn.MultiheadAttention(12, 3, batch_first=True),
        {**{name: torch.randn(TOKENS) for name in ("query", "key", "value")}, "need_weights": False},
        lambda m: [(m.out_proj.weight, (ALL, slice(0, 4)))],
    ),
    "tied": lambda: (
        TiedEmbedding(),
        torch.randint(20, (2, 5)),
        lambda m: [(m.embed.weight, (ALL, 2)), (m.hidden.weight, (ALL, 2)), (m.hidden.weight, (2,)), (m.hidden.bias, (2,))],
    ),
    "keywords": lambda: (Named(), {"x": torch.randn(3, 4)}, lambda m: [(m.a.weight, (slice(2, 4),))]),
    "norm without weight": lambda: (PlainNorm(), torch.randn(2, 3, 4, 4), lambda m: [(m.out.weight, (ALL, slice(3, 6)))]),
    "recurrent": lambda: (Recurrent(), torch.randn(2, 4, 5), zeros_of_recurrent),
    "counting": lambda: (Counting(), torch.randn(3, 4), lambda m: [(m.a.weight, (slice(2, 4),))]),
    "grouped convolution": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)),
        torch.randn(2, 3, 6, 6),
        lambda m: [(m[4].weight, (ALL, slice(3, 6)))],
    ),
}
REMOVED = {
    "fused attention": {"qkv": 1},
    "layers of attention": {"0.qkv": 1, "2.qkv": 2},
    "encoder": {"layers.0.self_attn": 1, "layers.1.linear1": 5},
    "attention alone": {"": 1},
    "tied": {"embed": 1},
    "keywords": {"a": 2},
    "norm without weight": {"conv": 3},
    "recurrent": {"lstm": 8},
    "counting": {"a": 2},
    "grouped convolution": {"0": 2},
}


def outputs(net, example):
    with torch.no_grad():
        out = net(**example) if isinstance(example, dict) else net(*example) if isinstance(example, tuple) else net(example)
    return out["out"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
