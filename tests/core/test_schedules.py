"""Schedules: step -> number, each its formula, never outside its ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxopt import schedules

numbers = st.floats(1e-6, 1e3)
counts = st.integers(2, 500)
times = st.integers(0, 2000)


@given(numbers, times)
def test_constant_stays(value, t):
    assert schedules.constant(value)(t) == value


@given(numbers, numbers, times)
def test_linear_rises_to_stop_and_stays(slope, stop, t):
    path = schedules.linear(slope, start=0.0, stop=stop)
    assert path(t) == min(slope * t, stop)
    assert path(t) <= path(t + 1) <= stop
    assert schedules.linear(slope)(t) == slope * t


@given(numbers, counts, times)
def test_warmup_reaches_the_value_after_its_steps(value, steps, t):
    path = schedules.warmup(value, steps)
    assert path(0) == 0 and path(steps) == value and path(steps + t) == value
    assert math.isclose(path(steps // 2), value * (steps // 2) / steps)


@given(numbers, numbers, counts, times)
def test_cosine_falls_from_start_to_stop_and_stays(start, stop, steps, t):
    path = schedules.cosine(start, steps, stop)
    assert math.isclose(path(0), start, abs_tol=1e-9) and math.isclose(path(steps + t), stop, abs_tol=1e-9)
    assert min(start, stop) - 1e-9 <= path(t) <= max(start, stop) + 1e-9
    assert math.isclose(schedules.cosine(start, 2 * steps, stop)(steps), (start + stop) / 2)


@given(numbers, numbers, counts, times)
def test_geometric_is_a_grid_of_equal_ratios_with_both_ends(start, stop, steps, t):
    grid = schedules.geometric(start, stop, steps)
    assert math.isclose(grid(0), start) and math.isclose(grid(steps - 1), stop)
    assert math.isclose(grid(steps + t), stop)
    ratios = [grid(t + 1) / grid(t) for t in range(min(steps - 1, 20))]
    assert all(math.isclose(r, ratios[0], rel_tol=1e-9) for r in ratios)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.constant(-1.0), "value must be finite and >= 0, got -1.0"),
        (lambda: schedules.linear(-0.1), "slope must be finite and >= 0, got -0.1"),
        (lambda: schedules.linear(0.1, start=math.nan), "start must be finite and >= 0, got nan"),
        (lambda: schedules.linear(0.1, stop=-1.0), "stop must be >= 0, got -1.0"),
        (lambda: schedules.linear(0.1, stop=math.nan), "stop must be >= 0, got nan"),
        (lambda: schedules.warmup(1.0, 0), "steps must be finite and > 0, got 0"),
        (lambda: schedules.cosine(1.0, 0), "steps must be finite and > 0, got 0"),
        (lambda: schedules.cosine(1.0, 10, -0.5), "stop must be finite and >= 0, got -0.5"),
        (lambda: schedules.geometric(0.0, 1.0, 3), "start must be finite and > 0, got 0.0"),
        (lambda: schedules.geometric(1.0, 0.0, 3), "stop must be finite and > 0, got 0.0"),
        (lambda: schedules.geometric(1.0, 0.1, 1), "steps must be finite and >= 2, got 1"),
    ],
)
def test_what_makes_no_schedule_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
