"""compact removes zeroed channels and keeps the function of the network, for many architectures."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proxopt_torch import compact, load_compact


def sparse(layer, zero_out=(), zero_in=(), keep_bias=False):
    """The layer with the weights of these output channels and of these input channels set to zero."""
    with torch.no_grad():
        layer.weight[list(zero_out)] = 0
        if layer.bias is not None and not keep_bias:
            layer.bias[list(zero_out)] = 0
        layer.weight[:, list(zero_in)] = 0
    return layer


def norm(width):
    """A BatchNorm with random statistics and affine entries."""
    layer = nn.BatchNorm2d(width)
    with torch.no_grad():
        for t in (layer.weight, layer.bias, layer.running_mean):
            t.uniform_(0.5, 1.5)
        layer.running_var.uniform_(0.5, 2.0)
    return layer


class Residual(nn.Module):
    """A residual connection of 6 channels around a block with another number of channels."""

    def __init__(self):
        super().__init__()
        self.stem = sparse(nn.Conv2d(3, 6, 3, padding=1), zero_out=[4])
        self.inner = sparse(nn.Conv2d(6, 8, 3, padding=1), zero_out=[0, 1, 2], zero_in=[4])
        self.outer = sparse(nn.Conv2d(8, 6, 3, padding=1), zero_out=[4])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        h = F.relu(self.stem(x))
        h = h + self.outer(F.relu(self.inner(h)))
        return self.head(h.mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = sparse(nn.Conv2d(3, 8, 1, bias=False), zero_out=[1, 5])
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.narrow = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.narrow(F.relu(self.deep(self.wide(x))))


class Tied(nn.Module):
    """One Linear layer used twice: a neuron is removable only if it is in both places."""

    def __init__(self):
        super().__init__()
        self.shared = sparse(nn.Linear(6, 6), zero_out=[2])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(F.relu(self.shared(F.relu(self.shared(x)))))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = sparse(nn.Linear(4, 5), zero_out=[1]), sparse(nn.Linear(4, 3), zero_out=[0])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1))


def mlp(activation=nn.ReLU):
    return nn.Sequential(
        sparse(nn.Linear(6, 8), zero_out=[0, 3], keep_bias=True, zero_in=[5]),
        activation(),
        sparse(nn.Linear(8, 5), zero_in=[1]),
        activation(),
        nn.Linear(5, 2),
    )


def flattened():
    """A convolution, a BatchNorm, pooling, and a Linear layer on the flattened feature map."""
    return nn.Sequential(
        sparse(nn.Conv2d(3, 6, 3, bias=False), zero_out=[0, 2]),
        norm(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 9, 7),
        nn.ReLU(),
        nn.Linear(7, 2),
    )


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    sparse(layer.linear1, zero_out=range(6))
    return layer


IMAGE, FEATURES, TOKENS = (2, 3, 8, 8), (4, 6), (2, 5, 8)
CASES = {
    "mlp": (mlp, FEATURES, {"0": 3}),
    "mlp with sigmoid": (lambda: mlp(nn.Sigmoid), FEATURES, {"0": 3}),
    "flattened": (flattened, IMAGE, {"0": 2}),
    "residual": (Residual, IMAGE, {"stem": 1, "inner": 3}),
    "depthwise": (Depthwise, IMAGE, {"wide": 2}),
    "concatenated": (Concatenated, (3, 4), {"left": 1, "right": 1}),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), sparse(nn.Conv2d(4, 2, 1), zero_in=[3])),
        IMAGE,
        {"0": 1},
    ),
    "feed-forward of a transformer": (transformer, TOKENS, {"linear1": 6}),
    "grouped convolution": (
        lambda: nn.Sequential(sparse(nn.Conv2d(3, 6, 1), zero_out=[1]), sparse(nn.Conv2d(6, 4, 3, groups=2), zero_out=[0])),
        IMAGE,
        {},
    ),
    "nothing zeroed": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), FEATURES, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_zeroed_channels_are_removed_and_the_function_stays(case):
    torch.manual_seed(0)
    build, shape, removed = CASES[case]
    net = build()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(shape)
    small = compact(net, x)
    assert small.removed == removed
    assert small.inputs is None
    net.eval()
    for probe in (x, torch.randn(shape), 100 * torch.randn(shape)):
        expected = net(probe).detach()
        torch.testing.assert_close(small.model(probe), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(small.model) < count(net) if removed else count(small.model) == count(net)


def test_a_tied_layer_keeps_its_function():
    torch.manual_seed(0)
    net, x = Tied(), torch.randn(4, 6)
    torch.testing.assert_close(compact(net, x).model(x), net(x))


def test_a_removal_makes_further_channels_removable():
    torch.manual_seed(0)
    net = nn.Sequential(
        sparse(nn.Linear(6, 6), zero_in=[0]), nn.ReLU(), sparse(nn.Linear(6, 6), zero_out=[2]), nn.ReLU(), nn.Linear(6, 2)
    )
    with torch.no_grad():
        net[2].weight[:, 1] = 0
        net[2].weight[[0, 1, 3, 4, 5], 4] = 0  # only neuron 2 reads neuron 4, and nothing reads neuron 2
        net[2].weight[2, 4] = 1.0
        net[4].weight[:, 2] = 0
    small = compact(net, torch.randn(3, 6), inputs=True)
    assert small.removed == {"0": 2, "2": 1}
    assert small.inputs.tolist() == [1, 2, 3, 4, 5]


def test_a_constant_that_no_bias_can_replace_stays():
    torch.manual_seed(0)
    made = sparse(nn.Conv2d(3, 4, 1), zero_out=[1], keep_bias=True)
    with torch.no_grad():
        made.bias[1] = 0.7  # a constant map: next to the zeros of the padding it is not constant
    x = torch.randn(IMAGE)
    for padding, removed in ((1, {}), (0, {"0": 1})):
        net = nn.Sequential(copy.deepcopy(made), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding))
        small = compact(net, x)
        assert small.removed == removed
        torch.testing.assert_close(small.model(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_layer_keeps_one_channel():
    net = nn.Sequential(sparse(nn.Linear(3, 4), zero_out=range(4)), nn.ReLU(), nn.Linear(4, 2))
    small = compact(net, torch.randn(2, 3), inputs=True)
    assert (small.model[0].out_features, small.model[0].in_features) == (1, 1)
    torch.testing.assert_close(small.model(torch.randn(5, 1)), net(torch.randn(5, 3)))


def test_a_compacted_network_trains_and_loads_from_its_state_dict():
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    small = compact(flattened(), x).model
    again = load_compact(flattened(), small.state_dict()).eval()
    torch.testing.assert_close(again(x), small(x))
    assert (again[0].out_channels, again[1].num_features, again[5].in_features) == (4, 4, 36)
    deep = compact(Depthwise(), x).model
    again = load_compact(Depthwise(), deep.state_dict())
    torch.testing.assert_close(again(x), deep(x))
    small.train()
    small(x).sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match=r"unknown: \['9.weight'\], missing: \[\]"):
        load_compact(flattened(), {**small.state_dict(), "9.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=re.escape("0.weight must be at most of shape (6, 3, 3, 3), got (7, 3, 3, 3)")):
        load_compact(flattened(), {**small.state_dict(), "0.weight": torch.ones(7, 3, 3, 3)})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("foo.bias", torch.zeros(2), r"unknown: \['foo.bias'\]"),
        ("1.bias", torch.zeros(2), r"unknown: \['1.bias'\]"),
        ("0.bias", torch.zeros(3), r"0.bias must be of shape \(8,\), got \(3,\)"),
        ("2.bias", 3, "2.bias must be a tensor, got int"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(name, value, message):
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_compact(net, {"0.weight": torch.zeros(8, 4), **{k: v for k, v in before.items() if k != "0.weight"}, name: value})
    assert before.keys() == net.state_dict().keys() and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_a_bias_that_a_layer_got_for_constants_is_loaded():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    found = load_compact(net, {**net.state_dict(), "0.bias": torch.ones(8)})
    assert torch.equal(found[0].bias, torch.ones(8))


def test_inputs_that_are_not_features_are_refused():
    with pytest.raises(ValueError, match=r"inputs=True needs a model whose input goes to Linear layers only, got \['Conv2d'\]"):
        compact(flattened(), torch.randn(IMAGE), inputs=True)


def test_what_would_change_the_function_stays(monkeypatch):
    net = mlp()
    with torch.no_grad():  # positive, so that the ReLU behind passes every lost constant on
        for p in net.parameters():
            p.abs_()
    monkeypatch.setattr("proxopt_torch.compaction.slicing.add_to_bias", lambda *a: None)  # constants are lost
    small = compact(net, torch.randn(FEATURES))
    assert "outputs that differ by" in small.kept["0"]
    x = torch.randn(FEATURES)
    torch.testing.assert_close(small.model(x), net(x))
