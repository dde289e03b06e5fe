"""The extrapolation of HAPG and AdamHAPG under noisy gradients: what a cap bounds and the uncapped rule does not.

f(x) = x^2 / 2 in each of many coordinates, gradients x + noise with noise ~ N(0, 1), no penalty. HAPG is then a linear
recursion, whose stationary variance is known; AdamHAPG is one up to its slowly varying step.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache

import numpy as np
import pytest

from proxopt import updates

WIDTH, EARLY, LATE = 1000, 250, 2000
RATES = {"hapg": 0.02, "adam_hapg": 0.02}
RULES = ("default", "nesterov")
RUNS = [(name, rule) for name in RATES for rule in RULES]


def keywords(rule: str) -> dict:
    return {} if rule == "default" else {"extrapolation": rule}


@cache
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(LATE, WIDTH)).astype(np.float32)


def in_numpy(name: str, rule: str) -> list:
    x, state, points = np.zeros(WIDTH, np.float32), None, []
    for t, n in enumerate(noise(), 1):
        x, state = getattr(updates, name)(x, x + n, state, None, lr=RATES[name], **keywords(rule))
        if t in (EARLY, LATE):
            points.append(state.point)
    return points


def in_torch(name: str, rule: str) -> list:
    torch, proxopt_torch = pytest.importorskip("torch"), pytest.importorskip("proxopt_torch")
    make = {"hapg": proxopt_torch.HAPG, "adam_hapg": proxopt_torch.AdamHAPG}[name]
    w = torch.nn.Parameter(torch.zeros(WIDTH))
    optimizer, points = make([w], lr=RATES[name], **keywords(rule)), []
    for t, n in enumerate(torch.from_numpy(noise()), 1):
        w.grad = w.detach() + n
        optimizer.step()
        if t in (EARLY, LATE):
            with optimizer.at_prox_point():
                points.append(w.detach().numpy().copy())
    return points


@cache
def all_in_jax() -> dict:
    """All runs in one compiled program."""
    jax, optax, proxopt_jax = pytest.importorskip("jax"), pytest.importorskip("optax"), pytest.importorskip("proxopt_jax")
    makers = {run: getattr(proxopt_jax, run[0])(RATES[run[0]], None, **keywords(run[1])) for run in RUNS}

    def step(carry: dict, n: jax.Array) -> tuple:
        after = {}
        for run, (x, state) in carry.items():
            update, state = makers[run].update(x + n, state, x)
            after[run] = optax.apply_updates(x, update), state
        return after, None

    def walk(noise: jax.Array) -> tuple:
        start = jax.numpy.zeros(WIDTH)
        early, _ = jax.lax.scan(step, {run: (start, tx.init(start)) for run, tx in makers.items()}, noise[:EARLY])
        late, _ = jax.lax.scan(step, early, noise[EARLY:])
        return early, late

    stops = jax.jit(walk)(noise())
    return {run: [np.asarray(proxopt_jax.prox_point(state, x)) for x, state in (stop[run] for stop in stops)] for run in RUNS}


def in_jax(name: str, rule: str) -> list:
    return all_in_jax()[name, rule]


LIBRARIES = {"numpy": in_numpy, "torch": in_torch, "jax": in_jax}
each_library = pytest.mark.parametrize("library", LIBRARIES)


def variances(library: str, name: str, rule: str) -> list[float]:
    """Mean squares of the prox point after EARLY and LATE steps; at one they scatter by sqrt(2 / WIDTH) = 4.5 %."""
    return [float(np.mean(np.square(p, dtype=np.float64))) for p in LIBRARIES[library](name, rule)]


def stationary_variance(lr: float, u: float) -> float:
    """Of p_t = c ((1 + u) p_{t-1} - u p_{t-2}) - lr n_t with c = 1 - lr: an autoregressive process of order two."""
    c = 1 - lr
    return lr**2 * (1 + c * u) / ((1 - c * u) * (1 - c) * (1 + c + 2 * c * u))


@each_library
def test_under_noise_the_default_of_hapg_has_the_variance_of_its_cap_and_the_uncapped_rule_that_of_the_noise(library):
    lr = RATES["hapg"]
    _, capped = variances(library, "hapg", "default")
    _, uncapped = variances(library, "hapg", "nesterov")
    assert capped == pytest.approx(stationary_variance(lr, updates.EXTRAPOLATION), rel=0.2)
    assert stationary_variance(lr, updates.EXTRAPOLATION) == pytest.approx(lr / 2 / (1 - updates.EXTRAPOLATION), rel=0.2)
    assert uncapped == pytest.approx(0.5, rel=0.25), "no smaller lr makes it smaller"


@each_library
def test_under_noise_the_default_of_adam_hapg_settles_and_the_uncapped_rule_drifts_away(library):
    early, late = variances(library, "adam_hapg", "default")
    assert late < 1.4 * early
    drift_early, drift_late = variances(library, "adam_hapg", "nesterov")
    assert drift_late > 3 * drift_early
    assert drift_late > 15 * late


@pytest.mark.parametrize("step", [1e-3, 1e-2, 0.1, 1.0])
def test_without_a_cap_nothing_damps_adam_hapg_at_its_default_first_beta(step):
    """The recursion of (p_t, p_{t-1}, m_t) at u = 1: its spectral radius is 1 at b1 = 1/2, more above, less under a cap."""

    def radius(u: float, b1: float) -> float:
        search = np.array([1 + u, -u, 0.0])
        mean = (1 - b1) * search + np.array([0.0, 0.0, b1])
        return float(np.abs(np.linalg.eigvals(np.array([search - step * mean, [1.0, 0.0, 0.0], mean]))).max())

    assert radius(1.0, 0.5) == pytest.approx(1.0, abs=1e-9)
    assert radius(1.0, 0.6) > 1 + 1e-4
    assert radius(updates.EXTRAPOLATION, 0.5) < 1 - 1e-4


def test_the_default_is_one_number_in_every_library():
    found = [updates.hapg, updates.adam_hapg, updates.momentum]
    if (torch := pytest.importorskip("proxopt_torch")) and (jax := pytest.importorskip("proxopt_jax")):
        found += [torch.HAPG, torch.AdamHAPG, jax.hapg, jax.adam_hapg]
    assert {inspect.signature(f).parameters["extrapolation"].default for f in found} == {updates.EXTRAPOLATION}
    assert 0 < updates.EXTRAPOLATION < 1


@pytest.mark.parametrize("rule", ["nesterov", "as_printed", 0.5])
@pytest.mark.parametrize("name", ["HAPG", "AdamHAPG"])
def test_a_saved_torch_optimizer_keeps_its_rule_when_another_loads_it(name, rule):
    torch, proxopt_torch = pytest.importorskip("torch"), pytest.importorskip("proxopt_torch")
    w, other = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = getattr(proxopt_torch, name)([w], lr=0.05, extrapolation=rule)

    def go_on(optimizer, w, steps):
        for _ in range(steps):
            w.grad = w.detach() * torch.tensor([1.0, 0.5, 0.1, 0.01, 0.001])
            optimizer.step()

    go_on(optimizer, w, 40)  # u_t passes the default cap at t = 29
    resumed = getattr(proxopt_torch, name)([other], lr=0.05)
    assert resumed.param_groups[0]["extrapolation"] == updates.EXTRAPOLATION
    with torch.no_grad():
        other.copy_(w)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["extrapolation"] == rule
    go_on(optimizer, w, 20)
    go_on(resumed, other, 20)
    assert torch.equal(w, other)


# -- the benchmark ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HAPG", "AdamHAPG"])
def test_a_network_in_the_stack_of_the_benchmark_is_trained_as_alone(name):
    torch, benchmark = pytest.importorskip("torch"), pytest.importorskip("extrapolation")
    problem, in_torch, (make, lr) = benchmark.problem, benchmark.in_torch, benchmark.DIGITS[name]
    settings = problem.Settings(seeds=2, epochs=1, batch=32, drop_last=True)
    data, stack = in_torch.Batches(problem.Data(settings)), benchmark.Stack(settings, make, lr)
    seed, rule, strength = 1, 2, 1
    layers = [[torch.nn.Parameter(p[seed, :1].detach().clone()) for p in ps] for ps in in_torch.initial(settings, 1)]
    penalty = benchmark.SparseGroupLasso(benchmark.STRENGTHS[strength], 0.5, problem.OUTGOING)
    groups = [{"params": layers[0], "penalty": penalty}, {"params": layers[1]}]
    optimizer = make(groups, lr=lr, extrapolation=benchmark.RULES[rule])
    for images, labels in data.epoch(0):
        stack.step(images, labels)
        optimizer.zero_grad()
        one = slice(seed, seed + 1)
        in_torch.loss_of(images[one], labels[one], *([p[None] for p in ps] for ps in layers)).backward()
        optimizer.step()
    optimizer.eval()
    place = rule * len(benchmark.STRENGTHS) + strength
    for found, alone in zip(stack.points, layers[0] + layers[1], strict=True):
        torch.testing.assert_close(found[seed, place], alone[0].detach(), rtol=1e-3, atol=1e-5)


def test_the_benchmark_goes_on_where_it_was_and_writes_the_same(tmp_path, capsys):
    benchmark = pytest.importorskip("extrapolation")
    options = "--epochs 1 --seeds 1 --batches 256 --noisy-steps 20 --exact-steps 20".split()
    benchmark.main(["--out", str(tmp_path), *options])
    first = (tmp_path / "extrapolation.csv").read_bytes()
    assert (tmp_path / "extrapolation.png").stat().st_size > 10_000
    assert "cap 0.9 (default) |" in capsys.readouterr().out
    stages = sorted((tmp_path / "stages").glob("*.json"))
    stages[0].unlink()
    before = [file.stat().st_mtime_ns for file in stages[1:]]
    benchmark.main(["--out", str(tmp_path), *options])
    assert (tmp_path / "extrapolation.csv").read_bytes() == first
    assert [file.stat().st_mtime_ns for file in stages[1:]] == before
    with pytest.raises(SystemExit, match="was written with other settings"):
        benchmark.main(["--out", str(tmp_path), *options, "--seeds", "2"])
