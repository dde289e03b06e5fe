"""The Triton kernels on a CUDA device: the steps of the CPU, without a synchronisation, and in CUDA graphs."""

import pytest
import torch
from triton_cases import METHODS, METRICS, check_run, joint, large, many_kinds, sgl, steps

from proxopt import Groups
from proxopt_torch.device import triton_steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# the CPU adds in another order: entries near their threshold differ by more than rounding
CLOSE = {"rtol": 1e-3, "atol": 2e-6, "device": "cuda"}
MAIN = ("ProxSGD", "ProxAdam", "AdamHAPG")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_equals_the_reference(method, metric):
    check_run(METHODS[method], many_kinds(metric), **CLOSE)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("groups", [joint, large])
@pytest.mark.parametrize("method", MAIN)
def test_joint_and_large_groups(method, groups, metric):
    check_run(METHODS[method], groups(metric), count=1, weight_decay=0.0, **CLOSE)


@pytest.mark.parametrize("size", [1, 31, 129, 1000, 1025, 3000, 5000, 8192])
def test_every_size_of_block(size):
    check_run(METHODS["ProxAdam"], [([(3, size), (300, size)], sgl(0.02, Groups.along(1)))], weight_decay=0.0, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", MAIN)
def test_half_precision(method, dtype):
    groups = [([(5, 40), (9, 3)], sgl(0.03, Groups.along(1))), ([(7,)], {})]
    ours, _ = steps(METHODS[method], groups, True, 1, dtype, device="cuda", weight_decay=0.0)
    reference, _ = steps(METHODS[method], groups, False, 1, dtype, weight_decay=0.0)
    for a, b in zip(ours, reference):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_nan_gradients():
    def gradient(i, p):
        p.grad[1, 0] = float("nan")

    (w,) = check_run(
        METHODS["ProxAdam"], [([(4, 5)], sgl(0.03, Groups.along(1)))], gradient=gradient, check_finite=False, **CLOSE
    )
    assert w[1].isnan().all() and not w[[0, 2, 3]].isnan().any()


def draw(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.normal_(std=0.01)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_synchronises(method, metric, on, capturable):
    groups = many_kinds(metric) + joint(metric)
    _, optimizer = steps(METHODS[method], groups, on, 1, device="cuda", capturable=capturable)
    optimizer.train()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with triton_steps.enabled(on):
            for _ in range(2):
                draw(optimizer)
                optimizer.step()
                optimizer.eval()
                optimizer.train()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_replays(method):
    """Eager steps between replays, with gradients elsewhere, do not change what a graph does."""
    groups = many_kinds("exact") + joint("exact")
    sides = []
    for on in (False, True):
        torch.cuda.manual_seed(0)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            _, optimizer = steps(METHODS[method], groups, on, 3, device="cuda", capturable=True)
            optimizer.train()
            params = [p for group in optimizer.param_groups for p in group["params"]]
            stream.synchronize()
            with triton_steps.enabled(on):
                graph = torch.cuda.CUDAGraph()
                if on:
                    with torch.cuda.graph(graph, stream=stream):
                        optimizer.step()
                for turn in range(6):
                    kept = [p.grad for p in params]
                    draw(optimizer)
                    if turn == 3:  # an eager step whose gradients are copies
                        for p in params:
                            p.grad = p.grad.clone()
                        optimizer.step()
                        for p, grad in zip(params, kept):
                            p.grad = grad
                    elif on:
                        graph.replay()
                    else:
                        optimizer.step()
            stream.synchronize()
            optimizer.eval()
            sides.append([p.detach().cpu() for p in params])
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
