"""The option "projection" of param groups: in every optimizer and mode, in checkpoints, and its errors; with NonNegative."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from plain import along, capped_hapg
from torch import nn
from torch_cases import MAKERS, groups_of, problem, train

from proxopt import L1, GroupL2, Groups, NonNegative, SparseGroupLasso, Sphere
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD, compiled, kernels, sparsity_report, stacks

ROWS = Groups.along(1)
PENALTY = NonNegative(SparseGroupLasso(0.3, 0.5, ROWS, weights="none"))
ALL = {**MAKERS, "Proximal": lambda p, **k: Proximal(torch.optim.SGD(p, lr=0.05, momentum=0.5), **k)}
every_optimizer = pytest.mark.parametrize("name", ALL)


def weights(count=1, dtype=torch.float64, shape=(6, 5)):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(count)]


def run(optimizer, params, steps=5):
    """Steps towards different targets; the parameters and the prox points."""
    for _ in range(steps):
        for i, p in enumerate(params):
            p.grad = (p.detach() - torch.linspace(-0.5, 0.7, p.numel(), dtype=p.dtype).reshape(p.shape) - 0.1 * i).to(p.dtype)
        optimizer.step()
    search = [p.detach().clone() for p in params]
    with optimizer.at_prox_point():
        return search, [p.detach().clone() for p in params]


@every_optimizer
def test_parameters_and_prox_points_are_projected_after_each_step(name):
    params = weights()
    for p in (found for part in run(ALL[name](params, penalty=PENALTY, projection=Sphere(ROWS, 2.0)), params) for found in part):
        norms = p.norm(dim=1)
        assert ((norms - 2).abs() < 1e-12).logical_or(norms == 0).all()


def test_hapg_is_the_plain_recursion():
    (w,) = weights()
    start, target = w.detach().numpy().ravel().copy(), np.linspace(-0.5, 0.7, 30)
    optimizer = HAPG([w], lr=0.3, extrapolation=0.4, penalty=PENALTY, projection=Sphere(ROWS, 2.0))
    (search,), (point,) = run(optimizer, [w], steps=9)
    expected = capped_hapg(start, lambda z: z - target, 9, 0.3, 0.4, 0.15, 0.15, along((1,), (6, 5)), 2.0)
    np.testing.assert_allclose(search.numpy().ravel(), expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(point.numpy().ravel(), expected[1], rtol=1e-12, atol=1e-14)
    assert (point == 0).any() and ((point.numpy().ravel() == 0) == (expected[1] == 0)).all()


@every_optimizer
@pytest.mark.parametrize("penalty", [PENALTY, SparseGroupLasso(0.3, groups=ROWS)], ids=["nonnegative", "signed"])
def test_all_paths_take_the_same_steps(name, penalty, monkeypatch):
    """Compiled loops, stacks and fused kernels on the one side, the reference on the other."""
    found = []
    for reference in (False, True):
        if reference:
            monkeypatch.setattr(compiled, "split", lambda optimizer, group, penalty, present: ([], present))
            monkeypatch.setattr(stacks, "split", lambda optimizer, group, penalty, present: ([], present))
            monkeypatch.setattr(kernels, "fits", lambda *_: False)
        params = weights(6)
        search, point = run(ALL[name](params, penalty=penalty, projection=Sphere(ROWS)), params)
        found.append(search + point)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert ((a == 0) == (b == 0)).all()


@every_optimizer
def test_no_projection_changes_nothing_and_the_identity_neither(name):
    found = []
    for option in ({}, {"projection": None}, {"projection": lambda x: x}):
        params = weights(2)
        found.append(run(ALL[name](params, penalty=PENALTY, **option), params))
    for other in found[1:]:
        for a, b in zip([*found[0][0], *found[0][1]], [*other[0], *other[1]]):
            assert torch.equal(a, b)


def test_groups_have_projections_of_their_own_and_one_without_gradient_is_not_touched():
    a, b, c = weights(3)
    before = c.detach().clone()
    optimizer = ProxSGD([{"params": [a], "projection": Sphere()}, {"params": [b, c], "projection": torch.relu}], lr=0.1)
    a.grad, b.grad = torch.ones_like(a), torch.full_like(b, 30.0)
    optimizer.step()
    assert float(a.detach().norm()) == pytest.approx(1) and (b >= 0).all() and (b == 0).any() and torch.equal(c, before)


def test_a_joint_group_is_projected_as_a_list():
    params = weights(2)
    penalty = GroupL2(0.1, Groups.labels([list(range(6))] * 2))
    optimizer = HAPG([{"params": params, "penalty": penalty, "joint": True, "projection": Sphere(penalty.groups)}], lr=0.1)
    search, point = run(optimizer, params)
    for pair in (search, point):
        torch.testing.assert_close(torch.cat(pair, dim=1).norm(dim=1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [HAPG, AdamHAPG, ProxAdam])
def test_low_precision_and_other_strides(make, dtype):
    (w,) = weights(dtype=dtype)
    w = nn.Parameter(w.detach().T.contiguous().T)
    optimizer = make([w], lr=0.05, penalty=PENALTY, projection=Sphere(ROWS))
    (search,), (point,) = run(optimizer, [w])
    for found in (search, point):
        norms = found.float().norm(dim=1)
        assert ((norms - 1).abs() < 1e-2).logical_or(norms == 0).all()


@pytest.mark.parametrize("name", ["AdamHAPG", "Proximal"])
def test_a_compiled_step_is_the_eager_one(name):
    found = []
    for compiles in (False, True):
        params = weights()
        optimizer = ALL[name](params, penalty=PENALTY, projection=Sphere(ROWS))
        run(optimizer, params, steps=1)  # so that the states exist
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for _ in range(3):
            params[0].grad = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5)
            step()
        with optimizer.at_prox_point():
            found.append(params[0].detach().clone())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)  # the step count, and corrections by it, are in float32 there


@pytest.mark.parametrize("name", ["HAPG", "AdamHAPG", "ProxSGD tau", "ProxAdam"])
def test_a_capturable_step_is_the_usual_one(name):
    found = []
    for capturable in (False, True):
        params = weights()
        found.append(run(ALL[name](params, penalty=PENALTY, projection=Sphere(ROWS), capturable=capturable), params))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # its step count, and corrections by it, are in float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["HAPG", "AdamHAPG", "ProxSGD tau", "ProxAdam"])
def test_autograd_differentiates_through_projected_steps(name):
    (start,) = weights(shape=(3, 4))

    def after(tilt):
        w = start.detach() + 0 * tilt
        optimizer = ALL[name]([w], penalty=PENALTY, projection=Sphere(ROWS), differentiable=True)
        for _ in range(3):
            w.grad = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4) + tilt
            optimizer.step()
        return w

    assert torch.autograd.gradcheck(after, torch.randn(3, 4, dtype=torch.float64).requires_grad_(), atol=1e-4, rtol=1e-3)


@every_optimizer
def test_checkpoints_resume_bit_for_bit(name):
    params = weights(2)
    optimizer = ALL[name](params, penalty=PENALTY, projection=Sphere(ROWS))
    run(optimizer, params)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    others = copy.deepcopy(params)
    again = ALL[name](others, penalty=PENALTY.with_strength(7.0), projection=Sphere(ROWS))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.param_groups[0]["projection"] == Sphere(ROWS) and again.param_groups[0]["strength"] == 0.3
    for a, b in zip(run(optimizer, params), run(again, others)):
        assert all(map(torch.equal, a, b))


def test_a_checkpoint_holds_the_name_of_a_function_and_loads_with_the_same_one_only():
    (w,) = weights()
    optimizer = HAPG([w], projection=torch.relu)
    run(optimizer, [w])
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["projection"]["kind"] == "foreign"
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["projection"] is torch.relu
    for other in (None, torch.sin, Sphere()):
        with pytest.raises(ValueError, match=r"state_dict must hold the projection .* in param_groups\[0\], got .*relu"):
            HAPG([w], projection=other).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state_dict must hold the projection .*'radius': 2\.0"):
        HAPG([w], projection=Sphere(radius=2.0)).load_state_dict(HAPG([w], projection=Sphere()).state_dict())


@dataclass(frozen=True)
class Box:
    """A projection from elsewhere, with what it is made of among its fields."""

    low: float
    bounds: torch.Tensor | None = None

    def project(self, x):
        return x.clamp(self.low)

    def halved(self, x):
        return x.clamp(self.low) / 2


LIKE_EACH_OTHER = [
    [lambda: partial(torch.clamp, min=0.0), lambda: partial(torch.clamp, min=0), lambda: partial(torch.clamp, **{"min": 0.0})],
    [lambda: partial(torch.clamp, min=0.1)],
    [lambda: partial(torch.clamp, max=0.0)],
    [lambda: partial(torch.clamp_min, min=0.0)],
    [lambda: partial(torch.mul, torch.ones(6, 5)), lambda: partial(torch.mul, torch.full((6, 5), 1.0))],
    [lambda: partial(torch.mul, torch.ones(6, 5, dtype=torch.bfloat16))],
    [lambda: partial(torch.mul, torch.zeros(6, 5))],
    [lambda: partial(torch.mul, torch.zeros(5))],
    [lambda: Box(0.0), lambda: Box(0)],
    [lambda: Box(1.0)],
    [lambda: Box(0.0, torch.ones(()))],
    [lambda: Box(0.0).project],
    [lambda: Box(1.0).project],
    [lambda: Box(0.0).halved],
    [lambda: Sphere(ROWS).project, lambda: Sphere(Groups.along(1)).project],
    [lambda: Sphere(ROWS, 2.0).project],
    [lambda: partial(Sphere.project, Sphere(ROWS))],
    [lambda: partial(Sphere.project, Sphere(Groups.along(0)))],
    [lambda: torch.ones(6, 5).mul],
    [lambda: torch.zeros(6, 5).mul],
]


def test_a_checkpoint_tells_projections_apart_that_have_the_same_name():
    (w,) = weights()
    for number, same in enumerate(LIKE_EACH_OTHER):
        for make in same:
            buffer = io.BytesIO()
            torch.save(HAPG([w], projection=make()).state_dict(), buffer)
            for other, makes in enumerate(LIKE_EACH_OTHER):
                for made in makes:
                    buffer.seek(0)
                    saved, optimizer = torch.load(buffer, weights_only=True), HAPG([w], projection=made())
                    if other == number:
                        optimizer.load_state_dict(saved)
                    else:
                        with pytest.raises(ValueError, match=r"state_dict must hold the projection .* in param_groups\[0\], got"):
                            optimizer.load_state_dict(saved)


def test_a_checkpoint_with_the_name_alone_loads_as_before():
    (w,) = weights()
    for projection, name in ((partial(torch.clamp, min=0.0), "functools.partial"), (Box(0.0), f"{__name__}.Box")):
        optimizer = HAPG([w], projection=projection)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["projection"] = {"kind": "foreign", "name": name}
        optimizer.load_state_dict(saved)
        with pytest.raises(ValueError, match=f"got .*{name}"):
            HAPG([w], projection=torch.relu).load_state_dict(saved)


def test_a_checkpoint_from_before_the_option_keeps_the_present_projection():
    (w,) = weights()
    optimizer = HAPG([w], projection=Sphere())
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["projection"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["projection"] == Sphere()
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["projection"] == Sphere()


@pytest.mark.parametrize("make", [HAPG, lambda p, **k: Proximal(torch.optim.SGD(p, lr=0.1), **k)])
def test_errors_name_the_option(make):
    (w,) = weights()
    with pytest.raises(TypeError, match=r"projection must be None, a callable, or an object with a method project\(x\), got 3"):
        make([w], projection=3)
    with pytest.raises(TypeError, match=r"projection must be an object such as Sphere\(\), got the class Sphere"):
        make([w], projection=Sphere)
    with pytest.raises(ValueError, match=r"axis of Groups\.along must exist in x with 2 axes, got 4"):
        make([w], projection=Sphere(Groups.along(4)))
    with pytest.warns(UserWarning, match="did you mean 'projection'"):
        make([{"params": [w], "projections": None}])
    w.grad = torch.ones_like(w)
    for wrong, error, message in (
        (torch.Tensor.sum, ValueError, r"projection must return a tensor of shape \(6, 5\), got \(\)"),
        (torch.Tensor.tolist, TypeError, "projection must return a tensor, got a list"),
    ):
        optimizer = make([w], projection=wrong)
        with pytest.raises(error, match=message):
            optimizer.step()
    optimizer.param_groups[0]["projection"] = 3
    with pytest.raises(TypeError, match="projection must be None"):
        optimizer.step()


@every_optimizer
def test_nonnegative_penalties_train_a_model_to_nonnegative_sparse_weights(name):
    net, x, y = problem()
    optimizer = ALL[name](groups_of(net, NonNegative(L1(0.02))))
    train(optimizer, net, x, y, 5)
    optimizer.param_groups[0]["strength"] = 0.05
    train(optimizer, net, x, y, 5)
    with optimizer.at_prox_point():
        w = net[0].weight
        assert (w >= 0).all() and (w == 0).any() and (w > 0).any()
        assert (net[2].weight < 0).any()  # without penalty
    assert sparsity_report(optimizer).zeros > 0


@every_optimizer
@pytest.mark.parametrize("penalty", [PENALTY, None, SparseGroupLasso(0.3, groups=ROWS)], ids=["nonnegative", "none", "signed"])
def test_a_projection_that_fails_leaves_everything_as_it_was(name, penalty):
    """Parameters, states, and what the optimizer does next; in a group after another, from the first step on."""

    def after(failing):
        a, b, c = params = weights(3)
        optimizer = ALL[name]([{"params": [a]}, {"params": [b, c], "projection": own}], penalty=penalty)
        for _ in range(3):
            optimizer.param_groups[1]["projection"] = Sphere(ROWS)
            for wrong in failing:
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.param_groups[1]["projection"] = wrong
                with pytest.raises((ZeroDivisionError, TypeError, ValueError)):
                    optimizer.step()
            optimizer.param_groups[1]["projection"] = own
            run(optimizer, params, 1)
        return [*params, *(v for state in optimizer.state.values() for v in state.values())]

    own = Sphere(ROWS).project
    calls = iter(range(10**6))
    sometimes = lambda x: x / 2 if next(calls) % 2 == 0 else 1 / 0  # the second parameter
    inplace = lambda x: x.mul_(0).tolist()
    wrong = [sometimes, inplace, torch.Tensor.sum, lambda x: x.to(torch.complex64), Sphere(Groups.along(4))]
    for found, expected in zip(after(wrong), after([]), strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
