"""Progress of long work: a bar with the time left on a terminal, a plain line now and then elsewhere, or silence.

with progress.task("encoding", total=30) as task:
    for block in blocks:
        ...
        task.advance(note=block)
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from compressor.core.terminal import make_console, printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_SIGNS = 30.0
"""Where no step is done for so long."""


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
    """Steps are not equally long, the first one least of all: the time left is told from the later half of them."""

    def __init__(self, progress: LineProgress, description: str, total: float) -> None:
        self.progress, self.description, self.total = progress, description, total
        self.done, self.started, self.printed, self.note = 0.0, time.monotonic(), time.monotonic(), ""
        self._reached = [(0.0, self.started)]
        self._ended = threading.Event()
        threading.Thread(target=self._while_silent, daemon=True).start()

    def advance(self, steps: float = 1, note: str = "") -> None:
        now = time.monotonic()
        self.done, self.note = self.done + steps, note
        if steps:
            self._reached.append((self.done, now))
        if now - self.printed >= SECONDS_BETWEEN_LINES and self.done:
            self._say(now, f"{clock(self._left(now))} left")

    def end(self) -> None:
        """Says no more."""
        self._ended.set()

    def _left(self, now: float) -> float:
        done, since = next(each for each in reversed(self._reached) if each[0] <= self.done / 2)
        return (now - since) / (self.done - done) * max(self.total - self.done, 0)

    def _while_silent(self) -> None:
        """A step may take minutes: meanwhile it is said that the work goes on."""
        while not self._ended.wait(SECONDS_BETWEEN_LINES):
            now = time.monotonic()
            if now - self.printed >= SECONDS_BETWEEN_SIGNS:
                self._say(now, f"{clock(now - self.started)} so far")

    def _say(self, now: float, how_long: str) -> None:
        self.printed = now
        note = f" · {self.note}" if self.note else ""
        self.progress.say(f"{self.description}: {self.done:g} of {self.total:g}, {how_long}{note}")


class LineProgress(Progress):
    """Lines for logs, on stderr or another stream: at most one per task every 15 seconds, at least one every 45, one
    when it is done."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        task = _LineTask(self, description, total)
        try:
            yield task
        finally:
            task.end()
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
