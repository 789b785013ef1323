"""What a stranger sends: artifacts, folders and recipes that name code, and a trace of whether any of it has run."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from compressor.core.artifact import CARD, PAGE, file_digest, sealed
from compressor.core.options import RunOptions
from compressor.run.pipeline import run
from tests import pico

LLAMA = """
passes: [{pass: affine, method: rtn, bits: 4, group: 16}]
calibration: {tokens: 64, window: 32}
embeddings: {bits: 4, group: 16}
evaluation: {tokens: 64, window: 32, speed: false}
"""
NETWORK = """
passes: [{pass: affine, method: rtn, bits: 4, group: 16}]
evaluation: {samples: 8, speed: false}
"""
EVIL = """
import os
open(os.environ["TRACE"], "a").write("imported\\n")
def run():
    open(os.environ["TRACE"], "a").write("called\\n")
    return {"input": __import__("numpy").zeros((4, 3, 12, 12), "float32")}
def build():
    open(os.environ["TRACE"], "a").write("called\\n")
    from tests.pico import ResNet
    return ResNet()
"""


class Trace:
    """Whether code of a stranger has run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither garbage nor disks are waited for: half of the time of runs as small as these."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """What evil.py, which lies in the working folder, has done by now."""
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    return Trace(tmp_path / "trace")


@pytest.fixture
def evil(here: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trace]:
    """A working folder with a module `evil` that leaves a trace when it is imported or called."""
    import sys

    (here / "evil.py").write_text(EVIL)
    before = list(sys.path)
    sys.modules.pop("evil", None)
    yield trace
    sys.modules.pop("evil", None)
    sys.path[:] = before


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[..., Path]) -> Path:
    """Two artifacts, of a language model and of a convolutional network, and what they were made from."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "llama.yaml").write_text(LLAMA)
    (folder / "network.yaml").write_text(NETWORK)
    (folder / "calibration.txt").write_text(pico.text(1, 400))
    (folder / "evaluation.txt").write_text(pico.text(2, 400))
    generator = np.random.default_rng(0)
    np.savez(folder / "images.npz", input=generator.standard_normal((32, 3, 12, 12)).astype("f4"))
    pico.write_state_dict(pico.ResNet, folder / "cnn.pt")
    llama = str(checkpoints("llama", n_layers=2))
    run(RunOptions(llama, str(folder / "llama.yaml"), folder / "text", data=str(folder / "calibration.txt"),
                   eval=str(folder / "evaluation.txt")))  # fmt: skip
    run(RunOptions(str(folder / "cnn.pt"), str(folder / "network.yaml"), folder / "images",
                   data=str(folder / "images.npz"), arch="tests.pico:ResNet"))  # fmt: skip
    return folder


@pytest.fixture
def sent(made: Path, here: Path) -> Callable[..., Path]:
    """`sent("text", report)` copies an artifact into the working folder, its report changed by a function, resealed."""

    def copied(name: str, change: Callable[[dict], object] = lambda report: None) -> Path:
        directory = Path(shutil.copytree(made / name, here / name))
        report = json.loads((directory / "compression.json").read_text())
        change(report)
        report = sealed(report, {name: file_digest(directory / name) for name in (PAGE, CARD)})
        (directory / "compression.json").write_text(json.dumps(report))
        return directory

    return copied
