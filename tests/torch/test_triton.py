"""The Triton kernels in Triton's interpreter, on CPU tensors: they equal the optimizers without them.

Needs Triton and the environment variable: TRITON_INTERPRET=1 python -m pytest tests/torch/test_triton.py
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_cases import METHODS, METRICS, check, check_run, joint, large, many_kinds, sgl, steps

from proxopt import ElasticNet, GroupL2, Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, ProxSGD
from proxopt_torch.device import triton_steps

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, for divisions by zero in lanes that are not used
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_equals_the_reference(method, metric):
    values = check_run(METHODS[method], many_kinds(metric))
    assert any(bool((v == 0).any()) for v in values) and any(bool((v != 0).any()) for v in values)


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
    method=st.sampled_from(sorted(METHODS)),
    metric=st.sampled_from((None, *METRICS)),
    weights=st.sampled_from(("sqrt_size", "inverse_sqrt_size", "none")),
    strength=st.sampled_from((0.0, 0.01, 0.05, 1.0)),
    permuted=st.booleans(),
)
def test_shapes_groups_and_layouts(shape, data, method, metric, weights, strength, permuted):
    ndim = len(shape)
    kind = data.draw(st.sampled_from(("along", "labels", "labels of entries", "whole")))
    if kind == "along":
        groups = Groups.along(tuple(data.draw(st.sets(st.integers(0, ndim - 1), min_size=1))))
    elif kind == "labels":
        axis = data.draw(st.integers(0, ndim - 1))
        groups = Groups.labels(data.draw(st.lists(st.integers(0, 2), min_size=shape[axis], max_size=shape[axis])), axis)
    elif kind == "labels of entries":
        groups = Groups.labels(torch.randint(3, shape, generator=torch.Generator().manual_seed(len(shape))).numpy(), axis=None)
    else:
        groups = Groups.whole()
    order = data.draw(st.permutations(range(ndim))) if permuted else range(ndim)
    inverse = sorted(range(ndim), key=lambda i: order[i])
    layout = lambda x: x.permute(*order).contiguous().permute(*inverse)
    check(METHODS[method], [([tuple(shape)], sgl(strength, groups, metric, weights=weights))], layout=layout, count=2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", ["ProxSGD", "ProxAdam", "AdamHAPG"])
def test_joint_groups_span_tensors(method, metric):
    check_run(METHODS[method], joint(metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", ["ProxSGD", "ProxAdam", "AdamHAPG"])
def test_large_groups_are_read_in_several_passes(method, metric):
    values = check_run(METHODS[method], large(metric), count=1, weight_decay=0.0)
    assert any(bool((v == 0).any()) for v in values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["ProxSGD", "HAPG", "ProxAdam", "AdamHAPG"])
def test_half_precision_has_states_in_single_precision(method, dtype):
    groups = [([(5, 40), (9, 3)], sgl(0.03, Groups.along(1))), ([(7,)], {})]
    eps = torch.finfo(dtype).eps
    count = (
        1 if dtype == torch.bfloat16 else 3
    )  # the interpreter truncates where a device rounds to nearest: one unit in each step
    before = triton_steps.calls.total()
    ours, _ = steps(METHODS[method], groups, True, count, dtype, weight_decay=0.0)
    assert triton_steps.calls.total() > before
    reference, _ = steps(METHODS[method], groups, False, count, dtype, weight_decay=0.0)
    for a, b in zip(ours, reference):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=1e-6)
        assert torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", ["ProxSGD", "HAPG", "ProxAdam", "AdamHAPG"])
def test_nan_and_zero_gradients(method, metric):
    def gradient(i, p):
        p.grad[0] = 0
        p.grad[1, 0] = float("nan") if i == 1 else p.grad[1, 0]

    groups = [([(4, 5)], sgl(0.03, Groups.along(1), metric))]
    (w,) = check_run(METHODS[method], groups, gradient=gradient, check_finite=False)
    assert w[1].isnan().all() and not w[[0, 2, 3]].isnan().any()


def test_zero_groups_stay_zero_and_a_learning_rate_of_zero_changes_nothing():
    def gradient(i, p):
        with torch.no_grad():
            if i == 0:
                p[0] = 0
            p.grad[0] = 0

    groups = [([(4, 5)], sgl(0.03, Groups.along(1)))]
    for method in METHODS.values():
        (w,) = check_run(method, groups, gradient=gradient, weight_decay=0.0)
        assert (w[0] == 0).all()
    for method in (ProxSGD, HAPG, ProxAdam, AdamHAPG):
        (w,) = check_run(lambda p, m=method: m(p, lr=0.0), groups)
        (start,), _ = steps(lambda p, m=method: m(p, lr=0.0), groups, False, count=0)
        assert torch.equal(w, start)


@pytest.mark.parametrize("metric", METRICS)
def test_steps_that_spread_over_decades(metric):
    def gradient(i, p):
        p.grad *= 10.0 ** torch.linspace(-6, 2, p.shape[1])

    groups = [([(20, 60)], {"penalty": GroupL2(0.003, Groups.along(1), metric=metric)})]
    for method in ("ProxAdam", "AdamHAPG"):
        check_run(METHODS[method], groups, gradient=gradient, rtol=2e-4, atol=1e-6)


def test_hyperparameters_and_gradients_may_change_between_steps():
    def between(i, optimizer):
        group = optimizer.param_groups[0]
        group["lr"], group["strength"] = 0.01 / (i + 1), 0.05 * i
        if i == 2:
            group["penalty"] = SparseGroupLasso(0.02, groups=Groups.along(0))

    def gradient(i, p):
        if i % 3 == 2 and p.ndim == 1:
            p.grad = None
        elif i == 4 and p.ndim == 2:
            p.grad = p.grad.t().contiguous().t()

    groups = [([(4, 5), (5, 4)], sgl(0.03, Groups.along(1))), ([(7,)], {"maximize": True})]
    for method in METHODS.values():
        check_run(method, groups, count=6, between=between, gradient=gradient)


def test_capturable_and_tensors_as_hyperparameters():
    def between(i, optimizer):
        optimizer.param_groups[0]["strength"] = torch.tensor(0.02 * (i + 1))
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01)

    groups = [([(4, 5)], sgl(0.03, Groups.along(1))), ([(7,)], {})]
    for method in METHODS.values():
        for capturable in (False, True):
            check_run(method, groups, between=between, capturable=capturable, rtol=1e-4, atol=1e-6)


def test_one_launch_serves_all_groups_of_a_kind():
    groups = [([(4, 40)] * 3, sgl(0.03, Groups.along(1))), ([(5, 50)], sgl(0.01, Groups.along(1)))]
    before = triton_steps.calls["prox_adam"]
    steps(METHODS["ProxAdam"], groups, True, count=1)
    assert triton_steps.calls["prox_adam"] == before + 1


def test_a_checkpoint_goes_on_with_and_without_the_kernels():
    groups = [([(4, 5)], sgl(0.03, Groups.along(1))), ([(7,)], {})]
    for method in METHODS.values():

        def between(i, optimizer):
            optimizer.load_state_dict(optimizer.state_dict())
            triton_steps._switch = triton_steps._switch and i != 1

        check_run(method, groups, count=4, between=between)


@pytest.mark.commands
def test_the_kernels_compile_for_a_device():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "triton_compile.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "penalty",
    [ElasticNet(0.02, 0.5), GroupL2(0.1 * torch.ones(4, 1), Groups.along(1)), GroupL2(0.1, Groups.along((0, 2)))],
    ids=["no shrinkage", "array of strengths", "double precision"],
)
def test_what_the_kernels_do_not_take_takes_the_other_path(penalty):
    shape, dtype = ((4, 5), torch.float32) if "along(1)" in repr(penalty) else ((4, 5, 2), torch.float64)
    before = triton_steps.calls.total()
    check(METHODS["ProxAdam"], [([shape], {"penalty": penalty})], dtype=dtype)
    assert triton_steps.calls.total() == before
