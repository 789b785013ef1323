"""A search that learns: equal networks are one, predictions follow what was measured, and the target comes first."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

import numpy as np
import pytest

from compressor.ops.evolution import Search, Space, predictor
from compressor.ops.pareto import hypervolume

COUNTS = (3, 4, 3, 4)


def inactive(genes):
    """The last width is of a block that the third gene leaves out."""
    return {3} if genes[2] == 0 else set()


def values(genes) -> tuple[float, float]:
    """Time is a sum of products, loss falls as each gene grows."""
    depth, width, more, last = genes
    time = 1 + (depth + 1) * (width + 1) + (0 if more == 0 else more * (last + 2))
    loss = 3 / (depth + 1) + 2 / (width + 1) + (1.5 if more == 0 else 1 / (more + last + 1))
    return float(time), loss


def everything(space: Space) -> dict[tuple[int, ...], tuple[float, float]]:
    members = {space.canonical(genes) for genes in itertools.product(*map(range, space.counts))}
    return {genes: values(genes) for genes in sorted(members)}


def test_what_makes_no_difference_is_nothing_in_genes_and_code():
    space = Space(COUNTS, inactive)
    assert space.canonical((2, 1, 0, 3)) == (2, 1, 0, 0)
    assert space.code((2, 1, 0, 0))[-4:].tolist() == [0, 0, 0, 0]
    assert space.code((2, 1, 1, 0))[-4:].tolist() == [1, 0, 0, 0]
    generator = np.random.default_rng(0)
    drawn = {space.draw(generator) for _ in range(400)}
    assert drawn <= set(everything(space))
    assert len(drawn) > 80


def test_a_predictor_of_a_sum_is_exact_and_one_with_a_prior_follows_it_where_nothing_was_seen():
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 2, (60, 8)).astype(float)
    wanted = codes @ np.arange(8.0) + 2
    found = predictor(codes[:40], wanted[:40])
    assert np.abs(found(codes[40:], None) - wanted[40:]).max() < 0.1
    priors = generator.random(60) * 10
    rest = predictor(codes[:6], 3 * priors[:6] + 1, priors[:6])
    assert rest(codes[6:], priors[6:]) == pytest.approx(3 * priors[6:] + 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_begins_with_both_ends_and_measures_nothing_twice(seed):
    space = Space(COUNTS, inactive)
    search, seen = Search(space, seed), list[tuple[int, ...]]()
    asked = search.first(6)
    assert asked[:2] == [(0, 0, 0, 0), (2, 3, 2, 3)]
    for _ in range(4):
        assert len(asked) == len(set(asked))
        seen += asked
        search.tell({genes: values(genes) for genes in asked})
        asked = search.ask(5)
        assert not set(asked) & set(seen)
    assert search.tau is not None
    assert -1 <= min(search.tau) <= max(search.tau) <= 1


def test_trained_members_are_among_the_first_and_measured_once():
    trained = ((1, 1, 1, 1), (0, 3, 2, 3), (2, 3, 2, 3))
    space = Space(COUNTS, inactive, trained=trained)
    search = Search(space)
    asked = search.first(2)
    assert asked == list(dict.fromkeys(map(space.canonical, ((0,) * 4, (2, 3, 2, 3), *trained))))
    search.tell({genes: values(genes) for genes in asked[:-1]})
    assert search.first(0) == asked[-1:]


def test_nearly_all_of_the_front_is_found_with_half_of_what_chance_takes():
    space = Space(COUNTS, inactive, prior=lambda genes: values(genes)[0] + 0.3 * genes[1])
    whole, reference = everything(space), (24.0, 7.0)
    enough = 0.97 * hypervolume(list(whole.values()), reference)

    def needed(order: Iterator[tuple[int, ...]]) -> int:
        seen = list[tuple[float, float]]()
        while hypervolume(seen, reference) < enough:
            seen.append(values(next(order)))
        return len(seen)

    def asked(seed: int) -> Iterator[tuple[int, ...]]:
        search = Search(space, seed)
        batch = search.first(8)
        while True:
            yield from batch
            search.tell({genes: values(genes) for genes in batch})
            batch = search.ask(4)

    ours = statistics.median(needed(asked(seed)) for seed in range(3))
    chance = statistics.median(
        needed(iter(np.random.default_rng(seed).permutation(list(whole)).tolist())) for seed in range(9)
    )
    assert ours < chance / 2


def test_with_a_target_it_is_the_best_that_meets_it():
    space, target = Space(COUNTS, inactive), 9.0
    whole = everything(space)
    wanted = min((loss, time) for time, loss in whole.values() if time <= target)
    search = Search(space, 0, target)
    search.tell({genes: values(genes) for genes in search.first(8)})
    for _ in range(5):
        search.tell({genes: values(genes) for genes in search.ask(5)})
    best = search.best()
    assert best is not None
    assert whole[best][::-1] == wanted


def test_where_none_meets_the_target_there_is_no_best():
    search = Search(Space(COUNTS, inactive), 0, target=1.0)
    search.tell({genes: values(genes) for genes in search.first(8)})
    assert search.best() is None
    assert search.ask(4)


def test_a_space_that_is_used_up_gives_fewer_than_asked():
    search = Search(Space((2, 2)), 0)
    search.tell({genes: (float(sum(genes)), -float(sum(genes))) for genes in search.first(10)})
    assert len(search.known) == 4
    assert search.ask(5) == []


def test_the_same_seed_and_measurements_ask_for_the_same():
    found = []
    for _ in range(2):
        search = Search(Space(COUNTS, inactive), 3)
        search.tell({genes: values(genes) for genes in search.first(8)})
        found.append(search.ask(6))
    assert found[0] == found[1]
