"""Parameters, gradients and states of any strides are updated like contiguous ones, and no other memory is overwritten."""

import copy
import math

import pytest
import torch
from torch import nn
from torch_cases import MAKERS

from proxopt import GroupL2, Groups, SparseGroupLasso
from proxopt_torch import ProxAdam, Proximal

NAN = float("nan")
SHAPE = (4, 3, 2, 2)


def inside_guards(strides):
    """A view of SHAPE with these strides into a buffer of NaN, and the buffer."""
    span = 1 + sum((n - 1) * s for n, s in zip(SHAPE, strides))
    buffer = torch.full((span + 16,), NAN, dtype=torch.float64)
    return torch.as_strided(buffer, SHAPE, strides, 8), buffer


LAYOUTS = {
    "contiguous": (12, 4, 2, 1),
    "channels last": (12, 1, 6, 3),
    "transposed": (1, 4, 24, 12),
    "slice of rows": (24, 4, 2, 1),
    "every other entry": (24, 8, 4, 2),
    "channels last slice": (36, 1, 18, 9),
}
PENALTIES = {
    "none": None,
    "sgl": SparseGroupLasso(0.3, 0.5, Groups.along((1, 2, 3))),
    "columns": GroupL2(0.3, Groups.along((0, 2, 3)), metric="exact"),
    "labels": GroupL2(0.3, Groups.labels([0, 1, 0, 1])),
}
BASES = {
    "Proximal(SGD)": lambda p, **k: Proximal(torch.optim.SGD(p, lr=0.05, momentum=0.5), **k),
    "Proximal(Adam)": lambda p, **k: Proximal(torch.optim.Adam(p, lr=0.01), **k),
}


def run(optimizer, p, layout, steps, seed):
    """Steps on noisy gradients of ||p - 1||^2 / 2 with the given strides."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        grad = p.detach() - 1 + torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        if layout == "expanded":
            grad = grad.mean((2, 3), keepdim=True).expand(SHAPE)
        elif layout == "contiguous":
            grad = grad.contiguous()
        elif layout is not None:
            grad = torch.empty_strided(SHAPE, layout, dtype=torch.float64).copy_(grad)
        p.grad = grad
        optimizer.step()


def started(strides):
    view, buffer = inside_guards(strides)
    view.copy_(torch.linspace(-1, 1, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE))
    return nn.Parameter(view), buffer


@pytest.mark.parametrize("name", [*MAKERS, *BASES])
def test_a_parameter_of_any_strides_takes_the_steps_of_its_contiguous_copy(name):
    make = {**MAKERS, **BASES}[name]
    fast = [(layout, gradients) for layout in LAYOUTS for gradients in ("contiguous", "expanded")]
    few = [("contiguous", "contiguous"), ("channels last", LAYOUTS["transposed"]), ("channels last slice", "contiguous")]
    for penalty in PENALTIES:
        ends = {}
        for layout, gradients in fast if penalty == "sgl" else few:
            p, buffer = started(LAYOUTS[layout])
            optimizer = make([p], penalty=PENALTIES[penalty])
            run(optimizer, p, gradients, 100 if penalty == "sgl" else 30, seed=0)
            optimizer.eval()
            ends[layout, gradients] = p.detach().clone()
            assert int(buffer.isnan().sum()) == buffer.numel() - p.numel(), (layout, gradients)
            expected = ends["contiguous", "expanded" if gradients == "expanded" else "contiguous"]
            torch.testing.assert_close(ends[layout, gradients], expected, rtol=1e-9, atol=1e-11)
            assert torch.equal(p == 0, expected == 0)


@pytest.mark.parametrize("name", [*MAKERS, *BASES])
def test_a_state_saved_in_another_layout_or_older_than_the_layout_continues(name):
    make = {**MAKERS, **BASES}[name]
    penalty = PENALTIES["sgl"]
    p, _ = started(LAYOUTS["contiguous"])
    optimizer = make([p], penalty=penalty)
    run(optimizer, p, None, 20, seed=0)
    saved, values = copy.deepcopy(optimizer.state_dict()), p.detach().clone()

    def continued(strides):
        q, buffer = started(strides)
        with torch.no_grad():
            q.copy_(values)
        other = make([q], penalty=penalty)
        other.load_state_dict(saved)
        run(other, q, None, 20, seed=1)
        assert int(buffer.isnan().sum()) == buffer.numel() - q.numel()
        return q

    ends = [continued(strides) for strides in LAYOUTS.values()]
    p.data = p.data.contiguous(memory_format=torch.channels_last)  # the effect of model.to(memory_format=...)
    run(optimizer, p, None, 20, seed=1)
    for end in (*ends, p):
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MAKERS)
def test_a_stack_of_tensors_of_any_strides_is_updated_like_contiguous_ones(name):
    ends = []
    for strides, changed in ((LAYOUTS["contiguous"], False), (LAYOUTS["channels last"], False), (LAYOUTS["contiguous"], True)):
        params = [started(strides)[0] for _ in range(6)]
        optimizer = MAKERS[name]([{"params": params, "penalty": PENALTIES["sgl"]}], foreach=True)
        generator = torch.Generator().manual_seed(0)
        for step in range(20):
            if changed and step == 10:
                for p in params:
                    p.data = p.data.contiguous(memory_format=torch.channels_last)
            for p in params:
                p.grad = p.detach() + torch.randn(SHAPE, generator=generator, dtype=torch.float64)
            optimizer.step()
        ends.append(torch.stack([p.detach() for p in params]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-11)


def test_a_fused_base_gets_dense_tensors_or_is_refused():
    results = []
    for fused, strides in ((False, LAYOUTS["contiguous"]), (True, LAYOUTS["contiguous"]), (True, LAYOUTS["channels last"])):
        p, _ = started(strides)
        optimizer = Proximal(torch.optim.Adam([p], lr=0.01, fused=fused), PENALTIES["sgl"])
        run(optimizer, p, "expanded", 20, seed=0)
        results.append(p.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-11)
    p, buffer = started(LAYOUTS["slice of rows"])
    before = buffer.clone()
    optimizer = Proximal(torch.optim.Adam([p], lr=0.01, fused=True), PENALTIES["sgl"])
    with pytest.raises(ValueError, match=r"fill one block of memory, got shape \(4, 3, 2, 2\) and strides .* fused=False"):
        run(optimizer, p, None, 1, seed=0)
    assert torch.equal(buffer.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_strided_view_trains_as_a_part_of_a_larger_weight():
    big = torch.randn(6, 8)
    before = big.clone()
    part = nn.Parameter(big[:, :3])
    optimizer = ProxAdam([part], lr=0.1)
    for _ in range(5):
        part.grad = torch.ones(6, 3)
        optimizer.step()
    assert torch.equal(big[:, 3:], before[:, 3:])
    assert not torch.equal(big[:, :3], before[:, :3])
