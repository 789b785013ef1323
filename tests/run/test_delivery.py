"""The last steps of a run, ended at every one of them: the artifact whole and alone, or something to resume."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import compressor.core.files
from compressor.core.artifact import Artifact, damaged_files
from compressor.core.errors import UsageError
from compressor.core.options import RunOptions
from compressor.core.report import Report
from compressor.core.tensors import EncodedTensor, write_tensors
from compressor.run.delivery import deliver
from compressor.run.pipeline import run
from compressor.run.place import FINISHED, NOTE, WORK, Place, held
from tests import pico
from tests.hostile_files.readers import REPORT

FILES = {"model.safetensors", "model.onnx", "compression.json", "report.html", "README.md"}


class Killed(BaseException):
    """Ends a run where a signal would."""


def built(folder: Path, value: float = 1.0) -> Path:
    """A folder in which all is done but for the delivery."""
    partial = folder / "out.partial"
    (partial / WORK).mkdir(parents=True)
    write_tensors(partial / "model.safetensors", {"w": EncodedTensor.dense(torch.full((4, 4), value))})
    (partial / "model.onnx").write_bytes(b"graph")
    (partial / ".lock").touch()
    (partial / WORK / NOTE).write_text("{}")
    (partial / WORK / "network.safetensors").write_bytes(b"encoded")
    (partial / WORK / "scratch").mkdir()
    return partial


def place_of(folder: Path) -> Place:
    place = Place(folder / "out", True, False, True, lambda text: None)
    place.remember()
    return place


def report_of(passed: bool = True) -> Report:
    report = json.loads(json.dumps(REPORT)) | {"gates": {"passed": passed, "failures": [] if passed else ["worse"]}}
    report["size"]["files"] = {"model.safetensors": 1, "model.onnx": 5}
    return Report.model_validate(report)


def delivered(folder: Path, steps: int, monkeypatch) -> bool:
    """Delivers, but ends instead of the step after `steps` others; whether it came to its end."""
    remaining = [steps]

    def ending(step):
        def stepped(*args, **kwargs):
            if remaining[0] == 0:
                raise Killed
            remaining[0] -= 1
            return step(*args, **kwargs)

        return stepped

    with monkeypatch.context() as context:
        for owner, name in (
            (os, "rename"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (os, "fsync"),
            (compressor.core.files, "exchange"),
        ):  # fmt: skip
            context.setattr(owner, name, ending(getattr(owner, name)))
        try:
            deliver(place_of(folder), report_of())
        except Killed:
            return False
    return True


def is_whole(output: Path) -> bool:
    return {path.name for path in output.rglob("*")} == FILES and not damaged_files(Artifact.open(output))


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("replaces", [True, False])
def test_an_end_at_any_step_leaves_an_artifact_whole_and_the_next_command_goes_on(
    tmp_path, monkeypatch, replaces, exchanges
):
    """Where a disk cannot exchange two names, the next command gives the artifact its name."""
    if not exchanges:
        monkeypatch.setattr(compressor.core.files, "exchange", lambda first, second: False)
    outcomes = []
    for steps in range(200):
        folder = tmp_path / str(steps)
        partial, output = built(folder, 2.0 if replaces else 1.0), folder / "out"
        if replaces:
            deliver(place_of(folder), report_of())
            built(folder)
        old = (output / "model.safetensors").read_bytes() if replaces else None
        done = delivered(folder, steps, monkeypatch)
        told = []
        with held(output, True, False, told.append) as place:
            if output.exists():
                assert is_whole(output)
                outcomes.append((output / "model.safetensors").read_bytes() != old)
            else:
                assert not replaces
                assert (partial / WORK / "network.safetensors").read_bytes() == b"encoded"
                outcomes.append(False)
            place.clear()
            place.close()
        assert not partial.exists()
        shutil.rmtree(folder)
        if done:
            break
    assert outcomes == sorted(outcomes)
    assert {True, False} == set(outcomes)


def test_a_gate_that_was_missed_touches_nothing_of_the_output(tmp_path):
    built(tmp_path, 2.0)
    deliver(place_of(tmp_path), report_of())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for _ in range(2):
        built(tmp_path)
        assert deliver(place_of(tmp_path), report_of(passed=False)) == tmp_path / "out.failed"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert is_whole(tmp_path / "out.failed")
    built(tmp_path)
    deliver(place_of(tmp_path), report_of())
    assert not (tmp_path / "out.failed").exists()


def test_what_an_end_left_behind_is_in_nobodys_way(tmp_path):
    (tmp_path / "recipe.yaml").write_text("passes: [{pass: affine, bits: 4, group: 16}]\nevaluation: {tokens: 0}\n")
    options = RunOptions(str(pico.llama(tmp_path / "llama", n_layers=2)), str(tmp_path / "recipe.yaml"))
    partial = tmp_path / "out.partial"
    (partial / WORK).mkdir(parents=True)  # empty: the note went last
    (artifact,) = [run(RunOptions(options.model, options.recipe, tmp_path / "out"))]
    assert not partial.exists()
    assert not (artifact.directory / WORK).exists()
    with pytest.raises(UsageError, match="holds an artifact already"):
        run(RunOptions(options.model, options.recipe, tmp_path / "out"))
    assert FINISHED not in {path.name for path in artifact.directory.iterdir()}
