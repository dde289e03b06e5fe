"""The compiled loops on a CPU take the steps of the reference: for any layout, groups, metric and number of threads."""

import copy
import gc
import io
import itertools
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch_cases import MAKERS

from proxopt import L1, GroupL2, Groups, SparseGroupLasso, kernels
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD
from proxopt_torch import kernels as fused

if not kernels.available():
    pytest.skip("numba is not installed, or PROXOPT_KERNELS=0", allow_module_level=True)

FLOATS = (torch.float32, torch.float64)
RAGGED = Groups.labels([0, 1, 1, 2, 0, 1])


def strided(shape, order, dtype):
    """A random tensor of this shape whose axes lie in memory in this order."""
    x = torch.randn([shape[a] for a in order], dtype=dtype)
    return x.permute([order.index(a) for a in range(len(shape))])


def sgl(groups, metric, **options):
    return SparseGroupLasso(0.2, 0.4, groups, metric=metric, **options)


# shapes of one problem, the order of axes in memory, groups, and for all optimizers the metrics
CASES = {
    "rows": ([(6, 5, 3, 3)], (0, 1, 2, 3), Groups.along((1, 2, 3))),
    "rows, channels last": ([(6, 5, 3, 3)], (0, 2, 3, 1), Groups.along((1, 2, 3))),
    "columns": ([(40, 6)], (0, 1), Groups.along(0)),
    "columns, transposed": ([(40, 6)], (1, 0), Groups.along(0)),
    "input channels": ([(7, 6, 3, 3)], (0, 1, 2, 3), Groups.along((0, 2, 3))),
    "alternating": ([(4, 3, 2, 3, 2)], (0, 1, 2, 3, 4), Groups.along((0, 2, 4))),
    "long rows": ([(3, 5000)], (0, 1), Groups.along(1)),
    "whole": ([(9, 7)], (0, 1), None),
    "single entries": ([(5, 1)], (0, 1), Groups.along(1)),
    "no axes": ([()], (), None),
    "ragged rows": ([(6, 11)], (0, 1), RAGGED),
    "ragged columns": ([(11, 6)], (0, 1), Groups.labels([0, 1, 1, 2, 0, 1], axis=1)),
    "a label for each entry": ([(6, 2)], (1, 0), Groups.labels([[0, 1], [1, 2], [2, 0], [0, 0], [1, 1], [2, 1]], axis=None)),
    "channels with norms": ([(6, 5, 3, 3), (6,), (6,)], None, Groups.labels([range(6)] * 3, axis=0)),
    "joint, columns": ([(9, 6), (6,)], None, Groups.labels([range(6)] * 2, axis=(1, 0))),
    "joint, whole": ([(9, 6), (6,), ()], None, Groups.whole()),
}
METRICS = {"ProxSGD": [None], "ProxSGD tau": [None], "HAPG": [None]}
OPTIONS = {
    "ProxSGD": lambda p: ProxSGD(p, lr=0.1, rho=0.7, weight_decay=0.1),
    "ProxSGD tau": lambda p: ProxSGD(p, lr=0.3, tau=8.0),
    "HAPG": lambda p: HAPG(p, lr=0.1),
    "ProxAdam": lambda p: ProxAdam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "AdamHAPG": lambda p: AdamHAPG(p, lr=0.05, maximize=True),
}


def follow(fast, slow):
    """Give the parameters and states of one optimizer to another."""
    for group, other in zip(fast.param_groups, slow.param_groups):
        for p, q in zip(group["params"], other["params"]):
            q.data.copy_(p.data)
            q.grad = p.grad.clone()
            if p in fast.state:
                slow.state[q] = {k: v.clone() for k, v in fast.state[p].items()}


def tensors_of(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach().clone() for p in params] + [v for p in params for v in optimizer.state[p].values()]


def compare(make, params, penalty, joint, steps, monkeypatch, scale=0.1):
    """Take steps, and each of them by the reference too, from the same point; scale: the least that entries are compared to."""
    others = [nn.Parameter(p.detach().clone()) for p in params]
    fast, slow = (make([{"params": ps, "penalty": penalty, "joint": joint}]) for ps in (params, others))
    generator = torch.Generator().manual_seed(0)
    zeros = 0
    kernels.calls.clear()
    for _ in range(steps):
        for p in params:
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = torch.empty_like(p).copy_(p.detach() / 2 + 0.3 * noise)
        follow(fast, slow)
        before = [p.detach().clone() for p in params]
        fast.step()
        with kernels.enabled(False), monkeypatch.context() as patch:
            patch.setattr(fused, "fits", lambda group, entry: False)
            slow.step()
        size = max(scale, *(float(b.abs().max()) for b in before))
        for one, other in zip(tensors_of(fast), tensors_of(slow)):
            eps = torch.finfo(one.dtype).eps
            torch.testing.assert_close(one, other, rtol=200 * eps, atol=100 * eps * size)
            # a group is zeroed by one of them alone only where its norm is so close to the threshold that next to nothing is left
            differ = (one == 0) != (other == 0)
            assert float((one - other)[differ].abs().max() if differ.any() else 0) <= 64 * eps * size
        zeros += sum(int((p == 0).sum()) for p in params)
    return zeros


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_reference(name, case, monkeypatch):
    shapes, order, groups = CASES[case]
    torch.manual_seed(0)
    for dtype, metric in zip(itertools.cycle(FLOATS), METRICS.get(name, ["exact", "median", "support"])):
        params = [nn.Parameter(strided(s, order or tuple(range(len(s))), dtype)) for s in shapes]
        compare(OPTIONS[name], params, sgl(groups, metric), len(shapes) > 1, 12, monkeypatch)
        assert kernels.calls[OPTIONS[name](params).__class__.__name__] == 12


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "penalty",
    [
        None,
        L1(0.2),
        L1(torch.linspace(0, 0.5, 6).reshape(6, 1)),
        GroupL2(0.3, Groups.along(1), metric="exact", weights=torch.linspace(0, 2, 6)),
        GroupL2(torch.linspace(0, 0.5, 6).reshape(6, 1), Groups.along(1)),
        SparseGroupLasso(0.0, 0.5, Groups.along(1)),
        SparseGroupLasso(0.3, 1.0, Groups.along(1)),
        GroupL2(1.0, RAGGED, weights=torch.linspace(0, 0.5, 3)),
    ],
    ids=["none", "L1", "L1 array", "weights", "strengths", "strength 0", "l1_ratio 1", "label weights"],
)
def test_other_strengths_and_weights(name, penalty, monkeypatch):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(6, 7, dtype=torch.float64)) for _ in range(2)]
    compare(OPTIONS[name], params, penalty, False, 12, monkeypatch)
    assert sum(kernels.calls.values()) == 24  # and once a step the check of the gradients


@pytest.mark.parametrize(
    ("name", "metric"), [("ProxSGD", None), ("AdamHAPG", "exact"), ("ProxAdam", "support"), ("AdamHAPG", "median")]
)
def test_two_hundred_steps(name, metric, monkeypatch):
    torch.manual_seed(2)
    shapes = [(6, 5, 3, 3), (8, 30), (6, 40)]
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
    zeros = compare(OPTIONS[name], params, sgl(Groups.along(1), metric), False, 200, monkeypatch)
    assert zeros or name == "AdamHAPG"


@pytest.mark.parametrize("metric", ["exact", "median", "support"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_number_of_threads_changes_no_bit(metric, dtype):
    ends = []
    for threads in (1, 2, 3):
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((300, 500), (70, 3, 3, 3), (1, 60_000), (2000,))]
        optimizer = AdamHAPG([{"params": params, "penalty": sgl(Groups.along(0), metric)}], lr=0.05)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                for p in params:
                    p.grad = p.detach() * 0.3 + 0.1
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        ends.append([p.detach() for p in params])
    for others in ends[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ends[0], others))


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-15, 1e15, 1e18])
@pytest.mark.parametrize("metric", ["exact", "support"])
def test_tiny_and_huge_values(scale, metric, monkeypatch):
    torch.manual_seed(4)
    params = [nn.Parameter(torch.randn(6, 9) * scale * torch.logspace(-3, 0, 9))]
    for name, lr in (("ProxSGD", 0.1), ("ProxAdam", 0.1 * scale)):
        make = {"ProxSGD": lambda p: ProxSGD(p, lr=lr), "ProxAdam": lambda p: ProxAdam(p, lr=lr, eps=0.0)}[name]  # noqa: B023
        penalty = SparseGroupLasso(scale if name == "ProxSGD" else 1.0, 0.4, Groups.along(1), metric=metric)
        compare(make, params, penalty, False, 3, monkeypatch, scale)
        assert kernels.calls[make(params).__class__.__name__] == 3


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(name, bad, monkeypatch):
    monkeypatch.setattr(fused, "fits", lambda group, entry: False)
    ends = []
    for flag in (True, False):
        params = [nn.Parameter(torch.arange(12.0).reshape(3, 4) - 5)]
        optimizer = OPTIONS[name]([{"params": params, "penalty": sgl(Groups.along(1), None), "check_finite": False}])
        params[0].grad = torch.ones(3, 4)
        params[0].grad[1, 2] = bad
        with kernels.enabled(flag):
            optimizer.step()
        ends.append(params[0].detach())
        checked = OPTIONS[name]([{"params": params, "penalty": sgl(Groups.along(1), None)}])
        before = params[0].detach().clone()
        with kernels.enabled(flag), pytest.raises(ValueError, match="must be finite, got"):
            checked.step()
        torch.testing.assert_close(params[0].detach(), before, equal_nan=True, rtol=0, atol=0)
        assert not checked.state
    torch.testing.assert_close(*(e[[0, 2]] for e in ends))
    assert torch.equal(ends[0][1].isfinite(), ends[1][1].isfinite())


@pytest.mark.parametrize("name", MAKERS)
def test_checkpoints_resume_with_the_loops_on_and_off(name):
    def made(params):
        return MAKERS[name]([{"params": params, "penalty": SparseGroupLasso(0.1, 0.5, Groups.along(0))}])

    def run(optimizer, params, steps):
        for _ in range(steps):
            for i, p in enumerate(params):
                p.grad = p.detach() - 0.1 * i
            optimizer.step()

    torch.manual_seed(5)
    params = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(6)]
    ends = []
    for first, second in itertools.product((True, False), repeat=2):
        mine = copy.deepcopy(params)
        with kernels.enabled(first):
            optimizer = made(mine)
            run(optimizer, mine, 5)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = made(mine)
        again.load_state_dict(torch.load(file, weights_only=True))
        with kernels.enabled(second):
            run(again, mine, 5)
        again.eval()
        ends.append([p.detach() for p in mine])
    for other in ends[1:]:
        for p, q in zip(ends[0], other):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_what_moves_between_steps_is_found(monkeypatch):
    torch.manual_seed(6)
    params = [nn.Parameter(torch.randn(5, 5, dtype=torch.float64)) for _ in range(3)]
    others = copy.deepcopy(params)
    fast, slow = (ProxAdam([{"params": p, "penalty": GroupL2(0.1, Groups.along(1))}], lr=0.1) for p in (params, others))
    changes = [
        lambda p, o: None,
        lambda p, o: setattr(p[0], "data", p[0].data.t()),  # other strides in the same memory
        lambda p, o: setattr(p[1], "data", p[1].data.clone()),
        lambda p, o: setattr(p[2], "grad", None),
        lambda p, o: o.state[p[1]].update(exp_avg=o.state[p[1]]["exp_avg"] * 0.5),
        lambda p, o: setattr(p[0], "grad", torch.ones((), dtype=torch.float64).expand(5, 5)),
        lambda p, o: o.param_groups[0].update(strength=0.3, lr=torch.tensor(0.02)),
        lambda p, o: o.param_groups[0]["params"].pop(),
    ]
    for change in changes:
        for ps, optimizer, flag in ((params, fast, True), (others, slow, False)):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.detach() - 0.2
            change(ps, optimizer)
            with kernels.enabled(flag):
                optimizer.step()
        for p, q in zip(params, others):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def of_state(p, optimizer):
    return next(value for key, value in optimizer.state[p].items() if key != "step")


@pytest.mark.parametrize("replaced", [lambda p, o: p, lambda p, o: p.grad, of_state], ids=["parameter", "gradient", "state"])
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_step_reads_beyond_a_tensor_that_was_made_smaller(name, on, replaced):
    p, other = nn.Parameter(torch.randn(1 << 20)), nn.Parameter(torch.randn(3))
    optimizer = OPTIONS[name]([p, other])
    p.grad, other.grad = torch.randn_like(p), torch.randn_like(other)
    with kernels.enabled(on):
        optimizer.step()
        replaced(p, optimizer).data = torch.randn(5)
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step()


@pytest.mark.parametrize("name", ["ProxSGD", "ProxAdam"])
def test_a_strength_may_change_between_an_array_and_a_number(name):
    columns, rows = Groups.along(0), Groups.along(1)
    penalties = [L1(torch.rand(6, 8)), L1(0.1), L1(torch.rand(1, 8)), L1(0.2)]
    penalties += [GroupL2(torch.rand(6, 1), rows), GroupL2(0.3, rows), GroupL2(0.3, rows, weights=torch.rand(6))]
    penalties += [GroupL2(0.3, columns, weights="none"), GroupL2(0.3, columns), GroupL2(0.4, columns)]
    results = []
    for on in (True, False):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 8))
        optimizer = OPTIONS[name]([p])
        for penalty in penalties:
            optimizer.param_groups[0]["penalty"] = penalty
            with kernels.enabled(on):
                for _ in range(2):
                    p.grad = torch.randn_like(p)
                    optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_an_update_that_a_subclass_overrides_is_used():
    class Backwards(ProxSGD):
        def update(self, group, penalty, x, grad, state, count):
            return x + group["lr"] * grad, state

    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    Backwards([p], lr=0.5).step()
    assert torch.equal(p.detach(), torch.full((4,), 0.5))


def test_gradients_are_not_kept_and_changes_are_seen_by_autograd():
    w = nn.Parameter(torch.ones(4, 3))
    optimizer = ProxAdam([w], penalty=L1(0.1))
    loss = (w**2).sum()
    loss.backward(retain_graph=True)
    grad = weakref.ref(w.grad)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.zero_grad()
    gc.collect()
    assert grad() is None


def test_what_the_loops_cannot_take_is_updated_as_before():
    kernels.calls.clear()
    wide = torch.zeros(4, 6)
    params = [
        nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16)),
        nn.Parameter(wide[:, ::2]),
        nn.Parameter(torch.ones(0, 3)),
        nn.Parameter(torch.ones(3)),
    ]
    optimizer = HAPG([{"params": params, "penalty": GroupL2(0.1, Groups.along(0))}], lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert kernels.calls["HAPG"] == 1
    assert all(int(optimizer.state[p]["step"]) == 1 for p in params)
    assert not wide[:, 1::2].any() and wide[:, ::2].any()


@pytest.mark.parametrize("fused_base", [False, True])
def test_proximal_takes_the_prox_of_all_tensors_in_one_call(fused_base):
    ends = []
    for flag in (True, False):
        torch.manual_seed(7)
        params = [nn.Parameter(torch.randn(3, 4)) for _ in range(5)]
        base = torch.optim.Adam([{"params": params, "penalty": sgl(Groups.along(0), None)}], lr=0.1, fused=fused_base)
        optimizer = Proximal(base)
        kernels.calls.clear()
        with kernels.enabled(flag):
            for _ in range(10):
                for p in params:
                    p.grad = p.detach() * 0.5
                optimizer.step()
        assert kernels.calls["Proximal"] == (10 if flag else 0)
        ends.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*ends)
    assert torch.equal(ends[0] == 0, ends[1] == 0)


# torch's own threads do not survive a fork: the child calls no operation of torch on a large tensor
FORKED = """
import os, numpy, torch
from proxopt import L1, kernels
from proxopt_torch import ProxAdam
torch.set_num_threads(2)
values = numpy.ones((400, 500), numpy.float32)
w = torch.nn.Parameter(torch.from_numpy(values))
w.grad = torch.from_numpy(numpy.ones_like(values))
optimizer = ProxAdam([w], penalty=L1(0.1))
optimizer.step()
child = os.fork()
optimizer.step()
if child == 0:
    os._exit(0 if kernels.calls["ProxAdam"] == 2 and values.max() < 0.999 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
OFF = """
import sys, torch
from proxopt import L1, kernels
from proxopt_torch import ProxAdam
w = torch.nn.Parameter(torch.ones(4))
optimizer = ProxAdam([w], penalty=L1(0.1))
w.grad = torch.ones_like(w)
assert "numba" not in sys.modules
optimizer.step()
assert not kernels.calls and "numba" not in sys.modules
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


def test_the_environment_switches_the_loops_off():
    subprocess.run([sys.executable, "-c", OFF], check=True, env={**os.environ, "PROXOPT_KERNELS": "0"})
