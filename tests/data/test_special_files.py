"""What is no regular file is refused as data by name, and at once: its end may never come."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from compressor.core.errors import CheckpointError, CompressorError, DataError
from compressor.data import load
from compressor.evaluate.inspection import inspect_path


def _socket(path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    listening.bind(path.name)
    os.chdir(here)
    listening.close()


MADE: dict[str, Callable[[Path], None]] = {
    "a named pipe": os.mkfifo,
    "a socket": _socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def refusal(read: Callable[[], object], kind: type[CompressorError]) -> str:
    """What reading is refused with; a read that does not end fails, and does not hold the tests up."""
    said: list[str] = []

    def tried() -> None:
        with pytest.raises(kind) as refused:
            read()
        said.append(str(refused.value))

    thread = threading.Thread(target=tried, daemon=True)
    thread.start()
    thread.join(20)
    assert said, "was not refused in 20 s"
    return said[0]


@pytest.mark.parametrize("what", MADE)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet", "arrow", "npz", "npy", "safetensors", "unknown"])
def test_what_is_no_regular_file_is_no_data(tmp_path, what, suffix):
    path = tmp_path / f"data.{suffix}"
    MADE[what](path)
    assert refusal(lambda: load(path), DataError) == (
        f"{path}: is {what}; only regular files are read; save it as a file and give that"
    )


@pytest.mark.parametrize("what", MADE)
def test_nor_is_it_in_a_folder_of_texts(tmp_path, what):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("The river is wide.")
    MADE[what](tmp_path / "below" / "b.txt")
    assert f"b.txt: is {what}; only regular files" in refusal(lambda: load(tmp_path), DataError)


@pytest.mark.parametrize("what", MADE)
def test_nor_is_it_in_a_folder_of_pictures(tmp_path, what):
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "cats" / "a.png")
    MADE[what](tmp_path / "cats" / "b.png")
    assert f"b.png: is {what}; only regular files" in refusal(lambda: load(tmp_path), DataError)


def test_a_folder_that_is_named_like_a_text_and_a_link_to_nowhere_are_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("The river is wide.")
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "c.txt").symlink_to("gone")
    assert load(tmp_path).documents == ("The river is wide.",)


@pytest.mark.parametrize("what", MADE)
def test_what_is_no_regular_file_is_not_inspected(tmp_path, what):
    path = tmp_path / "model.safetensors"
    MADE[what](path)
    assert f"is {what}; only regular files are read" in refusal(lambda: inspect_path(path), CheckpointError)
