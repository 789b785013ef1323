"""Gates: which limits are broken, in whose measure a loss is limited, and how a speed is compared."""

from __future__ import annotations

import pytest

from compressor.core.errors import RecipeError
from compressor.core.report import Gates as GatesKept
from compressor.core.report import Report, Size, Speed
from compressor.plan.recipe import Gates
from compressor.plan.recipe_file import load_recipe
from compressor.run.gates import (
    broken_promises,
    lost_by_sizes,
    lost_quality,
    lost_size_or_speed,
    most_memory,
    promised,
    speedup,
)
from compressor.widths.allocate import Target

SPEEDS = {"speed": {"decode_tokens_per_second": 30.0}, "original_speed": {"decode_tokens_per_second": 10.0}}


@pytest.mark.parametrize(
    ("kind", "labelled", "limit"),
    [
        ("perplexity", False, {"max_perplexity_ratio": 1.05}),
        ("cosine", False, {"min_cosine": 0.95}),
        ("accuracy", False, {"min_agreement": 0.95}),
        ("accuracy", True, {"max_accuracy_drop": 0.05}),
    ],
)
def test_the_stricter_of_the_lines_and_the_recipes_loss_counts(kind, labelled, limit):
    for on_line, in_recipe in ((0.05, 0.2), (0.2, 0.05), (None, 0.05), (0.05, None)):
        found = promised(Gates(max_loss=in_recipe), Target(None, on_line, kind, labelled))
        ((name, value),) = limit.items()
        assert getattr(found, name) == pytest.approx(value)


def test_a_limit_that_is_stricter_by_itself_stays():
    assert promised(Gates(max_loss=0.1, min_cosine=0.99), Target(None, None, "cosine")).min_cosine == 0.99


def test_speed_is_tokens_per_second_or_inputs_per_second():
    assert speedup(Report.model_validate(SPEEDS)) == pytest.approx(3)
    inputs = Report(speed=Speed(latency_seconds=0.1), original_speed=Speed(latency_seconds=0.4))
    assert speedup(inputs) == pytest.approx(4)
    assert speedup(Report(speed=Speed(latency_seconds=0.1), original_speed=None)) is None


def test_size_and_speed_are_held_against_their_limits():
    report = Report.model_validate(SPEEDS | {"size": {"bytes": 5_000_000}})
    assert lost_size_or_speed(Gates(max_size=5_000_000, min_speedup=3.0), report) == []
    assert lost_size_or_speed(Gates(max_size=4_000_000, min_speedup=3.5), report) == [
        "size in MB, every file, is 5, the gate is 4", "speed over the original's is 3, the gate is 3.5",
    ]  # fmt: skip
    unknown = Report(size=Size(bytes=1), speed=None)
    assert lost_size_or_speed(Gates(min_speedup=1.0), unknown) == [
        "speed over the original's was not measured, the gate is 1"
    ]


def test_a_smaller_size_is_held_against_limits_of_quality_and_speed_by_itself():
    """It is twice as fast as the largest, which is 3 times as fast as the original, whenever both were timed."""
    report = Report.model_validate(SPEEDS | {
        "size": {"bytes": 5_000_000, "original_bytes": 1_000_000},
        "sizes": {"50": {"speed": {"decode_tokens_per_second": 100.0}},
                  "100": {"speed": {"decode_tokens_per_second": 50.0}}},
    })  # fmt: skip
    gates, judged = Gates(max_size=1_000, max_memory=1_000, min_speedup=7.0, min_cosine=0.9), {"50": {"cosine": 0.8}}
    target = Target(None, None, "cosine")
    assert lost_by_sizes(gates, gates, target, judged, report)[0] == {
        "50": ["cosine is 0.8, the gate is 0.9", "speed over the original's is 6, the gate is 7"]
    }
    assert lost_by_sizes(Gates(min_speedup=6.0, min_cosine=0.8), Gates(), target, judged, report)[0] == {"50": []}
    promises = Gates(promised_loss=0.02, promised_size=1.0, promised_speed=7.0)
    of_outputs = {"50": {"outputs": {"y": {"kind": "vectors", "cosine": 0.8}}}}
    assert lost_by_sizes(Gates(), promises, target, of_outputs, report)[0] == {
        "50": [
            "1 − cosine of 'y' is 20.00%, the recipe promises 2.00% at most",
            "speed over the original's is 6, the recipe promises 7",
        ]
    }
    unmeasured = Report(sizes={"50": {}, "100": {}})
    assert lost_by_sizes(gates, gates, target, {"50": None}, unmeasured)[0] == {"50": []}  # it is said of the largest


def test_what_sizes_miss_is_said_with_their_names_and_known_of_each():
    found = GatesKept.of(["a"], {"50": ["b", "c"], "75": []}, [], [])
    assert found.failures == ["a", "size 50: b", "size 50: c"]
    assert not found.passed
    assert [found.of_size("50", False), found.of_size("75", False), found.of_size("100", True)] == [
        ["b", "c"],
        [],
        ["a"],
    ]
    assert GatesKept.of([], {"50": []}, [], []).model_dump(exclude_unset=True)["passed"]


def test_memory_is_limited_by_the_most_of_loading_and_running():
    memory = {"loading": {"peak": 90_000_000, "after": 50_000_000}, "running": {"peak": 120_000_000}}
    report = Report.model_validate({"speed": {"memory": memory}})
    assert most_memory(report) == 120_000_000
    assert lost_size_or_speed(Gates(max_memory=120_000_000), report) == []
    assert lost_size_or_speed(Gates(max_memory=100_000_000), report) == [
        "memory in MB, loading and running, is 120, the gate is 100"
    ]
    (unknown,) = lost_size_or_speed(Gates(max_memory=1_000_000), Report(speed=None))
    assert unknown.startswith("memory in MB, loading and running, was not measured")


def test_the_accuracy_drop_is_limited_where_there_are_labels():
    quality = {"accuracy": 0.7, "original_accuracy": 0.8, "top1_agreement": 0.9}
    assert lost_quality(Gates(max_accuracy_drop=0.05), quality) == ["accuracy drop is 0.1, the gate is 0.05"]
    assert lost_quality(Gates(max_accuracy_drop=0.2, min_agreement=0.9), quality) == []


def test_what_is_not_a_number_keeps_no_limit():
    assert lost_quality(Gates(max_kl_divergence=1.0), {"kl_divergence": float("nan")}) == [
        "KL divergence is nan, the gate is 1"
    ]


def test_gates_in_a_recipe_are_written_as_people_write_them(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("imports: llm-2bit\ngates: {max_loss: 5%, max_size: 60MB, min_speedup: 2, max_memory: 200MB}\n")
    gates = load_recipe(file).gates
    assert gates.max_memory == 200_000_000
    assert (gates.max_loss, gates.max_size, gates.min_speedup) == (0.05, 60_000_000, 2.0)
    file.write_text("imports: llm-2bit\ngates: {max_size: 60XB}\n")
    with pytest.raises(RecipeError, match=r"mine.yaml, gates: max_size is '60XB'; it should be a size, as 60MB"):
        load_recipe(file)


PROMISES = Gates(promised_loss=0.02, promised_size=1, promised_speed=0.9)
NOTHING_ELSE = Target(None, None, "accuracy")


def promises_broken(output: dict, gates: Gates = PROMISES, target: Target = NOTHING_ELSE) -> list[str]:
    """What is said of an artifact with this output."""
    worse, other, doubts = broken_promises(gates, target, {"outputs": {"y": output}}, Report())
    assert not other
    return worse + doubts


@pytest.mark.parametrize(
    ("right", "wrong", "measure"),
    [
        ({"kind": "values", "relative_error": 0.019}, {"relative_error": 0.021}, "relative error"),
        ({"kind": "vectors", "cosine": 0.981, "relative_error": 0.2}, {"cosine": 0.979}, "1 − cosine"),
        ({"kind": "classes", "agreement": 0.98, "n_compared": 500}, {"agreement": 0.96}, "changed predictions"),
        ({"kind": "classes", "agreement": 0.9, "n_compared": 500, "accuracy": 0.89, "original_accuracy": 0.9},
         {"accuracy": 0.86}, "accuracy"),
        ({"kind": "scores", "agreement": 0.999, "n_compared": 10**6, "mean_relative_error": 0.001,
          "relative_error": 0.1, "n_above": 5000.0, "same_above": 0.985},
         {"same_above": 0.94}, "other ones above the threshold"),
        ({"kind": "scores", "agreement": 1.0, "n_compared": 48, "mean_relative_error": 0.01},
         {"mean_relative_error": 0.1}, "mean difference of scores"),
        ({"kind": "values", "relative_error": 0.019}, {"relative_error": float("nan")}, "relative error"),
    ],
)  # fmt: skip
def test_a_promise_is_held_in_the_measure_that_fits_the_output(right, wrong, measure):
    assert promises_broken(right) == []
    (sentence,) = promises_broken(right | wrong)
    assert measure in sentence and "the recipe promises 2.00% at most" in sentence


def test_few_examples_break_a_promise_where_chance_hardly_makes_so_many_come_out_otherwise():
    def of(n: int, others: int) -> list[str]:
        return promises_broken({"kind": "classes", "agreement": 1 - others / n, "n_compared": n})

    assert of(48, 0) == []
    for n, others in ((20, 1), (48, 1), (48, 3), (500, 14)):
        (sentence,) = of(n, others)
        assert f"{others} of {n}: too few to tell whether it is the 2.00% that the recipe promises" in sentence
    for n, others in ((20, 3), (48, 4), (500, 17), (10**6, 20_100)):
        (sentence,) = of(n, others)
        assert sentence.endswith("the recipe promises 2.00% at most")


def test_another_limit_or_target_counts_instead_of_the_promised_loss():
    bad = {"kind": "values", "relative_error": 0.3}
    assert promises_broken(bad)
    for given in (PROMISES.model_copy(update={"max_loss": 0.5}), PROMISES.model_copy(update={"max_error": 0.5})):
        assert promises_broken(bad, given) == []
    for target in (Target(1000, None, "accuracy"), Target(None, 0.5, "accuracy")):
        assert promises_broken(bad, target=target) == []


def test_a_promise_of_size_is_to_the_original():
    def said(n_bytes: int) -> list[str]:
        return broken_promises(PROMISES, NOTHING_ELSE, None, Report(size=Size(bytes=n_bytes, original_bytes=1000)))[1]

    assert said(1000) == []
    assert said(1500) == ["size over the original's is 1.5, the recipe promises 1 at most"]


@pytest.mark.parametrize(
    ("found", "original", "broken"),
    [
        ({"latency_seconds": 0.2}, {"latency_seconds": 0.1}, True),
        ({"latency_seconds": 0.11}, {"latency_seconds": 0.1}, False),
        ({"latency_seconds": 0.12, "latency_error": 0.05}, {"latency_seconds": 0.1}, False),
        ({"latency_seconds": 0.2, "processor_seconds": 0.1}, {"latency_seconds": 0.1, "processor_seconds": 0.1}, False),
        ({"latency_seconds": 0.2, "processor_seconds": 0.2}, {"latency_seconds": 0.1, "processor_seconds": 0.1}, True),
        ({"measured": False}, None, False),
    ],
)
def test_a_promise_of_speed_is_broken_beyond_what_a_busy_machine_does(found, original, broken):
    report = Report.model_validate({"speed": found, "original_speed": original})
    assert bool(broken_promises(PROMISES, NOTHING_ELSE, None, report)[1]) == broken


def test_the_recipes_of_four_and_eight_bits_promise_two_percent_and_a_smaller_file():
    for name in ("cnn-int8", "cnn-4bit", "encoder-4bit"):
        gates = load_recipe(name).gates
        assert (gates.promised_loss, gates.promised_size) == (0.02, 1)
    assert load_recipe("cnn-int8", ["gates.promised_loss=null"]).gates.promised_loss is None
