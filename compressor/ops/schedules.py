"""Learning rates over the steps of a training, as shares of the full rate."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def rate_share(step: int, steps: int, schedule: Schedule = "cosine", rise: int = 0, floor: float = 0.0) -> float:
    """The share at a step, from 0: up over the first `rise` steps, then down to `floor` along half a cosine or a line.

    The fall counts from step 0, so that the rise cuts into it.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    fall = {"cosine": cosine, "linear": 1 - step / steps, "constant": 1.0}[schedule]
    return min(1.0, (step + 1) / max(1, rise)) * (floor + (1 - floor) * fall)
