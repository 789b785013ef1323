"""What is printed may not arrive: that ends nothing half way, and makes no other status than the command's own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.core.terminal import STAND_IN, printable

ROOT = Path(__file__).parents[2]
DRY = ("llama", "-r", "llm-2bit", "--dry-run")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, llama):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").symlink_to(llama)
    return tmp_path


def compress(*words: str, tail: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The command as a shell would run it, with redirections behind it."""
    line = f'"{sys.executable}" -m compressor "$@" {tail}'
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", line, "bash", *words], capture_output=True, env=env, check=False, timeout=120)


@pytest.mark.parametrize(
    ("words", "tail", "status"),
    [
        (("recipes",), "| head -1; exit ${PIPESTATUS[0]}", 0),
        (("recipes", "--json"), "| true; exit ${PIPESTATUS[0]}", 0),
        (DRY, "| true; exit ${PIPESTATUS[0]}", 0),
        (DRY, "> /dev/full", 4),
        (("--version",), "> /dev/full", 4),
        (("--help",), "> /dev/full", 4),
        (("recipes", "--json"), "> /dev/full", 4),
        (DRY, "2> /dev/full", 0),
        (("recipes", "nothing"), "2> /dev/full", 2),
        (("recipes", "nothing"), "> /dev/full 2> /dev/full", 2),
        (DRY, "> /dev/full 2> /dev/full", 4),
        (("recipes", "nothing"), "2>&1 | true; exit ${PIPESTATUS[0]}", 2),
        (DRY, ">&-", 0),
        (DRY, "2>&-", 0),
        (DRY, "<&- >&- 2>&-", 0),
        (("recipes", "nothing"), "2>&-", 2),
        (("inspect", "gone.safetensors"), "2>&-", 3),
    ],
)
def test_a_stream_that_is_closed_or_full_makes_no_other_status(words, tail, status):
    done = compress(*words, tail=tail)
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stdout + done.stderr
    assert b"Exception ignored" not in done.stderr
    if status == 4 and "2>" not in tail:
        assert b"Error: stdout: cannot be written; No space left on device" in done.stderr


def test_a_closed_descriptor_is_not_given_to_the_next_file(folder):
    """Descriptor 1 would be the report's own file, and what is printed would go into it."""
    done = compress(*DRY, tail=">&-")
    assert done.returncode == 0
    assert [path.name for path in folder.iterdir()] == ["llama"]


def test_a_stream_that_does_not_wait_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "from compressor.core.terminal import open_streams\nopen_streams()\nprint('x' * 300_000)\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer, env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert len(file.read()) == 300_001
    assert process.wait() == 0


CONSOLES = [
    {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "ascii:strict"}, {"PYTHONIOENCODING": "cp437"}, {"PYTHONIOENCODING": "shift_jis"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C"},
]  # fmt: skip


@pytest.mark.parametrize("console", CONSOLES, ids=lambda each: " ".join(each.values()))
def test_a_console_that_lacks_a_letter_gets_another(console):
    done = compress(*DRY, **console)
    assert done.returncode == 0, done.stderr
    assert b"108" in done.stdout
    encoding = console.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    shown = done.stdout.decode("utf-8" if console.get("LC_ALL") == "C" else encoding)
    assert "108×80" in shown or "108x80" in shown
    assert "→" in shown or "->" in shown


@pytest.mark.parametrize("name", ["\udcff\udcfe.pt", "\x1b[31mred.pt", "a\nb.pt", "[/x].pt", "n" * 300 + ".pt"])
def test_a_name_on_the_line_is_said_harmlessly_and_is_no_bug(name, command):
    for words in (["inspect", name], [name, "-r", "llm-2bit"], ["verify", name], [name, "-r", name]):
        said = command(*words)
        assert said.status in (2, 3), words
        assert not set(said.err) & set("\x1b\udcff"), words


def test_escapes_in_names_do_not_reach_a_terminal(folder):
    save_file({"layers.0.\x1b[2J\x9b31m.weight": torch.ones(96, 64)}, folder / "\x1b]0;evil\x07.safetensors")
    pid, descriptor = pty.fork()
    if pid == 0:
        words = ["inspect", "\x1b]0;evil\x07.safetensors"]
        os.execve(sys.executable, [sys.executable, "-m", "compressor", *words], {**os.environ, "PYTHONPATH": str(ROOT)})
    seen = b""
    try:
        while part := os.read(descriptor, 4096):
            seen += part
    except OSError:
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"\x1b[2J" not in seen
    assert b"\x1b]0;" not in seen
    assert b"\x07" not in seen


def test_letters_have_stand_ins():
    assert "3×4 → 5 − 1 · ≤ 🙂".encode("ascii", STAND_IN) == b"3x4 -> 5 - 1 | <= ?"
    assert printable("a\x00\x1b\x9b\x7f\r‮\ud800￾b") == "a" + "�" * 8 + "b"
    assert printable("日本語\u3000🙂\u200d🙂\n\t") == "日本語\u3000🙂\u200d🙂\n\t"
