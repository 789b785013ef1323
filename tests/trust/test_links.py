"""Nothing is written through a link, and nothing is read through one that leads out of a model's folder."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest

from compressor.batch.jobs import JOURNAL, Batch
from compressor.batch.manifest import Job
from compressor.batch.summary import Board
from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.tokenizer import copy_tokenizer, find_tokenizer
from compressor.core.artifact import Artifact, damaged_files
from compressor.core.errors import CheckpointError, UsageError
from compressor.core.files import remove, whole, write_text
from compressor.core.locking import locked
from compressor.core.options import RunOptions
from compressor.evaluate.verification import failures, verify
from compressor.run.pipeline import run
from compressor.runtime.workers import Budget, LocalEngine
from tests import pico


@pytest.fixture
def secret(here: Path) -> Path:
    """A private file, which has to stay what it is and where it is."""
    file = here / "secret"
    file.write_text("hunter2")
    yield file
    assert file.read_text() == "hunter2"


def test_a_report_replaces_a_link_and_not_what_it_points_to(command, sent, secret):
    directory = sent("text")
    (directory / "report.html").unlink()
    (directory / "report.html").symlink_to(secret)
    assert command("report text").status == 0
    assert not (directory / "report.html").is_symlink()
    assert damaged_files(Artifact.open(directory)) == []
    (directory.parent / "page.html").symlink_to(secret)
    assert command("report text -o page.html").status == 0


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "chat_template.jinja", "generation_config.json",
                                  "config.json", "model.safetensors", "spiece.model", "added_tokens.json"])  # fmt: skip
@pytest.mark.parametrize("through", ["file", "folder", "absolute"])
def test_what_a_models_folder_links_to_elsewhere_is_refused_by_name(llama, here, secret, name, through):
    model = Path(shutil.copytree(llama, here / "model"))
    target = {"file": Path("../secret"), "folder": Path("inner/secret"), "absolute": secret}[through]
    (model / "inner").symlink_to("..")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*secret, which is outside of the model's folder"):
        open_checkpoint(model)


@pytest.mark.parametrize("target", ["nowhere", "vocab.txt"])
def test_links_to_nowhere_and_in_circles_are_refused(llama, here, target):
    model = Path(shutil.copytree(llama, here / "model"))
    (model / "vocab.txt").symlink_to(target)
    with pytest.raises(CheckpointError, match="vocab.txt: is a link that leads nowhere"):
        open_checkpoint(model)


def test_what_is_no_regular_file_is_refused(llama, here):
    model = Path(shutil.copytree(llama, here / "model"))
    os.mkfifo(model / "vocab.fifo")
    (model / "vocab.txt").symlink_to("vocab.fifo")
    with pytest.raises(CheckpointError, match="vocab.txt: is no regular file"):
        open_checkpoint(model)
    with pytest.raises(CheckpointError, match="vocab.fifo: is no regular file|are not supported"):
        open_checkpoint(model / "vocab.fifo")


def in_a_cache(llama: Path, here: Path) -> Path:
    """The layout of a hub's cache: snapshots are links into the blobs of the same repository."""
    repository = here / "hub" / "models--somebody--something"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(llama.iterdir())):
        shutil.copyfile(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_hubs_cache_works_as_it_is(llama, here):
    snapshot = in_a_cache(llama, here)
    open_checkpoint(snapshot).check()
    open_checkpoint(snapshot / "model.safetensors").check()
    (here / "named").symlink_to(snapshot)
    open_checkpoint(here / "named").check()
    copied = copy_tokenizer(find_tokenizer(snapshot), here / "copied")
    assert [path.is_symlink() for path in copied] == [False] * len(copied) != []


def test_a_snapshot_that_links_into_another_repository_is_refused(llama, here, secret):
    snapshot = in_a_cache(llama, here)
    other = here / "hub" / "models--other--private" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(secret, other / "0")
    (snapshot / "vocab.txt").symlink_to("../../../models--other--private/blobs/0")
    with pytest.raises(CheckpointError, match=r"vocab.txt: is a link to .*private/blobs/0"):
        open_checkpoint(snapshot)


def test_external_data_of_a_graph_may_lie_in_the_same_cache(here, secret):
    onnx_folder = here / "models--a--b" / "snapshots" / "1" / "onnx"
    blobs = here / "models--a--b" / "blobs"
    onnx_folder.mkdir(parents=True)
    blobs.mkdir()
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 64]) for name in "xy")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y], [weight]))
    onnx.save_model(
        model, blobs / "graph", save_as_external_data=True, location="model.onnx_data", size_threshold=0,
        convert_attribute=False,
    )  # fmt: skip
    (blobs / "model.onnx_data").rename(blobs / "data")
    (onnx_folder / "model.onnx").symlink_to("../../../blobs/graph")
    (onnx_folder / "model.onnx_data").symlink_to("../../../blobs/data")
    checkpoint = open_checkpoint(onnx_folder / "model.onnx")
    assert checkpoint.read(next(iter(checkpoint.tensors))).shape == (64, 64)
    (onnx_folder / "model.onnx_data").unlink()
    (onnx_folder / "model.onnx_data").symlink_to(secret)
    with pytest.raises(CheckpointError, match="which is not in its folder; nothing was read there"):
        open_checkpoint(onnx_folder / "model.onnx")


def options(made: Path, output: str = "out", **more) -> RunOptions:
    return RunOptions(
        str(made / "cnn.pt"), str(made / "network.yaml"), Path(output), data=str(made / "images.npz"),
        arch="tests.pico:ResNet", format="safetensors", **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("out", "out: is a link"), ("out.failed", "out.failed: is a link"), ("out.partial", "out.partial: is a link"),
        ("out.partial/.lock", ".lock: is a link"), ("out.partial/work", "work: is a link"),
        ("out.partial/config.json", "config.json: is a link"), ("out.partial/work/run.json", "run.json: is a link"),
        ("out.partial/work/structure-0/x", "x: is a link"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("to", ["file", "folder"])
def test_links_that_somebody_prepared_are_refused_before_work(made, here, secret, link, message, to):
    victim = here / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (here / link).parent.mkdir(parents=True, exist_ok=True)
    (here / link).symlink_to(secret if to == "file" else victim)
    for more in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(UsageError, match=message):
            run(options(made, **more))
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert (here / link).is_symlink()


def test_links_in_the_folder_of_a_batch_are_refused(here, secret):
    pico.write_state_dict(pico.Tied, here / "net.pt")
    (here / "out").mkdir()
    jobs = [Job("a", "net.pt", "encoder-4bit")]
    for name in (JOURNAL, "logs", "logs/a.log"):
        (here / "out" / name).parent.mkdir(exist_ok=True)
        (here / "out" / name).symlink_to(secret)
        batch = Batch(jobs, Path("out"), LocalEngine(), 1, Budget(10**10))
        if name == "logs/a.log":
            ended = LocalEngine().run(["recipes"], here / "out" / name, 0)
            assert (ended.status, "a.log" in ended.message) == (2, True)
        else:
            with pytest.raises(UsageError, match=f"{name}: is a link, and nothing is written through one"):
                batch.run(Board(1, silent=True))
        (here / "out" / name).unlink()


def test_links_and_what_is_no_file_in_an_artifact_are_noticed(sent, secret):
    directory = sent("text")
    (directory / "extra").mkdir()
    (directory / "tokenizer_extra.json").write_text("{}")
    (directory / "chat_template.jinja").symlink_to(secret)
    (directory / "etc").symlink_to("/etc")
    os.mkfifo(directory / "vocab.fifo")
    said = failures(verify(directory, measure=False))
    assert "not of the artifact: extra, vocab.fifo, tokenizer_extra.json" in said
    assert "a link: chat_template.jinja, etc" in said


def test_replacing_and_removing_leave_what_links_point_to(here, secret):
    for name in ("a", "b"):
        (here / name).symlink_to(secret)
    write_text(here / "a", "new")
    assert (here / "a").read_text() == "new"
    remove(here / "b")
    (here / ".c.partial").symlink_to(secret)
    with whole(here / "c") as partial:
        partial.write_text("new")
    (here / "d").mkdir()
    (here / "e").symlink_to("d")
    (here / "d" / "kept").touch()
    remove(here / "e")
    assert (here / "d" / "kept").exists()
    with pytest.raises(UsageError, match="f: is a link"):
        (here / "f").symlink_to("d")
        with locked(here / "f", "run"):
            pass


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "weights", "report", "text", "nowhere"])
def test_a_page_replaces_no_other_kind_of_file(sent, here, kind, capfd):
    from compressor.cli.commands import _status

    directory = sent("images")
    target = {"weights": directory / "model.safetensors", "report": directory / "compression.json",
              "nowhere": here / "gone" / "page.html"}.get(kind, here / "target")  # fmt: skip
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "device":
        try:
            os.mknod(target, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("devices are made by root alone")
    elif kind == "text":
        target.write_text("what I have written")
    before = (target.lstat(), target.read_bytes() if target.is_file() else b"") if target.exists() else None
    assert _status(["report", str(directory), "-o", str(target)]) == 2
    assert f"{target}: " in capfd.readouterr().err
    if before is None:
        assert not target.exists()
    else:
        assert (target.lstat().st_ino, target.lstat().st_mode) == (before[0].st_ino, before[0].st_mode)
        assert not target.is_file() or target.read_bytes() == before[1]


def test_a_page_replaces_a_page_and_a_hard_link_to_another_file_stays(sent, here):
    from compressor.cli.commands import _status

    directory = sent("images")
    (here / "page.html").write_text("<!DOCTYPE html>\nof before")
    os.link(here / "page.html", here / "another.html")
    assert _status(["report", str(directory), "-o", "page.html"]) == 0
    assert (here / "another.html").read_text() == "<!DOCTYPE html>\nof before"
    assert len((here / "page.html").read_text()) > 1000
    assert _status(["report", str(directory), "-o", "page.html"]) == 0
