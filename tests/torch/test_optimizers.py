"""The optimizers and Proximal: agreement with the pure updates, convergence, and everything expected of a torch optimizer."""

import copy
import io
import pickle
import re
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch_cases import COLUMNS, MAKERS, PENALTIES, Foreign, groups_of, problem, snapshot, train

import proxopt.kernels
from proxopt import L1, GroupL2, Groups, SparseGroupLasso, updates
from proxopt.solvers import LeastSquares, fista
from proxopt_torch import (
    HAPG,
    AdamHAPG,
    ProxAdam,
    Proximal,
    ProxSGD,
    StrengthPath,
    half_precision,
    kernels,
    max_strength,
    sparsity_report,
    stacks,
)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_fused_steps_equal_the_pure_update(name, penalty, monkeypatch):
    points = []
    for path in ("compiled", "fused", "reference"):
        if path == "reference":
            monkeypatch.setattr(kernels, "fits", lambda group, entry: False)
        net, x, y = problem()
        optimizer = MAKERS[name](groups_of(net, PENALTIES[penalty]), foreach=False)
        with proxopt.kernels.enabled(path == "compiled"):
            train(optimizer, net, x, y, 30)
        points.append(snapshot(net, optimizer))
    for compiled, fused, slow in zip(*points):
        for fast in (compiled, fused):
            torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-8)
            assert torch.equal(fast == 0, slow == 0)


@pytest.mark.parametrize("name", MAKERS)
def test_torch_and_numpy_agree_for_three_hundred_steps(name):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 12)) / 5, rng.normal(size=(30, 4))
    penalty = SparseGroupLasso(0.05, 0.5, Groups.along(1))
    w = nn.Parameter(torch.tensor(rng.normal(size=(12, 4))))
    optimizer = MAKERS[name]([{"params": [w], "penalty": penalty}])
    x, state, group = w.detach().numpy().copy(), None, optimizer.param_groups[0]
    for _ in range(300):
        w.grad = torch.tensor(a.T @ (a @ w.detach().numpy() - b))
        optimizer.step()
        grad = a.T @ (a @ x - b)
        lr = group["lr"]
        if isinstance(optimizer, ProxSGD):
            x, state = updates.prox_sgd(x, grad, state, penalty, lr=lr, rho=group["rho"], tau=group["tau"])
        elif isinstance(optimizer, HAPG):
            x, state = updates.hapg(x, grad, state, penalty, lr=lr, extrapolation=group["extrapolation"])
        elif isinstance(optimizer, AdamHAPG):
            options = {"betas": group["betas"], "extrapolation": group["extrapolation"]}
            x, state = updates.adam_hapg(x, grad, state, penalty, lr=lr, **options)
        else:
            decay = group["weight_decay"]
            coupled = 0.0 if group["decoupled_weight_decay"] else decay
            options = {"lr": lr, "betas": group["betas"], "weight_decay": decay - coupled}
            x, state = updates.prox_adam(x, grad + coupled * x, state, penalty, **options)
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=1e-10, atol=1e-10)
    assert np.array_equal(w.detach().numpy() == 0, x == 0)


@pytest.mark.parametrize("penalty", ["none", "sgl", "l1", "whole", "sgl exact"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_stack_of_small_tensors_is_updated_like_each_tensor_alone(name, penalty):
    results = []
    for foreach in (True, False, None):
        generator = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64)) for _ in range(9)]
        optimizer = MAKERS[name]([{"params": params, "penalty": PENALTIES[penalty]}], foreach=foreach)
        for step in range(30):
            for i, p in enumerate(params):
                p.grad = p.detach() - i * 0.1 + torch.randn(4, 3, generator=generator, dtype=torch.float64)
                if step in (7, 8) and i == 3:
                    p.grad = None
            optimizer.step()
        with optimizer.at_prox_point():
            results.append([p.detach().clone() for p in params])
    for one, other in (*zip(results[0], results[1]), *zip(results[2], results[1])):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_blocks_do_not_change_the_step(monkeypatch):
    results = []
    for block in (kernels.BLOCK, 64):
        monkeypatch.setattr(kernels, "BLOCK", block)
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(40, 7, 3, 3, generator=generator))
        optimizer = AdamHAPG([w], penalty=SparseGroupLasso(0.5, groups=Groups.along((1, 2, 3))), lr=0.1)
        with proxopt.kernels.enabled(False):
            for _ in range(5):
                w.grad = torch.randn(w.shape, generator=generator)
                optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_checkpoint_of_either_mode_resumes_bit_for_bit(name, mode):
    net, x, y = problem(torch.float32)
    optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
    train(optimizer, net, x, y, 20)
    file = io.BytesIO()
    getattr(optimizer, mode)()
    torch.save({"optimizer": optimizer.state_dict(), "net": net.state_dict()}, file)
    optimizer.train()
    train(optimizer, net, x, y, 20)

    other, _, _ = problem(torch.float32, seed=5)
    resumed = MAKERS[name](groups_of(other, PENALTIES["sgl"]))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    resumed.train()
    train(resumed, other, x, y, 20)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))


RESUME = """
import sys, torch
from torch import nn
from proxopt import Groups, SparseGroupLasso
from proxopt_torch import AdamHAPG
first, last, load, save = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.manual_seed(0)
net = nn.Linear(6, 4)
x, y = torch.randn(16, 6), torch.randn(16, 4)
optimizer = AdamHAPG([{"params": [net.weight], "penalty": SparseGroupLasso(0.05, groups=Groups.along(0))},
                      {"params": [net.bias]}], lr=0.01)
if load != "-":
    saved = torch.load(load, weights_only=True)
    net.load_state_dict(saved["net"]); optimizer.load_state_dict(saved["optimizer"])
for _ in range(first, last):
    optimizer.zero_grad(); ((net(x) - y) ** 2).mean().backward(); optimizer.step()
torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, save)
"""


def test_a_run_resumed_in_a_new_process_equals_the_uninterrupted_one(tmp_path):
    def run(*args):
        subprocess.run([sys.executable, "-c", RESUME, *map(str, args)], check=True, timeout=120)

    run(0, 40, "-", tmp_path / "whole")
    run(0, 17, "-", tmp_path / "half")
    run(17, 40, tmp_path / "half", tmp_path / "resumed")
    whole, resumed = (torch.load(tmp_path / f, weights_only=True)["net"] for f in ("whole", "resumed"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("name", MAKERS)
def test_eval_and_train_swap_bit_for_bit_and_may_be_called_twice(name):
    net, x, y = problem(torch.float32)
    optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
    optimizer.eval()
    optimizer.train()
    train(optimizer, net, x, y, 30)
    search = [p.detach().clone() for p in net.parameters()]
    optimizer.eval()
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\)"):
        optimizer.step()
    optimizer.train()
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), search))
    with pytest.raises(KeyError), optimizer.at_prox_point():
        raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), search))


@pytest.mark.parametrize("name", [*MAKERS, "Proximal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_updated(name, value):
    net, x, y = problem()
    groups = [{"params": list(net.named_parameters()), "penalty": L1(0.01)}]
    optimizer = Proximal(torch.optim.Adam(groups)) if name == "Proximal" else MAKERS[name](groups)
    train(optimizer, net, x, y, 3)
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    net[2].bias.grad[1] = value
    with pytest.raises(ValueError, match=r"gradient of 2\.bias .* must be finite"):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    for a, b in zip(state["state"].values(), optimizer.state_dict()["state"].values()):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    optimizer.param_groups[0]["check_finite"] = False
    optimizer.step()


def test_a_huge_gradient_whose_norm_overflows_is_still_finite():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.full((3,), 3e38)
    HAPG([w], lr=1e-39).step()


@pytest.mark.parametrize("name", MAKERS)
def test_no_gradient_or_no_lr_changes_nothing(name):
    net, x, y = problem()
    optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
    train(optimizer, net, x, y, 3)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    if name in ("ProxAdam", "ProxAdamW", "ProxSGD"):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        ((net(x) - y) ** 2).mean().backward()
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_parameters_have_single_precision_states_also_after_loading(name):
    net, x, y = problem(torch.bfloat16)
    optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
    train(optimizer, net, x, y, 5)
    again = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
    again.load_state_dict(optimizer.state_dict())
    for o in (optimizer, again):
        for state in o.state.values():
            assert {v.dtype for v in state.values()} == {torch.float32}
    optimizer.eval()
    assert int((net[0].weight == 0).sum()) > 0 or not name.startswith(("ProxAdam", "AdamHAPG"))


ADAMS = {
    "ProxAdam": ProxAdam,
    "AdamHAPG": AdamHAPG,
    "Proximal AdamW": lambda p, lr: Proximal(torch.optim.AdamW(p, lr=lr), L1(1e-3)),
}


def halves(first=0.5, dtype=torch.bfloat16):
    return nn.Parameter(torch.linspace(first, 4 * first, 12).reshape(3, 4).to(dtype))


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
def test_steps_below_half_an_ulp_of_half_precision_parameters_warn_once(make):
    for lr in (1e-4, torch.tensor(1e-4)):
        (found,) = warnings_of(partial(make, [halves(), halves(dtype=torch.float16), halves(64.0)], lr=lr))
        assert re.search(r"params.*\[0\].* is bfloat16, and the learning rate 0.0001, .* half an ulp of 100% of its", found)
    (found,) = warnings_of(lambda: make([("a", halves(1e-6)), ("b", halves(64.0, torch.float16))], lr=1e-3))
    assert found.startswith("b is float16")
    optimizer = make([halves(1e-6)], lr=1e-4)

    def add_groups():
        for _ in range(2):
            optimizer.add_param_group({"params": [halves()]})

    assert len(warnings_of(add_groups)) == 1
    assert warnings_of(lambda: copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())) == []


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
def test_steps_that_half_precision_parameters_can_take_do_not_warn(make):
    def many():
        for lr in (0.0, 0.1, torch.tensor(0.1)):
            make([halves(), halves(dtype=torch.float16)], lr=lr)
        half_of_them = nn.Parameter(torch.tensor([1e-3, 1e-3, 1.0, 1.0], dtype=torch.bfloat16))
        nothing = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
        unread = [nn.Parameter(torch.empty(3, dtype=torch.bfloat16, device="meta")), nn.Parameter(torch.arange(3), False)]
        zeros = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        for p in ([half_of_them], [nothing], unread[:1], [zeros], [nn.Parameter(torch.ones(3))]):
            make(p, lr=1e-4)

    assert warnings_of(many) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [1e-4, 2.0**-10, 2.0**-9, 3e-3])
def test_the_share_of_steps_that_are_rounded_away_is_counted(dtype, lr):
    """Steps of half an ulp, and those down from a power of two, are decided by rounding to even: they may count or not."""
    x = torch.linspace(-30, 30, 3001).to(dtype)
    mantissa, exponent = torch.frexp(x.double())
    ulp = torch.finfo(dtype).eps * 2.0 ** (exponent - 1).double()
    stuck = (x + lr == x) & (x - lr == x) & (x != 0)
    decided = (ulp / 2 != lr) & (mantissa.abs() != 0.5) & (x != 0)
    share = float(stuck[decided].double().mean())
    assert 0 < share < 1 and half_precision.rounded_away(x[decided], lr) == pytest.approx(share)


def test_a_joint_group_is_zeroed_in_weight_and_bias_together():
    net, x, y = problem()
    rows = Groups.labels([range(5), range(5)], axis=0)
    joint = {"params": [net[0].weight, net[0].bias], "penalty": GroupL2(0.2, rows), "joint": True}
    optimizer = HAPG([joint, {"params": [*net[2].parameters(), *net[4].parameters()]}], lr=0.05)
    train(optimizer, net, x, y, 100)
    optimizer.eval()
    zeroed = net[0].bias == 0
    assert int(zeroed.sum()) > 0
    assert torch.equal(zeroed, (net[0].weight == 0).all(1))
    before = net[0].weight.detach().clone()
    optimizer.train()
    train(optimizer, net, x, y, 1)
    optimizer.zero_grad()
    net[0].weight.grad = torch.ones_like(net[0].weight)  # its bias has none: the whole entry is skipped
    search = net[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[0].weight, search)
    assert before.shape == search.shape


def test_checkpoints_hold_the_name_of_an_operator_that_is_not_plain_data():
    net, x, y = problem()
    optimizer = HAPG(groups_of(net, Foreign()), lr=0.05)
    train(optimizer, net, x, y, 10)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["penalty"]["name"].endswith("Foreign")
    other = HAPG(groups_of(net, Foreign()), lr=0.05)
    other.load_state_dict(saved)
    assert isinstance(other.param_groups[0]["penalty"], Foreign)
    with pytest.raises(ValueError, match="must hold the penalty L1"):
        HAPG(groups_of(net, L1(0.1))).load_state_dict(saved)


@pytest.mark.parametrize(
    "other",
    [
        lambda n: HAPG(groups_of(n, L1(0.1))),
        lambda n: HAPG(groups_of(n, GroupL2(0.1, Groups.along(1)))),
        lambda n: HAPG(n.parameters()),
        lambda n: HAPG([{"params": [n[0].weight], "penalty": GroupL2(0.1, COLUMNS)}, {"params": [n[0].bias]}]),
        lambda n: AdamHAPG(groups_of(n, GroupL2(0.1, COLUMNS))),
    ],
)
def test_the_state_of_another_model_or_method_is_refused_and_nothing_changes(other):
    net, x, y = problem()
    optimizer = HAPG(groups_of(net, GroupL2(0.1, COLUMNS)), lr=0.05)
    train(optimizer, net, x, y, 3)
    stranger_net, _, _ = problem()
    stranger = other(stranger_net)
    train(stranger, stranger_net, x, y, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state.dict"):
        optimizer.load_state_dict(stranger.state_dict())
    assert str(before) == str(optimizer.state_dict())


def test_a_truncated_or_wrongly_shaped_state_is_refused():
    net, x, y = problem()
    optimizer = HAPG(groups_of(net, L1(0.1)), lr=0.05)
    train(optimizer, net, x, y, 2)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="key 'param_groups'"):
        optimizer.load_state_dict({"state": saved["state"]})
    bad = copy.deepcopy(saved)
    bad["state"][0]["point"] = bad["state"][0]["point"][:2]
    with pytest.raises(ValueError, match="must hold point of shape"):
        optimizer.load_state_dict(bad)


def test_strength_and_penalty_may_be_written_at_run_time():
    net, x, y = problem()
    optimizer = ProxAdam(groups_of(net, L1(0.0)), lr=0.05)
    train(optimizer, net, x, y, 2)
    assert int((net[0].weight == 0).sum()) == 0
    optimizer.param_groups[0]["strength"] = 1e3
    train(optimizer, net, x, y, 1)
    assert int((net[0].weight != 0).sum()) == 0
    optimizer.param_groups[0]["penalty"] = SparseGroupLasso(0.5, 0.3, COLUMNS)
    train(optimizer, net, x, y, 1)
    group = optimizer.param_groups[0]
    assert group["strength"] == 0.5 and group["penalty"]["l1_ratio"] == 0.3 and isinstance(group["penalty"], dict)
    group["strength"] = -1.0
    with pytest.raises(ValueError, match=r"strength must be finite and >= 0, got -1"):
        optimizer.step()


def test_a_refused_param_group_leaves_the_optimizer_as_it_was():
    net, _, _ = problem()
    optimizer = HAPG([net[0].weight], penalty=L1(0.1))
    with pytest.raises(ValueError, match="labels must hold one label per slice"):
        optimizer.add_param_group({"params": [net[2].weight], "penalty": GroupL2(1.0, Groups.labels([0, 1]))})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [net[2].weight], "strength": 0.7})
    assert optimizer.param_groups[1]["strength"] == 0.7 and optimizer.param_groups[1]["penalty"] == {"kind": "L1"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: HAPG([w], lr=-1.0), "lr must be finite and >= 0, got -1"),
        (lambda w: HAPG([]), "empty parameter list"),
        (lambda w: HAPG([w], extrapolation=2.0), "extrapolation"),
        (lambda w: ProxSGD([w], rho=0.0), r"rho must lie in \(0, 1\], got 0"),
        (lambda w: ProxSGD([w], tau=0.0), "tau must be finite and > 0, got 0"),
        (lambda w: AdamHAPG([w], betas=(1.0, 0.9)), r"betas\[0\] must lie in \[0, 1\), got 1"),
        (lambda w: ProxAdam([w], eps=-1.0), "eps must be"),
        (lambda w: HAPG([{"params": [w]}, {"params": [w]}]), "more than one parameter group"),
        (lambda w: HAPG([{"params": [w, w], "joint": True}]), "same parameter|duplicate"),
        (lambda w: HAPG([w], lr=torch.tensor([0.1, 0.2])), "Tensor lr must be 1-element"),
        (lambda w: HAPG([w], penalty=L1(torch.ones(7))), "strength must broadcast"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_bad_argument_is_named_with_its_domain(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(torch.ones(4, 3)))


@pytest.mark.parametrize("make", [ProxSGD, HAPG, ProxAdam, AdamHAPG], ids=lambda c: c.__name__)
@pytest.mark.parametrize("value", ["yes", 1, torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("flag", ["maximize", "foreach", "capturable", "differentiable", "check_finite"])
def test_a_flag_that_is_no_bool_is_a_type_error(make, flag, value):
    domain = "True, False or None" if flag in ("foreach", "check_finite") else "True or False"
    with pytest.raises(TypeError, match=re.escape(f"{flag} must be {domain}, got {value!r}")):
        make([nn.Parameter(torch.ones(2))], **{flag: value})


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ProxSGD, {"lr": -1.0}, "lr must be finite and >= 0, got -1"),
        (ProxSGD, {"rho": 2.0}, r"rho must lie in \(0, 1\], got 2"),
        (ProxSGD, {"tau": -1.0}, "tau must be finite and > 0, got -1"),
        (HAPG, {"extrapolation": "fista"}, "extrapolation must be one of 'nesterov', 'as_printed', got 'fista'"),
        (HAPG, {"weight_decay": -1.0}, "weight_decay must be finite and >= 0, got -1"),
        (ProxAdam, {"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        (ProxAdam, {"decoupled_weight_decay": "yes"}, "decoupled_weight_decay must be True or False, got 'yes'"),
        (AdamHAPG, {"eps": float("nan")}, "eps must be finite and >= 0, got nan"),
        (AdamHAPG, {"joint": "yes"}, "joint must be True or False, got 'yes'"),
        (HAPG, {"lr": torch.tensor(0.1), "foreach": True}, "not supported for capturable=False and foreach=True"),
    ],
    ids=str,
)
def test_the_options_of_a_param_group_are_checked_as_those_of_the_constructor(make, options, message):
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = make([w])
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": [v], **options})
    assert len(optimizer.param_groups) == 1
    if "joint" not in options:
        with pytest.raises((TypeError, ValueError), match=message):
            make([w], **options)


@pytest.mark.parametrize("options", [{"joint": 1}, {"check_finite": "no"}], ids=str)
def test_proximal_checks_the_flags_of_its_groups(options):
    base = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], **options}], lr=0.1)
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be True"):
        Proximal(base)


def test_an_object_that_is_no_penalty_is_a_type_error():
    with pytest.raises(TypeError, match="penalty must be a penalty"):
        HAPG([nn.Parameter(torch.ones(2))], penalty=0.1)


@pytest.mark.parametrize("make", [HAPG, lambda p, **k: Proximal(torch.optim.SGD(p, lr=0.1), **k)], ids=["HAPG", "Proximal"])
def test_a_penalty_class_in_place_of_an_object_is_a_type_error(make):
    with pytest.raises(TypeError, match=r"penalty must be an object such as L1\(1e-3\), got the class L1"):
        make([nn.Parameter(torch.ones(2))], penalty=L1)


def warnings_of(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        make()
    assert all(w.filename == __file__ for w in caught)  # the line of the user, not one of ours or of torch
    return [str(w.message) for w in caught]


SGD = torch.optim.SGD


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: HAPG([{"params": [w[0]], "penalty": L1(0.1), "strenght": 2.0}]), "'strenght' (did you mean 'strength'?)"),
        (lambda w: ProxAdam([w[0]]).add_param_group({"params": [w[1]], "momentum": 2.0}), "does not read: 'momentum'"),
        (lambda w: Proximal(SGD([{"params": [w[0]], "penatly": L1(0.1)}])), "'penatly' (did you mean 'penalty'?)"),
        (lambda w: HAPG([{"params": [w[0]], "strength": 0.5}]), "has the strength 0.5 but no penalty"),
        (lambda w: Proximal(SGD([{"params": [w[0]], "strength": 0.5}])), "has the strength 0.5 but no penalty"),
        (lambda w: ProxAdam(w, penalty=GroupL2(0.1)), "GroupL2 without groups makes one group of each of 3 parameters"),
        (lambda w: Proximal(SGD(w), SparseGroupLasso(0.1)), "SparseGroupLasso without groups"),
    ],
)
def test_a_probable_mistake_in_a_param_group_warns_once(make, message):
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    (found,) = warnings_of(lambda: make(params))
    assert message in found


def test_a_correct_param_group_does_not_warn():
    w = [nn.Parameter(torch.ones(2, 2)) for _ in range(4)]

    def many():
        ProxAdam(w, penalty=GroupL2(0.1, Groups.whole()))
        ProxAdam([{"params": w, "penalty": GroupL2(0.1), "joint": True, "name": "body"}])
        HAPG([{"params": w[:1], "strength": 0.2}, {"params": w[1:], "penalty": None, "strength": 0.0}], penalty=L1(1.0))
        optimizer = Proximal(SGD([{"params": w, "lr_scale": 0.5}]), L1(0.1))  # a key that a base may use
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3, cycle_momentum=False)
        HAPG(optimizer.param_groups[0]["params"])
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())

    assert warnings_of(many) == []


class Wrapper(torch.optim.Optimizer):
    """A wrapper like that of accelerate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)


@pytest.mark.parametrize("use", [sparsity_report, max_strength, lambda o: StrengthPath(o, lambda epoch: 0.1)])
def test_a_wrapped_optimizer_is_refused_with_a_hint(use):
    optimizer = HAPG([nn.Parameter(torch.ones(2))], penalty=L1(0.1))
    with pytest.raises(TypeError, match=r"must be .* got Wrapper, which wraps a HAPG: pass optimizer\.optimizer"):
        use(Wrapper(optimizer))
    with pytest.raises(TypeError, match="an optimizer of proxopt_torch, got SGD"):
        use(SGD([nn.Parameter(torch.ones(2))]))
    with pytest.raises(TypeError, match="without a prox of its own"):
        Proximal(Wrapper(optimizer))


@pytest.mark.parametrize("make", [HAPG, ProxSGD], ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o, **k: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, **k),
        lambda o, **k: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=5, **k),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_cyclic_schedules_move_the_rate_and_leave_momentum_alone(make, scheduler):
    w = nn.Parameter(torch.ones(2))
    optimizer = make([w], penalty=L1(0.1))
    with pytest.raises(ValueError, match="`cycle_momentum`"):
        scheduler(optimizer)
    cycle = scheduler(optimizer, cycle_momentum=False)
    rates = []
    for _ in range(8):
        w.grad = w.detach().clone()
        optimizer.step()
        cycle.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) > 2 * rates[-1] > 0


def test_a_large_first_beta_with_uncapped_extrapolation_warns():
    w = nn.Parameter(torch.ones(2))
    for rule in ("nesterov", "as_printed"):
        with pytest.warns(UserWarning, match="may diverge"):
            AdamHAPG([w], betas=(0.9, 0.999), extrapolation=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamHAPG([w], betas=(0.9, 0.999))
        AdamHAPG([w], extrapolation="nesterov")


@pytest.mark.parametrize("name", MAKERS)
def test_copies_and_pickles_continue_identically(name):
    net, x, y = problem()
    optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
    train(optimizer, net, x, y, 5)
    copies = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    train(optimizer, net, x, y, 5)
    for other, other_optimizer in copies:
        train(other_optimizer, other, x, y, 5)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize("name", MAKERS)
def test_closures_maximize_schedulers_and_tensor_rates_work(name):
    net, x, y = problem()
    optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))

    def closure():
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(10):
        optimizer.step(closure)
        scheduler.step()
    assert float(optimizer.step(closure).detach()) < first
    assert optimizer.param_groups[0]["lr"] < 1e-6

    ascent, plain = (MAKERS[name]([nn.Parameter(torch.ones(2, 2))], maximize=m) for m in (True, False))
    for o, sign in ((ascent, -1), (plain, 1)):
        o.param_groups[0]["params"][0].grad = sign * torch.ones(2, 2)
        o.step()
    assert torch.equal(ascent.param_groups[0]["params"][0], plain.param_groups[0]["params"][0])

    rates = []
    for rate in (0.03, torch.tensor(0.03, dtype=torch.float64)):
        net, x, y = problem()
        optimizer = MAKERS[name](groups_of(net, PENALTIES["sgl"]))
        for group in optimizer.param_groups:
            group["lr"] = rate
        train(optimizer, net, x, y, 10)
        rates.append(net[0].weight.detach())
    torch.testing.assert_close(*rates)


@pytest.mark.commands
@pytest.mark.parametrize("name", MAKERS)
def test_a_compiled_step_equals_the_eager_one(name):
    points = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net, x, y = problem()
        weight, bias = net[0].weight, net[0].bias  # each parameter takes seconds to trace
        optimizer = MAKERS[name]([{"params": [weight], "penalty": PENALTIES["sgl"]}, {"params": [bias]}])
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(4):
            optimizer.zero_grad()
            ((net(x) - y) ** 2).mean().backward()
            step()
        points.append(snapshot(net, optimizer)[:2])
    for a, b in zip(*points):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # compiled, the step count is a float32 tensor


@pytest.mark.parametrize("name", MAKERS)
def test_autograd_runs_through_a_differentiable_step(name):
    def after(start, grad, lr):
        p = start.clone()
        p.retain_grad()
        p.grad = grad
        optimizer = MAKERS[name]([p], penalty=SparseGroupLasso(0.01, groups=COLUMNS), differentiable=True)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        return p

    inputs = (torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64), torch.tensor(0.05).double())
    assert torch.autograd.gradcheck(after, tuple(i.requires_grad_() for i in inputs))


def test_complex_parameters_are_updated_as_pairs_of_reals_or_shrunk_in_modulus():
    for name, make in MAKERS.items():
        z = nn.Parameter(torch.complex(torch.ones(2), torch.full((2,), 2.0)))
        r = nn.Parameter(torch.view_as_real(z.detach()).clone())
        one, two = make([z]), make([r])
        for _ in range(5):
            z.grad, r.grad = torch.complex(torch.ones(2), -torch.ones(2)), torch.tensor([[1.0, -1.0]] * 2)
            one.step()
            two.step()
        torch.testing.assert_close(torch.view_as_real(z.detach()), r.detach(), msg=name)
    z = nn.Parameter(torch.tensor([3 + 4j]))
    optimizer = HAPG([z], lr=1.0, penalty=L1(1.0))
    z.grad = torch.zeros(1, dtype=z.dtype)
    optimizer.step()
    optimizer.eval()
    torch.testing.assert_close(z.detach(), torch.tensor([2.4 + 3.2j]))
    with pytest.raises(TypeError, match="complex"):
        ProxAdam([z], penalty=L1(1.0))


@pytest.mark.parametrize("name", MAKERS)
def test_a_penalty_on_whole_numbers_is_refused(name):
    with pytest.raises(TypeError, match=r"a parameter with a penalty must be floating point, got torch.int64"):
        MAKERS[name]([torch.arange(3)], penalty=L1(0.1))


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = ProxAdam(embedding.parameters(), penalty=L1(0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_hooks_fire_once_and_see_the_shrunk_weights():
    w = nn.Parameter(torch.ones(3))
    seen = []
    for make in (lambda: HAPG([w], lr=1.0, penalty=L1(9.0)), lambda: Proximal(torch.optim.SGD([w], lr=1.0), L1(9.0))):
        optimizer = make()
        seen.clear()
        optimizer.register_step_post_hook(lambda o, a, k: seen.append(int((w == 0).sum())))
        with torch.no_grad():
            w.fill_(1.0)
        w.grad = torch.zeros(3)
        optimizer.step()
        assert len(seen) == 1
    assert seen == [3]


def matrices(groups):
    """Muon accepts matrices only."""
    return [{**g, "params": [p for p in g["params"] if p.ndim == 2]} for g in groups]


BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon(matrices(p), lr=0.01),
}


@pytest.mark.parametrize("base", BASES)
def test_proximal_is_the_base_step_then_the_prox(base):
    net, x, y = problem()
    penalty = PENALTIES["sgl"]
    optimizer = Proximal(BASES[base](groups_of(net, penalty)))
    by_hand, _, _ = problem()
    other = BASES[base](groups_of(by_hand, None))
    rate = other.param_groups[0]["lr"] * (10 if base == "SGD" else 1)  # momentum 0.9 moves ten times as far
    for _ in range(20):
        train(optimizer, net, x, y, 1)
        train(other, by_hand, x, y, 1)
        with torch.no_grad():
            for p in other.param_groups[0]["params"]:
                p.copy_(penalty.prox(p, rate))
    for p, q in zip(net.parameters(), by_hand.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_proximal_behaves_like_one_optimizer():
    net, x, y = problem()
    optimizer = Proximal(torch.optim.Adam(groups_of(net, L1(0.5)), lr=0.01))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=30)
    for _ in range(10):
        train(optimizer, net, x, y, 1)
        scheduler.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied_net, copied = copy.deepcopy((net, optimizer))
    copied.load_state_dict(torch.load(file, weights_only=True))
    again = pickle.loads(pickle.dumps(optimizer))
    assert isinstance(again, Proximal)
    train(optimizer, net, x, y, 5)
    train(copied, copied_net, x, y, 5)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), copied_net.parameters()))
    assert int((net[0].weight == 0).sum()) > 0
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.base.param_groups) == 3
    with pytest.raises(TypeError, match="without a prox of its own"):
        Proximal(optimizer)
    with pytest.raises(TypeError, match="base must be a torch optimizer"):
        Proximal(net)


def test_grad_scaler_skips_a_step_with_inf_and_shrinks_nothing():
    for make in (
        lambda p: ProxAdam(p, lr=0.1, penalty=L1(1.0), check_finite=False),
        lambda p: Proximal(torch.optim.SGD(p, lr=0.1, fused=True), L1(1.0), check_finite=False),
    ):
        w = nn.Parameter(torch.ones(3))
        optimizer = make([w])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale((w * torch.tensor([1.0, float("inf"), 1.0])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(w, torch.ones(3))
        optimizer.zero_grad()
        scaler.scale(w.sum()).backward()
        scaler.step(optimizer)
        assert bool((w < 1).all())


def test_distributed_checkpoints_leave_parameters_as_they_were():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for make in (lambda p: HAPG(p, penalty=L1(5.0)), lambda p: Proximal(torch.optim.SGD(p, lr=0.1), L1(5.0))):
        net = nn.Linear(3, 2)
        before = copy.deepcopy(net.state_dict())
        get_optimizer_state_dict(net, make(net.parameters()))
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_strength_path_sets_absolute_strengths_and_resumes():
    net, _, _ = problem()
    optimizer = HAPG(groups_of(net, L1(7.0)))
    path = StrengthPath(optimizer, lambda epoch: 0.01 * epoch)
    assert path.get_last_strength() == [0.0, 0.0]
    for _ in range(3):
        path.step()
    assert optimizer.param_groups[0]["strength"] == pytest.approx(0.03)
    other = HAPG(groups_of(net, L1(7.0)))
    resumed = StrengthPath(other, lambda epoch: 0.01 * epoch)
    resumed.load_state_dict(path.state_dict())
    assert other.param_groups[0]["strength"] == pytest.approx(0.03)
    with pytest.raises(ValueError, match=r"path\(4\) must be finite and >= 0, got -1"):
        StrengthPath(optimizer, lambda epoch: -1.0 if epoch else 0.0).step(4)
    with pytest.raises(ValueError, match="whose penalty has a strength to set, got none"):
        StrengthPath(HAPG(net.parameters()), lambda epoch: 1.0)


def test_stacks_follow_edits_of_the_state():
    params = [nn.Parameter(torch.ones(3)) for _ in range(6)]
    optimizer = HAPG(params, lr=0.1, penalty=L1(0.1), foreach=True)

    def step():
        for p in params:
            p.grad = p.detach().clone()
        with proxopt.kernels.enabled(False):
            optimizer.step()

    step()
    assert len(stacks.split(optimizer, optimizer.param_groups[0], None, [[p] for p in params])[0]) == 1
    saved = copy.deepcopy(optimizer.state_dict())
    start = [p.detach().clone() for p in params]
    step()
    first = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, s in zip(params, start):
            p.copy_(s)
    optimizer.load_state_dict(saved)
    step()
    assert all(torch.equal(p, q) for p, q in zip(params, first))


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.5}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}],
    ids=str,
)
def test_behind_sgd_the_prox_has_the_step_that_momentum_takes(options):
    target = torch.tensor([3.0, 0.5, -2.0], dtype=torch.float64)
    for foreach in (False, True):
        w = nn.Parameter(torch.full((3,), 5.0, dtype=torch.float64))
        optimizer = Proximal(torch.optim.SGD([w], lr=0.02, foreach=foreach, **options), L1(1.0))
        for _ in range(2000):
            w.grad = w.detach() - target
            optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_momentum_of_one_has_no_such_step():
    optimizer = Proximal(SGD([nn.Parameter(torch.ones(1))], momentum=1.0), L1(1.0))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    with pytest.raises(ValueError, match="momentum must be < 1 for a penalty behind SGD, got 1"):
        optimizer.step()


SOLVERS = {
    "ProxSGD": (lambda p, pen: ProxSGD(p, lr=0.3, rho=1.0, penalty=pen), 1500),
    "ProxSGD tau": (lambda p, pen: ProxSGD(p, lr=0.5, tau=3.0, penalty=pen), 1500),
    "HAPG": (lambda p, pen: HAPG(p, lr=0.3, extrapolation=0.7, penalty=pen), 1000),
    "ProxAdam": (lambda p, pen: ProxAdam(p, lr=0.02, betas=(0.5, 0.999), penalty=pen), 3000),
    "AdamHAPG": (lambda p, pen: AdamHAPG(p, lr=0.01, extrapolation=0.5, penalty=pen), 3000),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_an_optimizer_converges_to_the_minimum_of_loss_plus_penalty(name):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(60, 20)) / 6, rng.normal(size=60)
    penalty = SparseGroupLasso(0.6, 0.5, Groups.along(1), metric="exact")
    best = fista(LeastSquares(a, b), Rows(penalty), np.zeros(20), tol=1e-12).x
    make, steps = SOLVERS[name]
    w = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64) + 0.1)
    optimizer = make([w], penalty)
    matrix, target = torch.tensor(a), torch.tensor(b)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if "Adam" in name else None
    for _ in range(steps):
        w.grad = (matrix.T @ (matrix @ w.detach().reshape(-1) - target)).reshape(5, 4)
        optimizer.step()
        if scheduler:
            scheduler.step()
    optimizer.eval()
    np.testing.assert_allclose(w.detach().numpy().reshape(-1), best, atol=1e-6)
    assert 0 < int((best == 0).sum()) < 20


class Rows:
    """A penalty on a matrix of five rows, for a vector."""

    def __init__(self, penalty):
        self.penalty = penalty

    def value(self, x):
        return self.penalty.value(x.reshape(5, 4))

    def prox(self, x, step):
        return self.penalty.prox(x.reshape(5, 4), step).reshape(-1)


@pytest.mark.parametrize("metric", ["median", "support"])
def test_the_approximate_metrics_have_other_fixed_points_where_steps_differ_inside_a_group(metric):
    best, steps = np.array([1.0, 2.0]), np.array([0.1, 1.0])
    penalty = GroupL2(1.0, weights="none")
    grad = -best / np.linalg.norm(best)  # so that best is stationary
    exact = penalty.prox(best - steps * grad, steps)
    np.testing.assert_allclose(exact, best, atol=1e-12)
    cheap = GroupL2(1.0, weights="none", metric=metric).prox(best - steps * grad, steps)
    assert np.abs(cheap - best).max() > 0.05
