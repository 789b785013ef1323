"""`compress install`: the same artifact unfolded once for one machine; what it is of, and when it counts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from compressor.core.artifact import INSTALLED, INSTALLED_GRAPH, INSTALLED_RECORD, foreign_files, is_installed
from compressor.core.errors import CheckpointError
from compressor.core.options import RunOptions
from compressor.evaluate import installation
from compressor.evaluate.bench import size
from compressor.evaluate.session import DecoderSession, open_session
from compressor.evaluate.verification import verify
from compressor.run.pipeline import run
from tests import pico

RECIPE = """
passes: [{pass: jlcm, width: 5, dim: 2, group: 16}]
calibration: {tokens: 256, window: 32}
embeddings: {bits: 3, group: 16, zero: learned}
evaluation: {tokens: 0, speed: false}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, llama):
    """An artifact whose codes are looked up."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "calibration.txt").write_text(pico.text(1))
    run(RunOptions(str(llama), str(folder / "r.yaml"), folder / "small", data=str(folder / "calibration.txt")))
    return folder / "small"


@pytest.fixture
def artifact(made, tmp_path):
    shutil.copytree(made, tmp_path / "small")
    return tmp_path / "small"


def logits(path):
    session = open_session(path, threads=1)
    assert isinstance(session, DecoderSession)
    return session.logits(np.arange(9)[None])


def changed(artifact, **entries):
    path = artifact / INSTALLED_RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def installed_check(artifact):
    return next((check for check in verify(artifact, measure=False) if check.name == "installed"), None)


def test_the_installed_graph_computes_the_same_to_the_bit_and_looks_nothing_up(artifact):
    import onnx_ir as ir

    assert installation.graph_to_run(artifact).name == "model.onnx"
    before = size(artifact)
    installation.install(artifact)
    graph = installation.graph_to_run(artifact)
    assert graph.name == INSTALLED_GRAPH
    np.testing.assert_array_equal(logits(graph), logits(artifact))
    operators = {node.op_type for node in ir.load(graph).graph}
    assert "MatMulNBits" in operators
    assert "BitwiseOr" in {node.op_type for node in ir.load(artifact / "model.onnx").graph} - operators
    assert size(artifact) == before


def test_what_is_good_is_left_and_nothing_else_lies_there(artifact):
    there = {path.name for path in artifact.iterdir()}
    assert installation.install(artifact).made
    assert {path.name for path in artifact.iterdir()} == there | set(INSTALLED)
    times = [(artifact / name).stat().st_mtime_ns for name in INSTALLED]
    assert not installation.install(artifact).made
    assert [(artifact / name).stat().st_mtime_ns for name in INSTALLED] == times
    assert foreign_files(artifact) == []


def test_verify_says_whether_it_is_what_onnxruntime_makes_of_the_artifact(artifact):
    assert installed_check(artifact) is None
    installation.install(artifact)
    assert all(check.passed is not False for check in verify(artifact, measure=False))
    assert installed_check(artifact).passed is True
    data = bytearray((artifact / INSTALLED[2]).read_bytes())
    data[-1] ^= 1
    (artifact / INSTALLED[2]).write_bytes(data)
    found = installed_check(artifact)
    assert found.passed is False
    assert f"{INSTALLED[2]} has changed" in found.found
    record = json.loads((artifact / INSTALLED_RECORD).read_text())
    changed(artifact, sha256=record["sha256"] | {INSTALLED[2]: installation.file_digest(artifact / INSTALLED[2])})
    found = installed_check(artifact)
    assert found.passed is False
    assert "is not what onnxruntime" in found.found
    assert installation.install(artifact).made is False  # whose record says that all is well
    installation.remove(artifact)
    installation.install(artifact)
    assert installed_check(artifact).passed is True


@pytest.mark.parametrize("entry", [{"onnxruntime": "1.0"}, {"processor": "another"}])
def test_it_is_made_anew_for_another_onnxruntime_or_processor(artifact, entry):
    installation.install(artifact)
    good = (artifact / INSTALLED_RECORD).read_text()
    changed(artifact, **entry)
    found = installed_check(artifact)
    assert found.passed is None
    assert "not used" in found.found
    assert installation.graph_to_run(artifact).name == INSTALLED_GRAPH
    assert (artifact / INSTALLED_RECORD).read_text() == good


def test_where_it_cannot_be_made_anew_the_small_graph_runs(artifact, monkeypatch):
    installation.install(artifact)
    changed(artifact, onnxruntime="1.0")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(installation, "optimised_graph", full)
    assert installation.graph_to_run(artifact).name == "model.onnx"


def test_one_that_is_of_another_graph_or_has_lost_a_file_is_made_anew(artifact):
    installation.install(artifact)
    (artifact / INSTALLED[2]).unlink()
    assert installation.graph_to_run(artifact).name == INSTALLED_GRAPH
    assert (artifact / INSTALLED[2]).is_file()
    changed(artifact, made_of={"model.onnx": "0" * 64})
    assert installation.graph_to_run(artifact).name == INSTALLED_GRAPH
    assert json.loads((artifact / INSTALLED_RECORD).read_text())["made_of"]["model.onnx"] != "0" * 64


@pytest.mark.parametrize("text", ["", "{}", '{"sha256": {"../x": "0"}}', "[1]"])
def test_a_record_that_says_nothing_counts_for_nothing(artifact, text):
    installation.install(artifact)
    (artifact / INSTALLED_RECORD).write_text(text)
    assert installation.graph_to_run(artifact).name == "model.onnx"
    assert installed_check(artifact).passed is False
    assert installation.install(artifact).made


def test_the_record_points_back_to_the_artifact(artifact):
    installation.install(artifact)
    record = json.loads((artifact / INSTALLED_RECORD).read_text())
    assert record["artifact"] == installation.file_digest(artifact / "compression.json")
    report = json.loads((artifact / "compression.json").read_text())
    for name in ("model.onnx", "model.safetensors"):
        assert record["made_of"][name] == report["sha256"][name]


def test_the_command_installs_and_removes(artifact, command):
    said = command("install", str(artifact), "--json")
    assert said.status == 0
    assert json.loads(said.out)["made"] is True
    said = command("install", str(artifact), "--remove", "--json")
    assert json.loads(said.out) == {"removed": list(INSTALLED)}
    assert not is_installed(artifact)


def test_a_crash_between_leaves_the_small_graph(artifact, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(installation, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        installation.install(artifact)
    monkeypatch.undo()
    assert installation.graph_to_run(artifact).name == "model.onnx"
    assert installation.install(artifact).made
    assert installation.graph_to_run(artifact).name == INSTALLED_GRAPH


def test_what_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no artifact"):
        installation.install(tmp_path)
