"""The prox for devices, which takes a fixed number of Newton steps, on the CPU."""

import pytest
import torch

from proxopt_torch.device import triton_steps
from proxopt_torch.device.exact import exact_shrink_


def shares(z, h, bound):
    """What the exact prox leaves of each entry, with the root by bisection in double precision."""
    y, a = z.double().abs(), h.double() * bound
    high = y.norm(dim=1, keepdim=True)
    low = 1e-30 * high
    for _ in range(60):
        middle = (low * high).sqrt()
        left = (y / (middle + a)).norm(dim=1, keepdim=True) > 1
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return torch.where((y / a).norm(dim=1, keepdim=True) > 1, low / (low + a), 0)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("decades", [0, 1, 3, 6, 10])
def test_the_fixed_number_of_steps_is_enough_for_steps_that_spread_over_decades(dtype, accuracy, decades):
    generator = torch.Generator().manual_seed(decades)
    for size in (1, 2, 20, 500):
        draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
        h = 10 ** (-decades * draw(200, size))
        for z in (10 ** (-2 * draw(200, size)), h * 10 ** (2 * draw(200, size) - 1), h.sqrt() * 10 ** (draw(200, size) - 0.5)):
            z = z * torch.where(draw(200, size) < 0.5, -1, 1)
            bound = 0.9 * (z / h).norm(dim=1).quantile(draw(1)).item()  # near the dual norms, or far below them
            x, steps = z.to(dtype, copy=True), h.to(dtype, copy=True)
            expected = x * shares(x, steps, bound)
            exact_shrink_(x, steps, bound, (1,))
            near = ((z / h).norm(dim=1) / bound - 1).abs()
            error = (x - expected).norm(dim=1) / expected.norm(dim=1).clamp_(min=1e-300)
            assert bool((error[near > 0.05] < accuracy).all()), error[near > 0.05].max()
            assert torch.equal(x == 0, expected == 0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_tiny_and_large_values_neither_underflow_nor_overflow(scale):
    z = torch.tensor([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0]]) * scale
    h = torch.ones(3, 2)
    exact_shrink_(z, h, scale, (1,))
    torch.testing.assert_close(z / scale, torch.tensor([[2.4, -3.2], [0.0, 0.0], [0.0, 0.0]]))
    assert not torch.signbit(z[1:]).any()


def test_nan_stays_nan_and_spares_other_groups():
    z = torch.tensor([[3.0, float("nan")], [3.0, 4.0]])
    exact_shrink_(z, torch.ones(2, 2), 1.0, (1,))
    assert z[0].isnan().all()
    torch.testing.assert_close(z[1], torch.tensor([2.4, 3.2]))


def test_the_switch_is_off_and_returns_to_what_it_was():
    assert not triton_steps._switch
    with triton_steps.enabled():
        assert triton_steps._switch
        with triton_steps.enabled(False):
            assert not triton_steps._switch
        assert triton_steps._switch
    assert not triton_steps._switch
