"""What the user names and what cannot be read is refused before any work, as what it is, with status 2 or 3."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from compressor.cli.commands import _status
from compressor.core.errors import CheckpointError, DataError, ResourceError
from compressor.evaluate import session as sessions
from compressor.evaluate.again import Given
from compressor.evaluate.verification import verify

MISSING = [
    ("verify text --eval {}", 3), ("verify text --data {}", 3), ("verify text --original {}", 3),
    ("verify text --arch {}", 3), ("verify text --quick --eval {}", 3), ("verify images --eval {}", 3),
    ("eval text --data {}", 3), ("eval images --data {}", 3), ("eval text --data evaluation.txt --calibration {}", 3),
    ("eval text --original {}", 3), ("eval text --arch {}", 3), ("run llama -r llama.yaml --data {}", 3),
    ("run llama -r llama.yaml --eval {}", 3), ("run llama -r llama.yaml --eval {} --set evaluation.tokens=0", 3),
    ("run llama -r llama.yaml --eval {} --max-loss 5%", 3), ("run llama -r llama.yaml --eval {} --dry-run", 3),
    ("run llama -r llama.yaml --data {} --format safetensors", 3), ("run llama -r llama.yaml --arch {}", 3),
    ("run cnn.pt -r network.yaml --arch tests.pico:ResNet --data images.npz --eval {}", 3), ("run {} -r llama.yaml", 3),
    ("run llama -r {}.yaml", 2), ("batch {}.yaml", 2), ("batch llama -r {}.yaml", 2), ("recipes {}.yaml", 2),
]  # fmt: skip


@pytest.fixture
def there(made: Path, here: Path, checkpoints, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all that the lines name."""
    for name in ("text", "images", "evaluation.txt", "images.npz", "cnn.pt", "llama.yaml", "network.yaml"):
        (here / name).symlink_to(made / name)
    (here / "llama").symlink_to(checkpoints("llama", n_layers=2))
    return here


def put(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("gone")
    elif kind == "circle":
        path.symlink_to(path.name)


@pytest.mark.parametrize("kind", ["missing", "pipe", "dangling", "circle"])
def test_what_is_named_and_cannot_be_read_is_refused_by_name(there, capfd, kind):
    for line, wanted in MISSING:
        name = line.partition("{}")[2].partition(" ")[0].join(["named", ""])
        put(kind, there / name)
        before = sorted(path.name for path in there.iterdir())
        status = _status(shlex.split(line.format("named")))
        said = capfd.readouterr().err
        assert status == wanted and name in said, (line, status, said)
        assert (
            (kind != "pipe")
            or "a named pipe" in said
            or "no f" in said
            or "no regular file" in said
            or "neither a folder" in said
        ), (line, said)
        assert sorted(path.name for path in there.iterdir()) == before, line
        (there / name).unlink(missing_ok=kind in ("missing",))


def test_data_that_cannot_be_parsed_or_do_not_fit_are_refused(there, capfd):
    (there / "bad.npz").write_bytes(b"PK\3\4 no archive")
    np.savez(there / "other.npz", input=np.zeros((8, 5), "f4"))
    (there / "bad.txt").write_bytes(b"\xff\xfe\xff")
    network = "--arch tests.pico:ResNet"
    for line in (
        "verify images --eval bad.npz", f"verify images {network} --eval other.npz", "verify images --data bad.npz",
        "verify text --eval bad.txt", f"eval images {network} --data other.npz", "verify text --eval bad.npz",
    ):  # fmt: skip
        assert _status(shlex.split(line)) == 3, line
        assert line.split()[-1] in capfd.readouterr().err, line


@pytest.mark.parametrize("where", ["", "imports: [named.yaml]\n"])
def test_a_recipe_is_said_to_be_what_it_is(there, capfd, where):
    line = "recipes top.yaml" if where else "recipes named.yaml"
    (there / "top.yaml").write_text(where)
    path = there / "named.yaml"
    for make, wanted in (
        (lambda: os.mkfifo(path), "is a named pipe"), (lambda: path.symlink_to("gone"), "links to gone"),
        (lambda: path.mkdir(), "is a folder"), (lambda: path.symlink_to("/dev/zero"), "is a device"),
        (lambda: None, "no such recipe file"),
    ):  # fmt: skip
        make()
        assert _status(line.split()) == 2
        assert wanted in capfd.readouterr().err
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    long = "x" * 300 + ".yaml"
    (there / "top.yaml").write_text(f"imports: [{long}]\n")
    assert _status(["recipes", "top.yaml" if where else long]) == 2
    assert "too long" in capfd.readouterr().err


def test_data_of_a_manifest_are_said_to_be_what_they_are(there, capfd):
    os.mkfifo(there / "pipe.txt")
    for key in ("data", "eval", "arch"):
        (there / "m.yaml").write_text(f"recipe: llama.yaml\nmodels: [llama]\n{key}: pipe.txt\n")
        assert _status(["batch", "m.yaml", "-o", "many"]) == 2
        assert "pipe.txt: is a named pipe" in capfd.readouterr().err
    assert not (there / "many").exists()


def test_too_little_memory_is_no_finding_of_verify(there, monkeypatch):
    def scarce(*_: object, **__: object) -> None:
        raise ResourceError("too little memory")

    monkeypatch.setattr(sessions, "open_session", scarce)
    with pytest.raises(ResourceError):
        verify(there / "text")


def test_what_is_given_and_is_not_what_was_evaluated_on_is_said(there):
    (there / "another.txt").write_text("the river runs and nobody knows where it goes\n" * 40)
    found = {check.name: check for check in verify(there / "text", True, Given(evaluation="another.txt"))}
    assert found["quality"].passed is None and "not those that it was evaluated on" in found["quality"].found
    with pytest.raises(DataError, match="named"):
        verify(there / "text", True, Given(evaluation="named"))


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**80), str(-(2**70))])
def test_a_seed_that_no_generator_takes_is_refused_before_the_work(there, capfd, seed):
    (there / "m.yaml").write_text(f"recipe: llama.yaml\nseed: {seed}\nmodels: [llama]\n")
    for line in (f"run llama -r llama.yaml --seed {seed}", f"run llama -r llama.yaml --seed {seed} --dry-run",
                 f"generate text a --seed {seed} --temperature 1", "batch m.yaml"):  # fmt: skip
        assert _status(shlex.split(line)) == 2, line
        assert f"seed: is {seed}; give a whole number from 0" in capfd.readouterr().err, line


def test_the_root_of_a_disk_is_no_output(there, capfd):
    for root in ("/", "//", "/..", "/../.."):
        assert _status(["run", "llama", "-r", "llama.yaml", "-o", root, "--dry-run"]) == 2
        assert "is the root of a disk" in capfd.readouterr().err


@pytest.mark.parametrize("temperature", ["1e-320", "1e-9", "inf", "1e300"])
def test_any_temperature_gives_a_token(there, temperature):
    assert _status(["generate", "text", "a", "-n", "2", "--temperature", temperature]) == 0


def test_logits_that_are_not_finite_are_the_artifacts_fault():
    logits = np.array([0.0, np.nan, 1.0], np.float32)
    with pytest.raises(CheckpointError, match="logits that are not finite"):
        sessions.sample(logits, 1.0, 1.0, np.random.default_rng(0))
