"""The controller that turns measured shares into a factor for the strengths. It computes with plain numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from proxopt._checks import in_range

Schedule: TypeAlias = Callable[[float], float]

FIRST = 1e-2
"""The first factor, as a share of the factor at which everything is zero."""

TRAVEL = math.log(1e12)
"""How far the logarithm of the factor can rise during the schedule. It limits the speed."""

FALL = 3.0
"""How much faster the factor falls than it rises, unless zeros become nonzero again."""

AHEAD = 0.2
"""What multiplies the factor at once while the share is below the wanted one, unless zeros become nonzero again."""

HORIZON = 3
"""The share is predicted so many measurements ahead, by its trend; one where zeros become nonzero again."""

CALMER, BOLDER = 0.5, 1.2
"""Where zeros become nonzero again: what multiplies the rate when the error changes its sign, and when it does not."""

DECAY = (4.0, 15.0)
"""The penalty may not decay so fast that it would vanish in 1/4 of the time that is left, or in 1/15 of the schedule."""

STALLED = math.log(1e6)
"""Growth of the factor without a fall of the share after which the target counts as out of reach, and growth ends."""


def schedule_of(schedule: str | Schedule) -> Schedule:
    """The function from the share of the time to the share of the way, for a name or a function."""
    if callable(schedule):
        return schedule
    found: dict[Any, Schedule] = {"cubic": lambda t: 1 - (1 - t) ** 3, "linear": lambda t: t}
    if not isinstance(schedule, str) or schedule not in found:
        raise ValueError(f"schedule must be 'cubic', 'linear' or a function, got {schedule!r}")
    return found[schedule]


@dataclass
class Controller:
    r"""Integral control of the logarithm of the factor, with a dead band and a limit on how fast the penalty decays.

    With the share :math:`c`, its trend :math:`\dot c` per measurement, the wanted share :math:`c^*` and the value R of the
    penalties, which falls long before the first group is zero,

    .. math::

        e = \frac{c + h \min(\dot c, 0) - c^*}{2 \tau}, \qquad
        d = 1 + \frac{n \dot R}{R \min(4 / (1 - t), 15)}, \qquad
        \log f \leftarrow \log f + r \operatorname{clip}(\min(e, 2 d), -3, 1) \quad \text{if } |e| > \tfrac14

    for the tolerance :math:`\tau`, the horizon h, the number n of measurements during the schedule, of which the share t has
    passed, and a rate r.

    tolerance: in shares. measurements: n. log_factor: log f, None before the strengths act. ahead: whether the share is below the
    wanted one. reversible: whether zeros have become nonzero again when the strength fell. gain: what then multiplies
    the rate. error: e. best: the smallest share so far, and at: log f there.
    """

    tolerance: float
    measurements: float
    log_factor: float | None = None
    ahead: bool = False
    reversible: bool = False
    gain: float = 1.0
    error: float = 0.0
    share: float | None = None
    value: float | None = None
    trend: float = 0.0
    decay: float = 0.0
    best: float = math.inf
    at: float = 0.0

    def start(self, zeroing: float | None) -> None:
        """Let the strengths act, with a first factor of 1 where ``zeroing``, at which everything is zero, is unknown."""
        self.log_factor = self.at = math.log(FIRST * zeroing) if zeroing else 0.0

    @property
    def factor(self) -> float:
        """The factor that multiplies the strengths."""
        return 0.0 if self.log_factor is None else math.exp(self.log_factor) * (AHEAD if self.ahead else 1.0)

    @property
    def stalled(self) -> bool:
        """Whether the factor has grown as far as it may without a fall of the share."""
        return self.log_factor is not None and self.log_factor >= self.at + STALLED

    def update(self, share: float, wanted: float, value: float, time: float) -> None:
        """Take in a measurement of the share and of the penalty, at a time in [0, 1], and change the factor."""
        if self.share is not None and self.value is not None:
            self.reversible |= self.ahead and share > self.share + self.tolerance / 2
            self.trend += 0.5 * (share - self.share - self.trend)
            self.decay += 0.5 * ((self.value - value) / max(self.value, 1e-30) - self.decay)
        self.share, self.value = share, value
        if self.log_factor is None:
            return
        if share < self.best - self.tolerance / 4:
            self.best, self.at = share, self.log_factor
        horizon = 1 if self.reversible else HORIZON
        error = (share + horizon * min(self.trend, 0.0) - wanted) / (2 * self.tolerance)
        self.gain = min(max(self.gain * (CALMER if error * self.error < 0 else BOLDER), 0.1), 1.0) if self.reversible else 1.0
        self.error = error
        self.ahead = error < -0.25 and not self.reversible
        if abs(error) <= 0.25:
            return
        rate = min(max(TRAVEL / self.measurements, 0.01), 1.0) * self.gain
        allowed = min(DECAY[0] / max(1 - time, 1e-9), DECAY[1]) / self.measurements
        fall = 1.0 if self.reversible else FALL
        change = rate * min(max(min(error, 2 - 2 * self.decay / allowed), -fall), 1.0)
        self.log_factor = max(min(self.log_factor + change, self.at + STALLED), self.at - STALLED)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


def wanted_share(schedule: Schedule, target: float, time: float) -> float:
    """The share that is due at a time in [0, 1] of the schedule."""
    way = schedule(min(max(time, 0.0), 1.0))
    in_range(f"schedule({time:g})", way, 0.0, 1.0)
    return 1 - (1 - target) * float(way)
