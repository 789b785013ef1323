"""Progress in logs: what is said while work goes on, and how long it will take."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

from compressor.core import progress


def test_a_step_that_takes_long_says_that_the_work_goes_on(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_SIGNS", 0.01)
    stream = io.StringIO()
    with progress.LineProgress(stream).task("encoding", 3) as task:
        task.advance(0, note="tables")
        while "so far" not in stream.getvalue():
            time.sleep(0.005)
    said = stream.getvalue()
    assert "encoding: 0 of 3, 0:00 so far · tables" in said
    time.sleep(0.03)
    assert stream.getvalue() == said


def test_the_time_left_does_not_count_a_first_step_that_was_long(monkeypatch):
    clock = iter([0, 0, 100, 110, 120])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock, 120)))
    stream = io.StringIO()
    with progress.LineProgress(stream).task("encoding", 13) as task:
        for _ in range(3):
            task.advance()
    assert "encoding: 3 of 13, 1:40 left" in stream.getvalue()
