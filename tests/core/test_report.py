"""compression.json through its schema: what is written is read again, what is unknown stays, what is wrong is named."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from compressor.core.artifact import Artifact
from compressor.core.errors import CheckpointError
from compressor.core.identity import Identity
from compressor.core.report import Gates, Report, Size, Speed, misshapen
from tests.hostile_files.readers import REPORT


def test_what_was_said_is_written_and_nothing_else():
    report = Report(seed=3, size=Size(bytes=10, files={"model.onnx": 10}), quality=None)
    report.gates = Gates(passed=True)
    report.speed = Speed(latency_seconds=1)
    assert report.as_json() == {
        "seed": 3, "quality": None, "speed": {"latency_seconds": 1}, "size": {"bytes": 10, "files": {"model.onnx": 10}},
        "gates": {"passed": True},
    }  # fmt: skip
    assert json.loads(report.text()) == report.as_json()


def test_a_report_is_written_again_as_it_was_read():
    ordered = Report.model_validate(REPORT).as_json()
    assert ordered == REPORT
    assert Report.model_validate(ordered).text() == json.dumps(ordered, indent=1, ensure_ascii=False) + "\n"


def test_numbers_stay_as_they_are():
    assert Report(quality={"a": 1, "b": 1.0}).text().count("1.0") == 1


def test_what_a_newer_version_says_is_kept():
    newer = REPORT | {"mood": {"good": True}, "size": REPORT["size"] | {"compressed_twice": False}}
    assert misshapen(newer) == ""
    assert Report.model_validate(newer).as_json() == newer


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"seed": "0"}, "seed"), ({"size": {"bytes": 0}}, "size.bytes"), ({"gates": {"passed": 1}}, "gates.passed"),
        ({"quality": {"ratio": float("nan")}}, "quality.ratio"), ({"errors": {"a": "b"}}, "errors.a"),
        ({"cost": {"export": {"seconds": 1.0}}}, "cost.export.cpu_seconds"), ({"identity": {}}, "identity.model"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_where_it_is_read(tmp_path, change, where):
    (tmp_path / "compression.json").write_text(json.dumps(REPORT | change))
    with pytest.raises(CheckpointError, match=rf"compression.json: is damaged; {where}"):
        Artifact.open(tmp_path)


def test_what_is_wrong_is_not_written():
    report = Report()
    with pytest.raises(ValidationError):
        report.errors = {"a.weight": float("inf")}


def test_an_identity_comes_back_from_the_file(tmp_path):
    identity = Identity(model={"weights": "a"}, recipe={"name": "r"}, seed=1, data={"calibration": None}, mode="compat",
                        format="onnx", threads=2, versions={"torch": "2"})  # fmt: skip
    (tmp_path / "compression.json").write_text(Report(identity=identity).text())
    again = Artifact.open(tmp_path).report["identity"]
    assert Identity.model_validate(again) == identity
