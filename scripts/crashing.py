"""Processes that die at a chosen step of those that change the disk, as by a power cut, and what they leave.

A child is forked from a process that has everything imported. In it, what Python programs change a disk with is
counted: renames, removals, folders, syncs, files opened to be written and every write to them, and whole files that
libraries write by themselves. At the step that was asked for, the child and all that it has started are killed: before
the step, or, of a write, when half of its bytes are there.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGING = (
    "rename",
    "replace",
    "unlink",
    "remove",
    "rmdir",
    "mkdir",
    "link",
    "symlink",
    "truncate",
    "ftruncate",
    "fsync",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LOG = "steps.log"


@dataclass(frozen=True)
class Step:
    """One change of the disk: its number, what it was, and of which file."""

    number: int
    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.number} {self.kind} {self.path}"


@dataclass(frozen=True)
class Crash:
    """Where a child dies: before a step, or in the middle of it; nowhere at step −1."""

    number: int = -1
    torn: bool = False

    def __str__(self) -> str:
        return f"{'in' if self.torn else 'before'} step {self.number}"


class Counter:
    """Steps of a child and of its own children, within one folder."""

    def __init__(self, folder: Path, crash: Crash, log: Path | None) -> None:
        self.folder, self.crash, self.log = str(folder.resolve()), crash, log
        self.shared = mmap.mmap(-1, 8)
        self.real_open, self.real_write = os.open, os.write

    def step(self, kind: str, path: Any, torn: Callable[[], object] | None = None) -> None:
        """Counts a step, and ends everything where it is the one."""
        name = self._name(path)
        if not name.startswith(self.folder):
            return
        number = int.from_bytes(self.shared[:], "little")
        self.shared[:] = (number + 1).to_bytes(8, "little")
        if self.log is not None:
            descriptor = self.real_open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self.real_write(descriptor, f"{kind}\t{name[len(self.folder) + 1 :]}\n".encode())
            os.close(descriptor)
        if number == self.crash.number:
            if self.crash.torn and torn is not None:
                torn()
            os.killpg(0, signal.SIGKILL)

    def _name(self, path: Any) -> str:
        if isinstance(path, int):
            try:
                return os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return ""
        text = os.fsdecode(path)
        folder, _, name = os.path.abspath(text).rpartition("/")
        return f"{os.path.realpath(folder)}/{name}"

    def install(self) -> None:
        """Puts itself between this process and the disk."""
        os.fsync = lambda descriptor: None  # a step as any other; what is killed loses nothing that it wrote
        gc.collect = lambda generation=2: 0  # of all that the parent has imported, once for every child
        for name in CHANGING:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.open = self._opened
        os.sendfile = self._counted("sendfile", os.sendfile)
        builtins.open = io.open = self._file(io.open)
        import safetensors.torch
        import torch

        from compressor.core import files

        files.exchange = self._counted("exchange", files.exchange)
        safetensors.torch.serialize_file = self._whole(safetensors.torch.serialize_file, 1)
        torch.save = self._whole(torch.save, 1)

    def _counted(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(first: Any, *rest: Any, **more: Any) -> Any:
            folder = more.get("dir_fd")
            place = first if folder is None else os.path.join(self._name(folder), os.fsdecode(first))
            self.step(kind, place)
            return real(first, *rest, **more)

        return counted

    def _opened(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & WRITING and more.get("dir_fd") is None:
            self.step("open", path)
        return self.real_open(path, flags, *rest, **more)

    def _whole(self, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        """A file that a library writes by itself: nothing, half, or all of it."""

        def written(*args: Any, **more: Any) -> Any:
            path = args[place] if len(args) > place else more.get("filename")
            if not isinstance(path, str | os.PathLike):
                return real(*args, **more)

            def half() -> None:
                real(*args, **more)
                os.truncate(path, os.stat(path).st_size // 2)

            self.step("write", path, half)
            return real(*args, **more)

        return written

    def _file(self, real: Callable[..., Any]) -> Callable[..., Any]:
        counter = self

        class Raw(io.FileIO):
            """A file whose every write is a step."""

            def write(self, content: Any) -> int:
                view = memoryview(content).cast("B")
                counter.step("write", self.name, lambda: io.FileIO.write(self, view[: len(view) // 2]))
                return super().write(content) or 0

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
            newline: str | None = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if not set(mode) & set("wax+") or not self._name(file).startswith(self.folder):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int):
                self.step("open", file)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

        return opened


def run_child(
    work: Callable[[], int], folder: Path, crash: Crash = Crash(), log: Path | None = None
) -> tuple[int | None, str]:  # fmt: skip
    """(status, what it printed) of `work` in a child that works in a folder; the status is None where it was killed."""
    counter, printed = Counter(folder, crash, log), folder.parent / f"{folder.name}.printed"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.setsid()
            descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            os.chdir(folder)
            counter.install()
            status = work()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(ended)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return (None if status == -signal.SIGKILL else status), printed.read_text(encoding="utf-8", errors="replace")


def steps_of(work: Callable[[], int], folder: Path) -> tuple[list[Step], int | None, str]:
    """Every step of an undisturbed child, its status, and what it printed."""
    log = folder.parent / f"{folder.name}.{LOG}"
    log.unlink(missing_ok=True)
    status, printed = run_child(work, folder, log=log)
    lines = log.read_text(encoding="utf-8").splitlines()
    return [Step(number, *line.split("\t", 1)) for number, line in enumerate(lines)], status, printed


def crashes(steps: Sequence[Step]) -> list[Crash]:
    """Before every step; of the writes to one file the first, a middle one and the last, before and within each."""
    found: list[Crash] = []
    writes: dict[str, list[int]] = {}
    for step in steps:
        if step.kind == "write":
            writes.setdefault(step.path, []).append(step.number)
        else:
            found.append(Crash(step.number))
    for numbers in writes.values():
        chosen = dict.fromkeys((numbers[0], numbers[len(numbers) // 2], numbers[-1]))
        found += [Crash(number, torn) for number in chosen for torn in (False, True)]
    return sorted(found, key=lambda crash: (crash.number, crash.torn))
