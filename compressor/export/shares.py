"""What folds in a graph, shared out among the passes in which onnxruntime folds it: arithmetic on bytes alone.

`staging` puts a graph's nodes behind gates by it, and `in_use` says of a plan what its graph will take. No torch, no
graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

STAGES = 9
"""onnxruntime makes ten passes; the last is for what hangs on the gates."""
WORTH_IT = 24_000_000
"""Bytes made by folding below which a graph stays as it is."""
ENOUGH = 1.25
"""Of what stays: below that much at once, fewer stages are as good."""
_LEFT = 0.01
"""Of all bytes: small units that need no gates."""


@dataclass(eq=False)
class Share:
    """What folds together.

    final    whether something that does not fold uses it, so that it stays
    made     bytes of all that is made for it
    kept     bytes of it
    before   what it needs
    stage    when it folds
    """

    final: bool = True
    made: int = 0
    kept: int = 0
    before: set[Share] = field(default_factory=set)
    stage: int = 0


@dataclass(frozen=True)
class Folding:
    """What folding a graph takes, in bytes: what each stage makes, and what there is when it begins."""

    made: tuple[int, ...]
    there: tuple[int, ...]
    kept: int

    @property
    def peak(self) -> int:
        """The most that there is at once."""
        return max((there + made for there, made in zip(self.there, self.made, strict=True)), default=0)


def share_out(shares: Sequence[Share], stages: int) -> None:
    """Gives each a stage, so that the most that there is at once is as little as it can be, within as few stages."""
    spare, small = _LEFT * sum(each.made for each in shares), set[Share]()
    for each in sorted(shares, key=lambda each: each.made):
        if each.made <= spare and not each.before:
            spare -= each.made
            small.add(each)
    kept = sum(each.kept for each in shares if each.final)
    high = sum(each.made for each in shares)
    low = max(each.made for each in shares)
    while high - low > high // 100:
        limit = (low + high) // 2
        if _fill(shares, small, limit) <= stages:
            high = limit
        else:
            low = limit
    _fill(shares, small, max(high, int(ENOUGH * kept)))


def _fill(shares: Sequence[Share], small: set[Share], limit: int) -> int:
    """Puts them into stages in turn, so that there is never more than `limit` at once; the number of stages."""
    stage, there = 0, 0
    made = sum(each.made for each in small)
    freed = 0
    for share in shares:
        if share in small:
            share.stage = 0
            continue
        if there + made + share.made > limit and made:
            stage, there, made = stage + 1, there + made - freed, 0
            freed = 0
        share.stage = stage
        made += share.made
        freed += share.made - share.kept + sum(each.kept for each in share.before if not each.final)
    return stage + 1


def folding_of(shares: Sequence[Share]) -> Folding:
    """Of what has stages."""
    n = max((each.stage for each in shares), default=0) + 1
    made, there = [0] * n, [0] * n
    until: dict[Share, int] = {}
    for share in shares:
        for each in share.before:
            until[each] = max(until.get(each, 0), share.stage)
    for share in shares:
        made[share.stage] += share.made
        last = n - 1 if share.final else until.get(share, share.stage)
        for stage in range(share.stage + 1, last + 1):
            there[stage] += share.kept
    return Folding(tuple(made), tuple(there), sum(each.kept for each in shares if each.final))
