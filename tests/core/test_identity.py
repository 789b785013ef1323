"""What tells one run from another, and how it is said."""

from __future__ import annotations

import pytest

from compressor.core.identity import Identity, Targets

RUN = Identity(
    model={"weights": "a" * 64, "config.json": "b" * 64},
    recipe={"name": "r", "passes": [{"pass": "jlcm", "width": 4, "select": ["*"]}], "gates": {}},
    seed=0,
    data={"calibration": "c" * 64, "evaluation": None},
    mode="default",
    format="onnx",
    threads=2,
    versions={"torch": "2.1", "numpy": "2.0"},
)
OTHER_PASS = {"name": "r", "passes": [{"pass": "jlcm", "width": 6, "select": ["*"]}], "gates": {}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ""),
        ({"seed": 5}, "seed is 0 there and 5 here"),
        ({"mode": "compat"}, "mode is default there and compat here"),
        ({"format": "safetensors"}, "format is onnx there and safetensors here"),
        ({"threads": 1}, "threads is 2 there and 1 here"),
        ({"recipe": OTHER_PASS}, "recipe.passes.0.width is 4 there and 6 here"),
        (
            {"data": {"calibration": "d" * 64, "evaluation": None}},
            "data.calibration is cccccccc… there and dddddddd… here",
        ),
        ({"model": {"weights": "a" * 64}}, "model.config.json is bbbbbbbb… there and none here"),
        ({"targets": Targets(size=60_000_000)}, "targets.size is none there and 60000000 here"),
        ({"targets": Targets(loss=0.05)}, "targets.loss is none there and 0.05 here"),
        ({"arch": "nets:build"}, "arch is none there and nets:build here"),
        ({"versions": {"torch": "2.2", "numpy": "2.0"}}, "versions.torch is 2.1 there and 2.2 here"),
        ({"seed": 1, "threads": 8}, "seed is 0 there and 1 here, threads is 2 there and 8 here"),
    ],
)
def test_two_runs_differ_in_exactly_what_is_said(change, expected):
    other = RUN.model_copy(update=change)
    assert other.difference(RUN) == expected
    assert (other.digest() == RUN.digest()) == (not change)


def test_of_many_differences_a_few_are_told():
    files = {f"vocab.{i}": "d" * 64 for i in range(9)}
    assert RUN.model_copy(update={"model": RUN.model | files}).difference(RUN).endswith(", and 4 more")


def test_an_identity_is_the_same_after_it_was_written_and_read():
    assert Identity.model_validate_json(RUN.model_dump_json()) == RUN
