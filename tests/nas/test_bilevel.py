"""Architecture gradients against problems whose answer is known."""

import pytest
import torch
from nas.bilevel import gradients
from nas.bilevel.steps import CifarSteps
from nas.methods import registry
from nas.nets.torch.cnn import Supernet
from nas.space import spaces
from torch.nn import functional as F


def quadratic():
    """L_train = ||w - M a||^2 / 2 + (w . b)^2 / 2 and L_val = ||N w - a||^2 / 2, in double precision."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    m, n, b = draw(5, 3), draw(3, 5), draw(5)
    w, a = draw(5).requires_grad_(), draw(3).requires_grad_()
    train = lambda: ((w - m @ a) ** 2).sum() / 2 + (w @ b) ** 2 / 2
    valid = lambda: ((n @ w - a) ** 2).sum() / 2
    return m, n, b, w, a, train, valid


def test_first_order_takes_the_weights_as_they_are():
    _, n, _, w, a, _, valid = quadratic()
    (found,) = gradients.first_order([a], valid)
    torch.testing.assert_close(found, (a - n @ w).detach())
    assert w.grad is None and a.grad is None


@pytest.mark.parametrize("hessian", gradients.HESSIANS)
def test_second_order_is_the_gradient_through_one_step(hessian):
    m, n, b, w, a, train, valid = quadratic()
    before = w.detach().clone()
    lr, momentum = 0.1, torch.randn(5, dtype=torch.float64)
    direction = lambda grads: [g + 0.01 * w + 0.9 * momentum for g in grads]
    (found,) = gradients.second_order([a], [w], train, valid, lr, direction, hessian)
    with torch.no_grad():
        gradient = w - m @ a + b * (w @ b)
        moved = w - lr * (gradient + 0.01 * w + 0.9 * momentum)
        residual = n @ moved - a
        known = -residual + lr * m.T @ (n.T @ residual)  # d moved / d a = lr M
    torch.testing.assert_close(found, known, rtol=1e-8, atol=1e-8)
    assert torch.equal(w, before)


def test_small_differences_agree_with_the_exact_product_on_a_network(monkeypatch):
    monkeypatch.setattr(gradients, "RADIUS", 1e-6)
    torch.manual_seed(0)
    net = Supernet(spaces.get_space("cherry"), 2, 3).double()
    arch = [torch.full((len(net.space.paths(c)),), 0.5, dtype=torch.float64, requires_grad=True) for c in ("normal", "reduce")]
    batches = [(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(10, (4,))) for _ in range(2)]
    loss = lambda batch: lambda: F.cross_entropy(net(batch[0], dict(zip(("normal", "reduce"), arch))), batch[1])
    params = list(net.parameters())
    both = [gradients.second_order(arch, params, loss(batches[0]), loss(batches[1]), 0.1, hessian=h) for h in gradients.HESSIANS]
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)
    first = gradients.first_order(arch, loss(batches[1]))
    assert max(float((a - b).abs().max()) for a, b in zip(both[1], first)) > 1e-4


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(("name", "space"), [("darts", "S3"), ("sparse_supernet", "S1")])
def test_an_architecture_step_moves_the_architecture_and_nothing_else(name, space, order):
    torch.manual_seed(0)
    settings = type(registry.CIFAR[name].presets["paper"])(order=order)
    net = Supernet(spaces.get_space(space), 2, 3)
    steps = CifarSteps(net, registry.build(name, net, settings), settings)
    batch = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    steps.weights(batch)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    arch = [p.detach().clone() for p in steps.method.parameters]
    steps.architecture(0, batch, batch)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(torch.equal(a, p) for a, p in zip(arch, steps.method.parameters))


def test_an_unknown_product_is_named():
    *_, w, a, train, valid = quadratic()
    with pytest.raises(ValueError, match="hessian must be one of difference, exact, got 'rough'"):
        gradients.second_order([a], [w], train, valid, 0.1, hessian="rough")
