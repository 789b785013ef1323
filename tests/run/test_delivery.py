"""The last steps of a run, ended at every one of them: the artifact whole and alone, or something to resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compressor.core.artifact import Artifact, damaged_files
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensor, write_tensors
from compressor.run import delivery
from compressor.run.pipeline import run
from compressor.run.workplace import FINISHED, NOTE, WORK
from tests import pico
from tests.hostile_files.readers import REPORT


class Killed(BaseException):
    """Ends a run where a signal would."""


def built(folder: Path) -> Path:
    """A folder in which all is done but for the delivery."""
    partial = folder / "out.partial"
    (partial / WORK).mkdir(parents=True)
    write_tensors(partial / "model.safetensors", {"w": EncodedTensor.dense(torch.ones(4, 4))})
    (partial / "model.onnx").write_bytes(b"graph")
    (partial / ".lock").touch()
    (partial / WORK / NOTE).write_text("{}")
    (partial / WORK / "network.safetensors").write_bytes(b"encoded")
    (partial / WORK / "scratch").mkdir()
    return partial


def delivered(partial: Path, steps: int, monkeypatch) -> bool:
    """Delivers, but ends instead of the step after `steps` others; whether it came to its end."""
    remaining = [steps]

    def ending(step):
        def stepped(*args, **kwargs):
            if remaining[0] == 0:
                raise Killed
            remaining[0] -= 1
            return step(*args, **kwargs)

        return stepped

    report = json.loads(json.dumps(REPORT)) | {"gates": {"passed": True, "failures": []}}
    report["size"]["files"] = {"model.safetensors": 1, "model.onnx": 5}
    with monkeypatch.context() as context:
        for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree")):
            context.setattr(owner, name, ending(getattr(owner, name)))
        try:
            delivery.deliver(partial, partial.with_name("out"), report)
        except Killed:
            return False
    return True


def test_an_end_at_any_step_leaves_the_artifact_alone_or_what_to_resume(tmp_path, monkeypatch):
    outcomes = []
    for steps in range(100):
        folder = tmp_path / str(steps)
        partial, output = built(folder), folder / "out"
        done = delivered(partial, steps, monkeypatch)
        outcomes.append(output.exists())
        if output.exists():
            assert {path.name for path in output.rglob("*")} == {
                "model.safetensors", "model.onnx", "compression.json", "report.html",
            }  # fmt: skip
            assert not damaged_files(Artifact.open(output))
        else:
            assert (partial / WORK / NOTE).exists()
            assert (partial / WORK / "network.safetensors").read_bytes() == b"encoded"
        if done:
            break
    assert not partial.exists()
    assert outcomes == sorted(outcomes)
    assert {True, False} == set(outcomes[:-1])


def test_what_an_end_left_behind_is_in_nobodys_way(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "passes: [{pass: affine, bits: 4, group: 16}]\nevaluation: {tokens: 0, speed: false}\n"
    )
    options = RunOptions(str(pico.llama(tmp_path / "llama", n_layers=2)), str(tmp_path / "recipe.yaml"))
    partial = tmp_path / "out.partial"
    (partial / WORK).mkdir(parents=True)  # empty: the note went last
    (artifact,) = [run(RunOptions(options.model, options.recipe, tmp_path / "out"))]
    assert not partial.exists()
    assert not (artifact.directory / WORK).exists()
    with pytest.raises(Exception, match="holds an artifact already"):
        run(RunOptions(options.model, options.recipe, tmp_path / "out"))
    assert FINISHED not in {path.name for path in artifact.directory.iterdir()}
