"""Early stopping of DARTS by the largest eigenvalue of the Hessian of the validation loss in the architecture (DARTS-ES).

Local averages of the eigenvalues are compared with earlier ones. When an average is larger than the one `stop_delay` eigenvalues
before it by more than `stop_factor`, the search stops, and its result is the genotype at the centre of the earlier average.

Source: Zela, Elsken, Saikia, Marrakchi, Brox, Hutter, "Understanding and robustifying differentiable architecture search", ICLR
2020, section 4.1. Windows at the start of the search are those of the published code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def epoch_to_return_to(rows: Sequence[Mapping[str, Any]], settings: Any) -> int | None:
    """The epoch whose genotype is the result of a search that stops now; None if it goes on.

    rows: of the epochs so far, some with a column "eigenvalue". settings: as those of DARTS. The last epoch of a search stops
    nothing.
    """
    s = settings
    found = [(row["epoch"], row["eigenvalue"]) for row in rows if "eigenvalue" in row and row["epoch"] < s.epochs]
    half = s.stop_window // 2
    least = s.stop_window - half  # eigenvalues of the first average
    averages = []
    for count in range(least, len(found) + 1):
        window = [value for _, value in found[max(count - s.stop_window, 0) : count]]
        averages.append(sum(window) / len(window))
        centre = found[count - 1][0] - s.eigenvalue_every * half
        earlier = centre - s.eigenvalue_every * s.stop_delay
        comparable = len(averages) > s.stop_delay and earlier >= s.stop_after
        if comparable and averages[-1] > s.stop_factor * averages[-1 - s.stop_delay]:
            return earlier
    return None
