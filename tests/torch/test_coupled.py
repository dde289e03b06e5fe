"""groups.coupled on small networks: what it puts into a group is what must be removed together."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proxopt import GroupL2, SparseGroupLasso
from proxopt_torch import ProxAdam, ProxSGD, compact, groups, sparsity_report
from proxopt_torch.dependencies import analyse, arguments, removable


class Residual(nn.Module):
    """A residual net with its norms registered before all convolutions, and a projection shortcut."""

    def __init__(self):
        super().__init__()
        self.bn0, self.bn1, self.bn2, self.bn3, self.bn4, self.bns = (nn.BatchNorm2d(n) for n in (6, 4, 6, 5, 8, 8))
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.conv1, self.conv2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.conv3, self.conv4 = nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.Conv2d(5, 8, 3, padding=1)
        self.short = nn.Conv2d(6, 8, 1, stride=2, bias=False)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(self.bns(self.short(x)) + self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x))))))
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """Inverted bottlenecks with depthwise convolutions and squeeze-and-excitation, as in MobileNets."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.project = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.fc((x + self.project(y)).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 10, dropout=0.0, batch_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 2), nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(self.encoder(x).mean(1))


class Concatenated(nn.Module):
    """Concatenated branches, one of them a grouped convolution, group norm, a transposed convolution and a flattened tail."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.norm, self.up = nn.GroupNorm(6, 12), nn.ConvTranspose2d(12, 3, 2)
        self.hidden, self.out = nn.Linear(3 * 25, 7), nn.Linear(7, 2)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = self.norm(torch.cat([x, F.relu(self.grouped(x))], 1))
        return self.out(F.relu(self.hidden(F.relu(self.up(x)).flatten(1))))


class Recurrent(nn.Module):
    """An embedding that is tied to the last layer, and two recurrent layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.gru = nn.Embedding(9, 6), nn.LSTM(6, 5), nn.GRU(5, 4)
        self.project, self.out = nn.Linear(4, 6), nn.Linear(6, 9)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(self.project(self.gru(self.lstm(self.embedding(x))[0])[0]))


class Autocast(nn.Module):
    """Layers of which some run inside a region of autocast."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 2)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3))
        return self.fc(x.float())


def llama():
    from architectures import from_transformers

    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3}
    return from_transformers("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=2, max_position_embeddings=16, **sizes)


def image(batch=2):
    return torch.randn(batch, 3, 8, 8)


def tokens(batch=2):
    return {"input_ids": torch.randint(0, 30, (batch, 7)), "use_cache": False}


ZOO = pytest.mark.zoo
# a model, its inputs, and the number of units of each kind that can be removed
MODELS = {
    "residual": (Residual, image, {"channels": 6 + 4 + 8 + 5}),
    "inverted": (Inverted, image, {"channels": 4 + 8 + 5}),
    # two channels of each group of the norm, with those of the grouped convolution that reads them
    "concatenated": (Concatenated, image, {"channels": 2 + 3 + 7}),
    "recurrent": (Recurrent, lambda batch=2: torch.randint(0, 9, (batch, 4)), {"channels": 6 + 5 + 4}),
    "encoder": (Encoder, lambda batch=2: torch.randn(batch, 5, 12), {"attention heads": 6, "hidden units": 20}),
    "autocast": (Autocast, image, {"channels": 6 + 5}),
    "llama": (llama, tokens, {"attention heads": 6, "hidden units": 40}),
}
every_model = pytest.mark.parametrize("name", [pytest.param(n, marks=ZOO) if n == "llama" else n for n in MODELS])


ANALYSED = {}  # the model of each name with its weights and its dependencies: the analysis takes longer than the tests


@pytest.fixture
def case(name, monkeypatch):
    build, inputs, counts = MODELS[name]
    torch.manual_seed(0)
    if name not in ANALYSED:
        model = build()
        randomise(model)
        given = arguments(inputs())
        ANALYSED[name] = model.eval(), copy.deepcopy(model.state_dict()), analyse(model, *given)
    model, weights, dependencies = ANALYSED[name]
    model.load_state_dict(weights)
    monkeypatch.setattr(groups.coupling, "analyse", lambda *_: dependencies)
    return model.eval(), inputs, counts


def randomise(model):
    """Norms with scales, shifts and statistics of their own: at their start they are the identity."""
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.ndim == 1 and p.is_floating_point() and "inv_freq" not in name:
                p.copy_(torch.rand_like(p) + 0.5)


def slices(found):
    """The entries of each group: (number of the problem, number of the unit, [(parameter, mask)])."""
    for number, group in enumerate(found):
        penalty = group.get("penalty")
        if penalty is None:
            continue
        params = [p for _, p in group["params"]]
        ids = penalty.groups.ids(params)
        for unit in range(penalty.groups.count(params)):
            yield number, unit, [(p, torch.as_tensor(i == unit)) for p, i in zip(params, ids)]


def zero(entries):
    with torch.no_grad():
        for p, mask in entries:
            p[mask] = 0.0


def call(model, inputs):
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def names(found):
    return [[name for name, _ in group["params"]] for group in found]


@every_model
def test_every_parameter_is_in_one_param_group(case):
    model, inputs, _ = case
    for penalty in (GroupL2(1e-3), SparseGroupLasso(1e-3)):
        found = groups.coupled(model, inputs(), penalty)
        assert sorted(id(p) for g in found for _, p in g["params"]) == sorted(map(id, model.parameters()))
        assert [g.get("joint", False) for g in found] == [True] * (len(found) - 1) + [False]


@every_model
def test_all_units_that_can_be_removed_are_groups(case):
    model, inputs, counts = case
    found = groups.coupled(model, inputs(), GroupL2(1e-3))
    total = {}
    for units in (u for of_problem in found.units.values() for u in of_problem):
        total[units.kind] = total.get(units.kind, 0) + units.count
    assert sum(total.values()) == sum(counts.values()), str(found)
    assert sum(1 for _ in slices(found)) == sum(counts.values())
    for kind in {"attention heads"} & set(counts):
        assert total[kind] == counts[kind]


@pytest.mark.parametrize("name", ["residual"])
def test_the_model_is_left_as_it_was(case):
    model, inputs, _ = case
    model.train()
    before = copy.deepcopy(model.state_dict())
    groups.coupled(model, inputs(), GroupL2(1e-3))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["residual"])
def test_units_that_zero_parameters_do_not_remove_are_left_out(case, monkeypatch):
    model, inputs, _ = case

    def never_the_stream(dependencies):
        found = removable(dependencies)
        stream = next(f for f in dependencies.families if ("stem.weight", 0) in f.places)
        found.units = np.setdiff1d(found.units, stream.units)
        return found

    monkeypatch.setattr(groups.coupling, "removable", never_the_stream)
    found = groups.coupled(model, inputs(), GroupL2(1e-3))
    assert "stem.weight" in names(found)[-1]
    assert "left out: 6 channels of stem: their output is not constant where their parameters are zero" in str(found)


@every_model
def test_any_unit_whose_group_is_zero_can_be_removed_alone(case):
    model, inputs, _ = case
    example = inputs()
    dependencies = groups.coupling.analyse()
    before = copy.deepcopy(model.state_dict())
    found = groups.coupled(model, example, GroupL2(1e-3))
    assert len(removable(dependencies).units) == 0
    for number, unit, entries in slices(found):
        zero(entries)
        removed = removable(dependencies).units
        assert len(removed) == 1, (names(found)[number], unit)
        model.load_state_dict(before)


@every_model
def test_compact_removes_a_third_of_the_units_whose_groups_are_zero(case):
    model, inputs, _ = case
    found = groups.coupled(model, inputs(), GroupL2(1e-3))
    chosen = [entries for _, unit, entries in slices(found) if unit % 3 == 1]
    for entries in chosen:
        zero(entries)
    result = compact(model, inputs())
    assert sum(result.removed.values()) >= len(chosen) > 0
    fresh = inputs(5)
    expected = call(model, fresh)
    assert (call(result.model, fresh) - expected).abs().max() < 1e-4 * expected.abs().max()


@every_model
def test_the_joint_prox_is_the_group_prox_of_each_unit(case):
    model, inputs, _ = case
    penalty = SparseGroupLasso(0.3, 0.2)
    found = groups.coupled(model, inputs(), penalty)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    for group in found[:-1]:
        params = [p.detach() for _, p in group["params"]]
        for p, new in zip([p for _, p in group["params"]], group["penalty"].prox(params, 0.4)):
            p.data.copy_(new)
    for _, _, entries in slices(found):
        old = torch.cat([before[id(p)][mask] for p, mask in entries])
        new = torch.cat([p.detach()[mask] for p, mask in entries])
        torch.testing.assert_close(new, penalty.prox(old, 0.4))


@pytest.mark.parametrize(
    ("name", "make"), [("residual", lambda g: ProxSGD(g, lr=0.05)), ("encoder", lambda g: ProxAdam(g, lr=0.01))]
)
def test_a_training_with_a_large_strength_leaves_what_compact_removes(case, make):
    model, inputs, _ = case
    optimizer = make(groups.coupled(model, inputs(), GroupL2(1e-2)))
    model.train()
    rows = []
    while not rows or any(row.living == row.groups for row in rows):  # ends, as the strength grows without bound
        optimizer.zero_grad()
        model(inputs(8)).square().mean().backward()
        optimizer.step()
        rows = [row for row in sparsity_report(optimizer).rows if row.groups]
        for group, row in zip(optimizer.param_groups, rows):
            group["strength"] *= 2.0 if row.living == row.groups else 1.0
    optimizer.eval()
    model.eval()
    result = compact(model, inputs())
    # each dimension keeps one unit, also where all of them are zero
    assert sum(result.removed.values()) >= sum(min(row.groups - row.living, row.groups - 1) for row in rows)
    fresh = inputs(3)
    torch.testing.assert_close(call(result.model, fresh), call(model, fresh), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual"])
def test_a_residual_stream_is_one_problem_with_its_norms_and_the_weights_of_all_blocks(case):
    model, inputs, _ = case
    found = groups.coupled(model, inputs(), GroupL2(1e-3))
    stream = next(n for n in names(found) if "stem.weight" in n)
    assert sorted(stream) == sorted(["stem.weight", "conv2.weight", "bn0.weight", "bn0.bias", "bn2.weight", "bn2.bias"])
    last = next(n for n in names(found) if "short.weight" in n)
    assert {"conv4.weight", "conv4.bias", "bn4.weight", "bn4.bias", "bns.weight", "bns.bias", "fc.weight"} < set(last)


@pytest.mark.parametrize("name", ["encoder"])
def test_in_a_transformer_heads_and_hidden_units_are_apart_and_add_up(case):
    model, inputs, _ = case
    x = inputs()
    heads = groups.coupled(model, x, GroupL2(1e-3), include="attention heads")
    hidden = groups.coupled(model, x, GroupL2(1e-2), include="hidden units")
    found = heads + hidden
    assert len(heads) == len(hidden) == 3 and len(found) == 5
    of_layer = [f"encoder.layers.0.self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight")]
    assert names(heads)[0] == of_layer
    assert names(hidden)[0] == [f"encoder.layers.0.{n}" for n in ("linear1.weight", "linear1.bias", "linear2.weight")]
    one = groups.coupled(model, x, GroupL2(1e-3), include="encoder.layers.1*", exclude="hidden units")
    assert names(one)[0] == [n.replace("layers.0", "layers.1") for n in of_layer] and len(one) == 2
    text = str(found)
    assert "attention heads" in text and "hidden units" in text and "not included" not in text
    assert "left out: " in text


@pytest.mark.parametrize("name", ["encoder"])
def test_a_head_of_the_groups_is_that_of_attention_heads(case):
    model, inputs, _ = case
    found = groups.coupled(model, inputs(), GroupL2(1e-3), include="attention heads")
    plain = groups.attention_heads(model, GroupL2(1e-3))
    for a, b in zip(found[:-1], plain[:-1]):
        params = [p.detach() for _, p in a["params"]]
        assert [n for n, _ in a["params"]] == [n for n, _ in b["params"]]
        assert all(np.array_equal(i, j) for i, j in zip(a["penalty"].groups.ids(params), b["penalty"].groups.ids(params)))


def test_a_model_that_cannot_be_traced_is_named():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) if x.sum().item() > 0 else x

    with pytest.raises(ValueError, match=r"model must be one that torch\.export can trace with example_inputs: "):
        groups.coupled(Branching(), torch.randn(2, 3), GroupL2(1.0))
