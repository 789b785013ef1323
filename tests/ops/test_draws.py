"""Drawing from distributions."""

from __future__ import annotations

import torch

from compressor.ops.draws import draw


def test_entries_are_drawn_as_often_as_they_are_likely_and_never_where_they_are_not():
    shares = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    chances = (torch.arange(1000) + 0.5).view(-1, 1) / 1000
    found = draw(3 * shares.expand(1000, 6), chances).flatten()
    assert torch.bincount(found, minlength=6).tolist() == [0, 500, 0, 300, 200, 0]
