"""Jobs in processes beside: what they end with is told as it is, and a worker that is killed each time is given up."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from compressor.core.errors import CheckpointError, ResourceError
from compressor.core.failures import explain
from compressor.runtime.pool import ATTEMPTS, Processes
from tests.runtime.doer import Doer


@pytest.fixture
def pool(tmp_path: Path):
    found = Processes(Doer(tmp_path), tmp_path / "pool", 1)
    yield found
    found.close()


def test_jobs_end_as_they_end(pool, caplog):
    pool.put("well")
    assert pool.get() == "well"
    for job, kind, text in (
        ("refuse", CheckpointError, "model: is refused"), ("fail", RuntimeError, "fail: ValueError: a bug"),
        ("no memory", MemoryError, "none left"),
    ):  # fmt: skip
        pool.put(job)
        with pytest.raises(kind) as caught:
            pool.get()
        assert str(caught.value) == text
    pool.put("warn")
    with caplog.at_level(logging.WARNING, "compressor"):
        assert pool.get() == "warn"
    assert "one may have missed it" in caplog.messages


def test_a_worker_that_is_killed_each_time_is_given_up_and_the_next_job_has_another(pool, tmp_path):
    pool.put("die")
    pool.put("well")
    with pytest.raises(ResourceError, match=f"die: its worker was ended by SIGKILL.*, {ATTEMPTS} times; memory is too"):
        pool.get()
    assert len((tmp_path / "die").read_text()) == ATTEMPTS
    assert pool.get() == "well"


def test_what_is_under_way_ends_with_the_pool(pool):
    pool.put("well")
    pool.get()
    (pid,) = pool.pids
    pool.put("well")
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_the_system_refuses_a_worker_is_told_as_the_system_said_it(pool):
    for job, kind, status in (("gone", FileNotFoundError, 3), ("full", OSError, 4), ("short", ResourceError, 4)):
        pool.put(job)
        with pytest.raises(kind) as caught:
            pool.get()
        assert explain(caught.value)[0] == status
    assert "disk is too little" in str(caught.value)


def test_a_worker_that_cannot_be_started_is_told_and_not_waited_for(tmp_path):
    pool = Processes(Doer(tmp_path), tmp_path / "pool", 1)
    (tmp_path / "pool" / "worker-0.log").mkdir()
    pool.put("well")
    with pytest.raises(IsADirectoryError):
        pool.get()
    pool.close()
