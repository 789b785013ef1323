"""A range for each activation, chosen by what it does to the outputs on examples that no range was taken from.

First every rule is tried on all tensors at once. Where the best of them is not near enough, the tensors are gone
through in groups, in the order of the graph, and a group takes another rule where the outputs come nearer to those on
floats. That is at most `TRIALS` runs over `N_JUDGED` examples, of a graph whose scales are inputs; no randomness is in
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compressor.core.output_kinds import kind_of
from compressor.export.ranges import RULES, Range, Rule, Seen

N_JUDGED = 8
N_GROUPS = 6
TRIALS = len(RULES) + N_GROUPS * (len(RULES) - 1)
NEAR = 1e-4
"""An error that is near enough: of one output 1 % of its values, or a divergence of so many nats."""
_HOPELESS = 10.0
"""How many times the best rule's error another may have, to be tried on groups."""
BETTER = 0.98
"""What the error has to fall to: less may be chance."""
MOST_ERROR, MOST_DIVERGENCE, MOST_OTHERS = 0.02, 0.05, 0.02
"""Of an output that is still of use: relative error (of logits twice as much), nats, and the share of scores that pass
the threshold wrongly."""
_ENOUGH = 40
"""Scores above the threshold that say something, the original's and the artifact's."""
_TOP = 0.01
"""Share of a channel's values that its extremes are."""

Outputs = list[dict[str, np.ndarray]]
"""Of each example, by name."""


def held_out(n: int) -> int:
    """How many of `n` examples ranges are judged on and not taken from; of few none can be spared."""
    return min(N_JUDGED, n // 4)


def chosen_ranges(
    found: Sequence[Seen], outputs: Callable[[list[Range]], Outputs], wanted: Outputs,
    inputs: Mapping[str, np.ndarray],
) -> list[Range]:  # fmt: skip
    """A range for each value.

    Args:
        outputs: What the network gives with such ranges, on the examples of `wanted`.
        wanted: What it gives on floats.
        inputs: The first example's, which tell outputs of texts.
    """
    known = [{rule: each.range(rule) for rule in RULES} for each in found]

    def error(rules: Sequence[Rule]) -> float:
        return distance(outputs([each[rule] for each, rule in zip(known, rules, strict=True)]), wanted, inputs)

    errors = {rule: error([rule for _ in known]) for rule in RULES}
    first = min(RULES, key=errors.__getitem__)
    least, best = errors[first], list[Rule](first for _ in known)
    for group in np.array_split(np.arange(len(known)), min(N_GROUPS, len(known))) if least > NEAR else ():
        for rule in RULES:
            rules = list(best)
            for at in group:
                rules[at] = rule
            hopeful = rules != best and errors[rule] <= _HOPELESS * errors[first]
            if hopeful and (now := error(rules)) < least * BETTER:
                least, best = now, rules
    return [each[rule] for each, rule in zip(known, best, strict=True)]


def distance(found: Outputs, wanted: Outputs, inputs: Mapping[str, np.ndarray]) -> float:
    """How far outputs are from what is wanted, each by what it is, summed; infinite where a value is not finite."""
    total = 0.0
    for name in wanted[0]:
        a, b = (np.concatenate([np.atleast_1d(each[name]) for each in rows]) for rows in (found, wanted))
        if b.dtype.kind not in "fc":
            total += float((a != b).mean())
            continue
        if not np.isfinite(a[np.isfinite(b)]).all():
            return np.inf
        kind = kind_of(name, b, inputs)
        if kind.label in ("classes", "tokens", "positions"):
            given, right = (np.moveaxis(each, kind.axis, -1) for each in (a, b))
            total += _divergence(given, right, kind.probabilities)
            total += 0.0 if kind.probabilities else _relative(a, b)  # four numbers may be logits, or a box
        else:
            total += _relative(a, b) + (_of_extremes(a, b) if b.ndim > 2 else 0.0)
    return total


def strayed(found: Outputs, wanted: Outputs, inputs: Mapping[str, np.ndarray]) -> float:
    """How far the output that is furthest off has come from what it decides, as a share of what is tolerable: above 1
    an artifact is of little use.

    Of classes the divergence counts, of scores how many of those above the threshold are the same ones (F₁), of all
    else the relative error.
    """
    worst = 0.0
    for name in wanted[0]:
        a, b = (np.concatenate([np.atleast_1d(each[name]) for each in rows]) for rows in (found, wanted))
        if b.dtype.kind not in "fc":
            continue
        if not np.isfinite(a[np.isfinite(b)]).all():
            return np.inf
        kind = kind_of(name, b, inputs)
        relative = _relative(a, b) ** 0.5 / MOST_ERROR
        if kind.label == "scores" and kind.threshold is not None:
            there, right = a > kind.threshold, b > kind.threshold
            n = int(there.sum() + right.sum())
            worst = max(worst, (1 - 2 * int((there & right).sum()) / n) / MOST_OTHERS if n >= _ENOUGH else 0.0)
        elif kind.label in ("classes", "tokens", "positions"):
            given, right = (np.moveaxis(each, kind.axis, -1) for each in (a, b))
            divergence = _divergence(given, right, kind.probabilities) / MOST_DIVERGENCE
            worst = max(worst, divergence, 0.0 if kind.probabilities else relative / 2)
        else:
            worst = max(worst, relative)
    return worst


def _divergence(a: np.ndarray, b: np.ndarray, probabilities: bool) -> float:
    """The mean KL divergence of the artifact's classes from the original's, in nats."""
    log_q, log_p = (
        np.log(np.maximum(each, 1e-12)) if probabilities else _log_softmax(each.astype(np.float64)) for each in (a, b)
    )
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()))


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Σ (a − b)² / Σ b²"""
    finite = np.isfinite(b)
    return float(((a - b)[finite].astype(np.float64) ** 2).sum() / max(float((b[finite] ** 2).sum()), 1e-30))


def _of_extremes(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over channels of Σ (a − b)² / Σ b² where |b| is largest: of boxes and scores these decide.

    Channels of which nothing is large beside the output's largest value count little.
    """
    channels = [np.moveaxis(each, 1, 0).reshape(each.shape[1], -1).astype(np.float64) for each in (a, b)]
    a, b = channels
    size = max(1, int(_TOP * b.shape[1]))
    top = np.argpartition(-np.abs(b), size - 1, axis=1)[:, :size]
    a, b = np.take_along_axis(a, top, 1), np.take_along_axis(b, top, 1)
    floor = 1e-6 * size * float(np.abs(b).max()) ** 2
    return float((((a - b) ** 2).sum(1) / ((b**2).sum(1) + floor + 1e-30)).mean())
