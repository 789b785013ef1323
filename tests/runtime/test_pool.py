"""Jobs in processes beside: what they end with is told as it is, and a worker that is killed each time is given up."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from compressor.core.errors import CheckpointError, ResourceError
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
