"""What a run from Python tells through the logger "compressor", and what the command does not."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from compressor.core.log import LoggedProgress
from compressor.core.progress import BarProgress, LineProgress, make_progress
from compressor.run.clock import Clock

PYTHON = [sys.executable, "-P"]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, check=True)


def test_progress_is_logged_as_information(caplog):
    caplog.set_level(logging.DEBUG, logger="compressor")
    progress = LoggedProgress()
    progress.say("100 MB → about 10 MB")
    with progress.task("encoding", 2) as task:
        task.advance()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "100 MB → about 10 MB"), ("INFO", "encoding: done in 0:00"),
    ]  # fmt: skip


def test_a_percent_sign_in_what_is_said_is_no_format(caplog):
    caplog.set_level(logging.INFO, logger="compressor")
    LoggedProgress().say("loss 5 %s of it")
    assert caplog.messages == ["loss 5 %s of it"]


def test_every_stage_is_logged_with_its_time_and_memory(caplog):
    caplog.set_level(logging.INFO, logger="compressor")
    with Clock().stage("export"):
        pass
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("export: 0.0 s, 0.0 s of CPU time")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("", ""), ("logging.basicConfig(level='INFO');", "INFO:compressor:here\n"), ("logging.basicConfig();", "")],
)
def test_nothing_is_printed_until_the_caller_asks_for_it(setting, expected):
    code = f"import logging, compressor.core.log as log; {setting} log.LoggedProgress().say('here')"
    assert run_python(code).stderr == expected


def test_a_warning_reaches_the_callers_handlers_and_is_not_printed_without_any():
    warn = "compressor.core.log.LOGGER.warning('no quality was measured')"
    code = f"import logging, compressor.core.log; {{}} {warn}"
    assert run_python(code.format("logging.basicConfig();")).stderr == "WARNING:compressor:no quality was measured\n"
    assert run_python(code.format("")).stderr == ""


def test_the_command_shows_progress_of_its_own_and_logs_none():
    kinds = (make_progress(), make_progress(silent=True))
    assert not any(isinstance(each, LoggedProgress) for each in kinds)
    assert isinstance(kinds[0], (LineProgress, BarProgress))
