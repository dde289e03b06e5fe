"""Numbers of a state for tables."""

from __future__ import annotations

from typing import Any

import numpy as np


def shortest(x: Any) -> float:
    """The shortest decimal number that is equal to a scalar in the scalar's precision: 0.03, not 0.029999999329."""
    return float(str(np.asarray(x)[()]))
