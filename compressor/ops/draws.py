"""Drawing from distributions, by one number each."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(probabilities: Tensor, chances: Tensor) -> Tensor:
    """The first of each row's entries (n, 1) at which the sum of what is likely passes its chance (n, 1) in 0 … 1.

    `probabilities` (n, entries) float32 need not sum to one. Of so many entries this takes a fraction of what
    torch.multinomial does, which draws a number for each. On the host, whose running sums are the same each time.
    """
    mass = probabilities.cpu().cumsum(-1)
    found = torch.searchsorted(mass, chances * mass[:, -1:], right=True)
    return found.clamp_max(mass.shape[1] - 1).to(probabilities.device)
