"""Progress of long work: a bar with the time left on a terminal, a plain line now and then elsewhere, or silence.

with progress.task("encoding", total=30) as task:
    for block in blocks:
        ...
        task.advance(note=block)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from compressor.core.terminal import make_console, printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 15.0


class Task:
    """A piece of work of `total` equal steps; this one says nothing."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """`steps` more are done; `note` says what comes next or how it goes."""


class Progress:
    """The silent kind, and the base of the others."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """While a piece of work lasts that `description` names, of `total` equal steps."""
        yield Task()

    def say(self, text: str) -> None:
        """A `text` of one line that stays."""


class _LineTask(Task):
    def __init__(self, progress: LineProgress, description: str, total: float) -> None:
        self.progress, self.description, self.total = progress, description, total
        self.done, self.started, self.printed = 0.0, time.monotonic(), time.monotonic()

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.printed < SECONDS_BETWEEN_LINES or not self.done:
            return
        self.printed = now
        left = (now - self.started) / self.done * max(self.total - self.done, 0)
        self.progress.say(
            f"{self.description}: {self.done:g} of {self.total:g}, {clock(left)} left{f' · {note}' if note else ''}"
        )


class LineProgress(Progress):
    """Lines for logs, on stderr or another stream: at most one per task every 15 seconds, and one when it is done."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        task = _LineTask(self, description, total)
        yield task
        self.say(f"{description}: done in {clock(time.monotonic() - task.started)}")

    def say(self, text: str) -> None:
        print(printable(text), file=self.stream, flush=True)


class _BarTask(Task):
    def __init__(self, bars: Bars, identity: TaskID) -> None:
        self.bars, self.identity = bars, identity

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.bars.update(self.identity, advance=steps, note=printable(note))


class BarProgress(Progress):
    """A bar per task with the time left, on a terminal."""

    def __init__(self) -> None:
        self.console = make_console(stderr=True)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        with Bars(*columns, console=self.console) as bars:
            yield _BarTask(bars, bars.add_task(printable(description), total=total, note=""))

    def say(self, text: str) -> None:
        self.console.print(text)


def make_progress(silent: bool = False) -> Progress:
    """The kind that suits where stderr goes; silent for --json."""
    if silent:
        return Progress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours when there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
