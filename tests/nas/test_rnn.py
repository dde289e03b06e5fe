"""Recurrent networks: against the published code, against NumPy, and what their functions of their own must keep to."""

import functools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from nas.bilevel.steps import TextSteps
from nas.data import text
from nas.methods import darts, registry
from nas.methods.settings import darts as darts_settings
from nas.nets.torch import recurrent_kernels, rnn
from nas.space import spaces
from nas.space.genotype import RecurrentGenotype, load_genotype
from nas.train import train_text
from nas.train.settings import TextTrainSettings

PTB = 10_000
EVERY = rnn.Drops(embedding=0.2, input=0.75, hidden=0.25, output=0.75)


def supernet(space="recurrent", words=20, hidden=6, drops=None, dtype=torch.float64):
    torch.manual_seed(0)
    net = rnn.RecurrentSupernet(spaces.get_space(space, RecurrentGenotype), words, hidden, drops)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20)  # far from the linear part of the activations
    return net.to(dtype)


def published_model(net, softmax=False):
    """The published model with the weights of ours."""
    from naive_rnn import NaiveLanguageModel

    naive = NaiveLanguageModel(len(net.embedding), net.hidden, softmax).to(net.embedding.dtype)
    with torch.no_grad():
        naive.encoder.weight.copy_(net.embedding)
        naive.decoder.bias.copy_(net.bias)
        naive.cell.w0.copy_(net.entry)
        for p, q in zip(naive.cell.ws, net.products.values()):
            p.copy_(q)
    return naive


def sequence(words=20, rows=7, batch=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(words, (rows, batch), generator=generator), torch.randint(words, (rows, batch), generator=generator)


def masks_of(dropped):
    return dropped.embedding, dropped.input, dropped.hidden, dropped.output


@pytest.mark.parametrize("softmax", [False, True])
def test_the_supernet_is_the_published_one(softmax):
    net = supernet(drops=EVERY)
    naive = published_model(net, softmax)
    weights = naive.weights.detach().flatten().clone().requires_grad_()
    given = darts.edge_softmax(net.space, {"recurrent": weights}) if softmax else {"recurrent": weights}
    words, targets = sequence()
    dropped = net.draw(5)
    state = 0.1 * torch.randn(5, 6, dtype=torch.float64)
    loss, states, last = net.loss(words, targets, state, dropped, given)
    log_prob, hidden, raw = naive(words, state, masks_of(dropped))
    expected = torch.nn.functional.nll_loss(log_prob.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(states, raw)
    torch.testing.assert_close(last, hidden)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(weights.grad, naive.weights.grad.flatten(), rtol=1e-6, atol=1e-10)
    pairs = [(net.embedding, naive.encoder.weight), (net.bias, naive.decoder.bias), (net.entry, naive.cell.w0)]
    for ours, published in (*pairs, *zip(net.products.values(), naive.cell.ws)):
        torch.testing.assert_close(ours.grad, published.grad, rtol=1e-6, atol=1e-10)


def test_float32_agrees_to_rounding():
    wide, narrow = supernet(drops=EVERY), supernet(drops=EVERY, dtype=torch.float32)
    words, targets = sequence(rows=3)
    dropped = wide.draw(5)
    single = rnn.Dropped(*(None if m is None else m.float() for m in dropped))
    a, _, _ = wide.loss(words, targets, wide.start(5), dropped)
    b, _, _ = narrow.loss(words, targets, narrow.start(5), single)
    torch.testing.assert_close(a.float(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_architecture_gradient_is_the_published_one(order, monkeypatch):
    from naive_rnn import NaiveTextSearch

    net = supernet(drops=EVERY)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.2)
    naive = published_model(net)
    settings = darts_settings.DartsTextSettings(batch=5, hidden=6, order=order, space="recurrent")
    method = registry.build("sparse_supernet", net, registry.TEXT["sparse_supernet"].presets["paper"])
    steps = TextSteps(net, method, settings)
    with torch.no_grad():
        method.parameters[0].data = naive.weights.flatten().clone()
    train, valid = sequence(seed=2), sequence(seed=3)
    drawn = [net.draw(5), net.draw(5)]
    left = iter(drawn)
    monkeypatch.setattr(net, "draw", lambda batch: next(left))
    found = []
    monkeypatch.setattr(method, "update", found.extend)
    loop = NaiveTextSearch(naive, 5, second_order=order == "second")
    loop.hidden = loop.hidden_valid = torch.zeros(5, 6, dtype=torch.float64)
    loop.sgd.param_groups[0]["lr"] = 20.0 * 7 / 35
    expected = loop.architecture_gradient(train, valid, [masks_of(d) for d in drawn])
    steps.architecture(0, train, valid)
    torch.testing.assert_close(found[0], expected.flatten(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(steps.state["valid"], loop.hidden_valid)
    assert steps.sgd.param_groups[0]["lr"] == settings.lr, "a short window takes a short step, and only it"


def test_a_weight_step_is_the_published_one(monkeypatch):
    from naive_rnn import NaiveTextSearch

    net = supernet(drops=EVERY)
    naive = published_model(net)
    method = registry.build("sparse_supernet", net, registry.TEXT["sparse_supernet"].presets["paper"])
    steps = TextSteps(net, method, darts_settings.DartsTextSettings(batch=5, hidden=6, lr=2.0))
    with torch.no_grad():
        method.parameters[0].data = naive.weights.flatten().clone()
    loop = NaiveTextSearch(naive, 5)
    loop.hidden = torch.zeros(5, 6, dtype=torch.float64)
    loop.sgd.param_groups[0]["lr"] = 2.0 * 7 / 35
    for number in range(3):
        batch, dropped = sequence(seed=number), net.draw(5)
        monkeypatch.setattr(net, "draw", lambda batch, drawn=dropped: drawn)
        steps.weights(batch)
        loop.sgd.zero_grad()
        loss, loop.hidden, raw = loop.loss(*batch, loop.hidden, masks_of(dropped))
        (loss + 1e-3 * (raw[1:] - raw[:-1]).pow(2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(naive.parts(), 0.25)
        loop.sgd.step()
    torch.testing.assert_close(net.embedding.detach(), naive.encoder.weight.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(net.products["8"].detach(), naive.cell.ws[7].detach(), rtol=1e-6, atol=1e-9)


def test_parameters_and_groups_are_those_of_the_papers():
    space = spaces.get_space("recurrent", RecurrentGenotype)
    with torch.device("meta"):
        assert rnn.parameter_count(rnn.RecurrentSupernet(space, PTB, 300)) == 4_810_000
        for name in ("DARTS_V1", "DARTS_V2"):
            assert rnn.parameter_count(rnn.RecurrentNetwork(load_genotype(name, RecurrentGenotype), PTB, 850)) == 22_960_000
    nodes = space.nodes("recurrent")
    assert [nodes.count(n) for n in range(1, 9)] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert len(space.layout.edges) == 36


def plain_cell(net, genotype, x, h):
    """The cell of a genotype, path by path, in NumPy."""
    functions = {"tanh": np.tanh, "relu": lambda v: np.maximum(v, 0), "identity": lambda v: v}
    sigmoid = functions["sigmoid"] = lambda v: 1 / (1 + np.exp(-v))
    value = lambda p: p.detach().numpy()
    c, d = np.split(np.concatenate([x, h], 1) @ value(net.entry), 2, 1)
    states = {0: h + sigmoid(c) * (np.tanh(d) - h)}
    for node in genotype.active_nodes("recurrent"):
        terms = []
        for path in genotype.paths("recurrent"):
            if path.node == node:
                s = states[path.source]
                c, d = np.split(s @ value(net.products[str(node)]), 2, 1)
                terms.append(s + sigmoid(c) * (functions[path.operation](d) - s))
        states[node] = np.mean(terms, axis=0)
    return np.mean([states[n] for n in genotype.active_nodes("recurrent")], axis=0)


SEVERAL = RecurrentGenotype(
    {"1": [["tanh", 0], ["relu", 0]], "3": [["sigmoid", 1], ["identity", 0], ["tanh", 1]], "7": [["identity", 3]]}
)


@pytest.mark.parametrize(
    "genotype", [SEVERAL, load_genotype("darts_v1", RecurrentGenotype), load_genotype("DARTS_V2", RecurrentGenotype)]
)
def test_a_derived_cell_is_the_mean_of_its_paths(genotype):
    torch.manual_seed(0)
    net = rnn.RecurrentNetwork(genotype, 20, 6).double()
    words, _ = sequence()
    states, last = net(words, net.start(5))
    h, embedding = np.zeros((5, 6)), net.embedding.detach().numpy()
    for row, state in zip(words, states):
        h = plain_cell(net, genotype, embedding[row.numpy()], h)
        np.testing.assert_allclose(state.detach().numpy(), h, rtol=1e-10, atol=1e-12)
    assert torch.equal(last, states[-1])


def test_what_leads_nowhere_is_left_out():
    genotype = RecurrentGenotype({"1": [["tanh", 0]], "3": [["relu", 2], ["relu", 1]], "5": [["tanh", 2]]})
    net = rnn.RecurrentNetwork(genotype, 20, 6)
    assert set(net.products) == {"1", "3"}
    with pytest.raises(ValueError, match="no path of the genotype reaches the input"):
        rnn.RecurrentNetwork(RecurrentGenotype({"5": [["tanh", 2]]}), 20, 6)


def test_inactive_paths_are_not_computed_and_inactive_nodes_do_not_enter_the_mean():
    net = supernet(words=20)
    paths = net.space.paths("recurrent")
    torch.manual_seed(3)
    a = torch.randn(144, dtype=torch.float64)
    a[[i for i, p in enumerate(paths) if p.node == 4 or torch.rand(()) < 0.7]] = 0.0
    a[0] = 1.0  # a path from the input: node 1 is active
    words, targets = sequence()
    active = {"recurrent": tuple((a != 0).tolist())}
    nodes = {p.node for p, w in zip(paths, a) if w != 0}
    assert 4 not in nodes
    found, _, _ = net.loss(words, targets, net.start(5), None, {"recurrent": a}, active)
    found.backward()
    assert all((net.products[str(n)].grad is not None) == (n in nodes) for n in range(1, 9))
    mask = {"recurrent": tuple(p.node in nodes and p.source in {0, *nodes} for p in paths)}
    again, _, _ = net.loss(words, targets, net.start(5), None, {"recurrent": a}, mask)
    torch.testing.assert_close(found, again)
    with pytest.raises(ValueError, match="no path is active in the recurrent cell"):
        net(words, net.start(5), None, {"recurrent": a}, {"recurrent": (False,) * 144})
    with pytest.raises(ValueError, match=r"weights have shape \(144,\), got \(98,\)"):
        net(words, net.start(5), None, {"recurrent": torch.zeros(98)})


def test_zero_takes_a_share_of_the_softmax_and_nothing_else():
    net = supernet("recurrent_zero")
    paths = net.space.paths("recurrent")
    assert len(paths) == 180
    a = torch.rand(180, dtype=torch.float64)
    words, _ = sequence()
    states, _ = net(words, net.start(5), None, {"recurrent": a})
    without = supernet("recurrent")
    kept = torch.tensor([p.operation != "none" for p in paths])
    torch.testing.assert_close(states, without(words, without.start(5), None, {"recurrent": a[kept]})[0])


@pytest.mark.parametrize("used", [(0, 1, 2, 3), (1,), (0, 3), (2,)])
@pytest.mark.parametrize("masked", [True, False])
def test_a_node_of_its_own_is_the_one_written_out(used, masked):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    mixing, weight, sources = draw(3, 4), draw(5, 10), [draw(4, 5) for _ in range(3)]
    mask = torch.rand(4, 5, dtype=torch.float64) if masked else None
    inputs = [mixing, weight, *sources]
    ours = recurrent_kernels.node(used, mixing, weight, mask, sources)
    assert type(ours.grad_fn).__name__ == "_NodeBackward"
    plain = recurrent_kernels.node_reference(used, mixing, weight, mask, sources)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad)):
        torch.testing.assert_close(a, b)
    function = lambda mixing, weight, *sources: recurrent_kernels.node(used, mixing, weight, mask, sources)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_the_exact_product_is_that_of_small_differences(monkeypatch):
    """Sources are made of one another, and the decoder is the embedding: second derivatives must count each way once."""
    from nas.bilevel import gradients

    monkeypatch.setattr(gradients, "RADIUS", 1e-5)
    net = supernet()
    a = torch.rand(144, dtype=torch.float64, requires_grad=True)
    train, valid = sequence(rows=3, seed=4), sequence(rows=3, seed=5)
    on = lambda batch: lambda: net.loss(*batch, net.start(5), None, {"recurrent": a})[0]
    second = lambda h: gradients.second_order([a], list(net.parameters()), on(train), on(valid), 0.1, hessian=h)
    one, two = map(second, gradients.HESSIANS)
    first = gradients.first_order([a], on(valid))
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-8)
    assert float((one[0] - first[0]).abs().max()) > 1e-4


def test_the_loss_over_a_vocabulary_is_cross_entropy(monkeypatch):
    monkeypatch.setattr(recurrent_kernels, "ROWS", 4)
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    inputs, targets = [draw(10, 3), draw(7, 3), draw(7)], torch.randint(7, (10,))
    plain = lambda x, w, b: torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w, b), targets)
    ours = lambda x, w, b: recurrent_kernels.vocabulary_loss(x, w, b, targets)
    torch.testing.assert_close(ours(*inputs), plain(*inputs))
    for a, b in zip(torch.autograd.grad(2 * ours(*inputs), inputs), torch.autograd.grad(2 * plain(*inputs), inputs)):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(ours, inputs)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), plain(*inputs))
        huge = [1e4 * inputs[0], *inputs[1:]]
        torch.testing.assert_close(ours(*huge), plain(*huge))


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 300, 600), (3, 5, 2), (0, 4, 3)])
def test_a_product_is_a_product(shape):
    rows, inner, columns = shape
    torch.manual_seed(0)
    x, y = torch.randn(rows, inner, requires_grad=True), torch.randn(inner, columns, requires_grad=True)
    torch.testing.assert_close(recurrent_kernels.product(x, y), x @ y, rtol=1e-4, atol=1e-4)
    grad = torch.randn(rows, columns)
    for a, b in zip(torch.autograd.grad(recurrent_kernels.product(x, y), (x, y), grad), torch.autograd.grad(x @ y, (x, y), grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_lstm_is_pytorchs():
    torch.manual_seed(0)
    net = rnn.LSTM(20, 6).double()
    other = torch.nn.LSTM(6, 6).double()
    taken, kept, shown, new = net.entry.detach().chunk(4, 1)
    columns = torch.cat([taken, kept, new, shown], 1).t()  # PyTorch's order of gates
    with torch.no_grad():
        other.weight_ih_l0.copy_(columns[:, :6])
        other.weight_hh_l0.copy_(columns[:, 6:])
        for bias in (other.bias_ih_l0, other.bias_hh_l0):
            bias.zero_()
    words, _ = sequence()
    states, last = net(words, net.start(5))
    expected, (h, c) = other(net.embedding[words])
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(last, torch.cat([h, c]))


def test_the_perplexity_is_that_of_the_published_loop():
    net = rnn.RecurrentNetwork(load_genotype("DARTS_V2", RecurrentGenotype), 20, 6, EVERY).double()
    rows = torch.randint(20, (23, 4))
    naive, state = 0.0, net.start(4)
    for start in range(0, 22, 5):
        length = min(5, 22 - start)
        states, state = net(rows[start : start + length], state)
        scores = (states @ net.embedding.t() + net.bias).flatten(0, 1)
        naive += length * torch.nn.functional.cross_entropy(scores, rows[start + 1 : start + 1 + length].flatten()).item()
    net.train()
    assert rnn.mean_loss(net, rows, 5) == pytest.approx(naive / 23, rel=1e-10)
    assert net.training
    assert text.perplexity(1e4) == float("inf") and np.isnan(text.perplexity(float("nan")))


BUILDS = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.commands, BUILDS])])
def test_a_compiled_node_gives_the_same(backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    net = supernet(drops=EVERY, dtype=torch.float32)
    words, targets = sequence(rows=2)
    dropped = net.draw(5)
    a = torch.zeros(144)
    a[:12] = 0.5
    active = {"recurrent": tuple((a != 0).tolist())}
    eager, _, _ = net.loss(words, targets, net.start(5), dropped, {"recurrent": a}, active)
    net.fuse()
    compiled, _, _ = net.loss(words, targets, net.start(5), dropped, {"recurrent": a}, active)
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    compiled.backward()
    assert torch.isfinite(net.products["1"].grad).all()


def test_counts_without_training(capsys):
    import train_ptb

    train_ptb.main(["--count"])
    assert json.loads(capsys.readouterr().out) == {"parameters": 22_960_000, "vocabulary": 10_000}
    counted = train_text.size_of_cell(None, TextTrainSettings(hidden=10))
    assert counted["parameters"] == 10_000 * 11 + 20 * 40 + 40
