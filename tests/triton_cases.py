"""Steps with and without the Triton kernels, and groups of all kinds: for the interpreter and for a device."""

import torch
from torch import nn

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, ProxSGD
from proxopt_torch.device import triton_steps

METHODS = {
    "ProxSGD": lambda p, **k: ProxSGD(p, lr=0.05, **k),
    "ProxSGD tau": lambda p, **k: ProxSGD(p, lr=0.1, tau=5.0, **k),
    "HAPG": lambda p, **k: HAPG(p, lr=0.05, **k),
    "HAPG as printed": lambda p, **k: HAPG(p, lr=0.05, extrapolation="as_printed", **k),
    "ProxAdam": lambda p, **k: ProxAdam(p, **{"lr": 0.01, "weight_decay": 0.1, **k}),
    "ProxAdamW": lambda p, **k: ProxAdam(p, **{"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, **k}),
    "AdamHAPG": lambda p, **k: AdamHAPG(p, lr=0.01, **k),
}
METRICS = ("exact", "support", "median")


def steps(
    make,
    groups,
    on,
    count=3,
    dtype=torch.float32,
    layout=lambda x: x,
    gradient=None,
    between=None,
    device="cpu",
    **options,
):
    """The parameters at the prox point after steps along random gradients, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape, scale: torch.randn(shape, generator=generator) * scale
    params = [[nn.Parameter(layout(draw(shape, 0.1)).to(device, dtype)) for shape in shapes] for shapes, _ in groups]
    optimizer = make([{"params": p, **own} for p, (_, own) in zip(params, groups)], **options)
    everything = [p for group in params for p in group]
    with triton_steps.enabled(on):
        for i in range(count):
            for p in everything:
                # steps of Adam that differ within a group
                p.grad = (draw(p.shape, 0.01) * draw(p.shape, 1.0).exp()).to(device, dtype)
                if gradient:
                    gradient(i, p)
            optimizer.step()
            if between:
                between(i, optimizer)
    optimizer.eval()
    return [p.detach().cpu() for p in everything], optimizer


def check(make, groups, rtol=2e-5, atol=1e-7, device="cpu", **options):
    """Compare the kernels on a device with the CPU without them, values, zeros and states, and return the values."""
    ours = steps(make, groups, True, device=device, **options)
    before = triton_steps.calls.total()
    reference = steps(make, groups, False, **options)
    assert triton_steps.calls.total() == before
    for a, b in zip(ours[0], reference[0]):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
        assert torch.equal(a == 0, b == 0)
        assert not torch.signbit(a[a == 0]).any()
    for p, q in zip(*(o.state.values() for o in (ours[1], reference[1]))):
        for name in p:
            torch.testing.assert_close(p[name].cpu(), q[name], rtol=rtol, atol=atol, equal_nan=True)
    return ours[0]


def check_run(*arguments, **options):
    """``check``, and that the kernels ran."""
    before = triton_steps.calls.total()
    values = check(*arguments, **options)
    assert triton_steps.calls.total() > before
    return values


def sgl(strength, groups, metric=None, **options):
    return {"penalty": SparseGroupLasso(strength, 0.5, groups, metric=metric, **options)}


def many_kinds(metric):
    """Groups of all layouts and sizes, parameters without groups or penalty, and half of everything zeroed."""
    return [
        ([(5, 40), (3, 7)], sgl(0.03, Groups.along(1), metric)),
        ([(6, 4, 3, 3)], sgl(0.03, Groups.along((1, 2, 3)), metric)),
        ([(9, 5)], sgl(0.03, Groups.along(0), metric)),
        ([(30,), ()], {}),
        ([(4, 6)], {"penalty": L1(0.05)}),
        ([(4, 3)], {"penalty": GroupL2(0.05, Groups.whole(), metric=metric)}),
    ]


def joint(metric):
    """Channels of a weight with their norms and the inputs of the next weight, and two tensors that are one group."""
    channels = Groups.labels([range(4), range(4), [0, 0, 1, 2, 3]], axis=(0, 0, 1))
    return [
        ([(4, 3, 2), (4,), (3, 5)], {**sgl(0.05, channels, metric), "joint": True}),
        ([(3, 4), (5,)], {**sgl(0.02, None, metric), "joint": True}),
    ]


def large(metric):
    """Groups of more than 8192 entries, which are read in several passes."""
    return [
        ([(2, 8200)], sgl(0.002, Groups.along(1), metric)),
        ([(8193, 2)], sgl(0.002, Groups.along(0), metric)),
        ([(3, 4100), (3,)], {**sgl(0.002, Groups.labels([[0, 0, 0], [0, 0, 1]]), metric), "joint": True}),
    ]
