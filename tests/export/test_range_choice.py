"""Ranges are chosen by what they do to the outputs, tensor group by tensor group, and the choice needs no luck."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.export.range_choice import TRIALS, chosen_ranges, distance, held_out, strayed
from compressor.export.ranges import RULES, Seen, closest


def seen(values: np.ndarray) -> Seen:
    found = Seen()
    for example in values:
        found.add(example)
    return found


def rounded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    return np.clip(np.round(values / step) * step, low, high)


def test_each_tensor_gets_the_range_that_its_outputs_need():
    generator = np.random.default_rng(0)
    values = [generator.standard_normal((8, 20_000)).astype(np.float32) * 0.3 for _ in range(2)]
    for each in values:
        each[:, :3] = 300.0  # outliers, more than the quantile cuts off
    exact = [{"out": np.concatenate([np.sort(values[0][at])[-3:], values[1][at][3:6]])[None]} for at in range(8)]

    def outputs(ranges):
        return [
            {"out": np.concatenate([rounded(np.sort(values[0][at])[-3:], *ranges[0]),
                                    rounded(values[1][at][3:6], *ranges[1])])[None]}
            for at in range(8)
        ]  # fmt: skip

    found = [seen(tensor) for tensor in values]
    found[1].clipped[:] = np.array([-1.5, 1.5]) * found[1].n
    ranges = chosen_ranges(found, outputs, exact, {})
    assert ranges[0][1] == 300.0
    assert distance(outputs(ranges), exact, {}) <= min(
        distance(outputs([each.range(rule) for each in found]), exact, {}) for rule in RULES
    )


def test_no_more_is_tried_than_is_said():
    generator, calls = np.random.default_rng(1), []
    found = [seen(generator.standard_normal((4, 500))) for _ in range(40)]
    wanted = [{"out": generator.standard_normal((1, 7))}]

    def outputs(ranges):
        calls.append(ranges)
        return [{"out": generator.standard_normal((1, 7))}]

    chosen_ranges(found, outputs, wanted, {})
    assert len(RULES) < len(calls) <= TRIALS


def test_what_is_near_enough_is_left_alone():
    generator, calls = np.random.default_rng(1), []
    found = [seen(generator.standard_normal((4, 500))) for _ in range(4)]
    wanted = [{"out": generator.standard_normal((1, 7))}]
    chosen_ranges(found, lambda ranges: calls.append(ranges) or wanted, wanted, {})
    assert len(calls) == len(RULES)


def test_extremes_of_a_channel_count_beside_large_boxes():
    """Scores below one beside boxes of hundreds, in one output: halving the scores is seen."""
    generator = np.random.default_rng(2)
    boxes, scores = 300 * generator.random((1, 4, 500)), 1e-4 * generator.random((1, 3, 500))
    scores[0, 0, :5] = 0.9
    wanted = [{"out": np.concatenate([boxes, scores], 1)}]
    halved = [{"out": np.concatenate([boxes, scores / 2], 1)}]
    assert distance(halved, wanted, {}) > 0.02
    assert distance(wanted, wanted, {}) == 0


def test_the_closest_range_clips_a_lonely_outlier_and_keeps_an_even_spread():
    generator = np.random.default_rng(3)
    lonely = np.append(generator.standard_normal(100_000) * 0.3, 3.0)
    assert closest(lonely, (float(lonely.min()), 3.0))[1] < 3.0
    even = generator.random(2000)
    assert closest(even, (0.0, 1.0)) == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize(("n", "held"), [(256, 8), (16, 4), (3, 0)])
def test_examples_are_held_out_where_there_are_enough(n, held):
    assert held_out(n) == held


GENERATOR = np.random.default_rng(4)
NUMBERS = GENERATOR.normal(size=(64, 3, 6, 6))
LOGITS = 4 * GENERATOR.normal(size=(64, 10))
MAP = (GENERATOR.random((64, 1, 8, 8)) > 0.9) * 0.8 + 0.1


def one_by_one(rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"out": row[None]} for row in rows]


def flipped(scores: np.ndarray, n: int) -> np.ndarray:
    """`n` of the scores above a half are just below it."""
    found = scores.copy()
    found.flat[np.flatnonzero(found > 0.5)[:n]] = 0.45
    return found


@pytest.mark.parametrize(
    ("wanted", "near", "far"),
    [
        (NUMBERS, NUMBERS * 1.01, NUMBERS * 1.05),  # relative error
        (LOGITS, LOGITS * 1.02, LOGITS + 0.2 * GENERATOR.normal(size=LOGITS.shape)),
        (MAP, flipped(MAP, 4), flipped(MAP, 60)),  # scores above the threshold, of some 400
        (MAP, MAP - 0.02, np.full_like(MAP, 0.1)),  # of scores the errors do not count, but what they decide
        (NUMBERS, NUMBERS, np.where(NUMBERS > 2, np.nan, NUMBERS)),
    ],
)
def test_outputs_have_strayed_where_they_no_longer_decide_the_same(wanted, near, far):
    near, far, wanted = (one_by_one(each) for each in (near, far, wanted))
    assert strayed(near, wanted, {}) <= 1 < strayed(far, wanted, {})


def test_the_output_that_is_furthest_off_is_the_one_that_counts():
    wanted = [{"a": row[None], "b": row[None]} for row in NUMBERS]
    found = [{"a": row[None], "b": 1.04 * row[None]} for row in NUMBERS]
    assert strayed(found, wanted, {}) == pytest.approx(2)


def test_few_scores_above_a_threshold_tell_nothing():
    few = MAP[:4, :, :4]
    assert 0 < (few > 0.5).sum() < 20
    assert strayed(one_by_one(flipped(few, 2)), one_by_one(few), {}) == 0
