"""Jobs of one run side by side: in processes of this machine, or in tasks on a Ray cluster that shares the file system.

What does the jobs is written to a file once and read by each worker. A job is a word; what comes of it lies in files.
The job of a worker that is killed is done again, by another one.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from compressor.core import errors
from compressor.core.errors import ResourceError
from compressor.core.log import LOGGER
from compressor.core.memory import freed_is_kept
from compressor.core.references import code_folders, code_from
from compressor.core.resources import shortage
from compressor.runtime.processes import python
from compressor.runtime.supervisor import INTERRUPTED
from compressor.runtime.workers import connected_ray, environment, last_line, of_a_task

DOER = "doer.pt"
ATTEMPTS = 3
"""That a job gets whose worker is killed each time."""
_WORKER = "import sys; from compressor.runtime.pool import work; work(sys.argv[1], sys.argv[2:])"


class Doer(Protocol):
    """What does the jobs; picklable."""

    def do(self, job: str) -> None:
        """One job to its end."""
        ...


class Pool(Protocol):
    """Jobs that are under way."""

    def put(self, job: str) -> None:
        """Has a job done."""
        ...

    def get(self) -> str:
        """A job that is done, once one is.

        Raises:
            CompressorError: What the job ended with.
            ResourceError: Its worker was killed each time.
        """
        ...

    def close(self) -> None:
        """Ends what still runs."""
        ...


class Processes:
    """Processes of this machine, which end with this one.

    Args:
        folder: For the doer's file and the workers' logs.
        n: How many.
    """

    def __init__(self, doer: Doer, folder: Path, n: int) -> None:
        self._file = _written(doer, folder)
        self._jobs: queue.Queue[str | None] = queue.Queue()
        self._done: queue.Queue[str | Exception] = queue.Queue()
        self._running: dict[int, subprocess.Popen] = {}
        self._lock, self._closed = threading.Lock(), False
        self._threads = [threading.Thread(target=self._drive, args=(i,), daemon=True) for i in range(n)]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        """Of the workers that there are."""
        with self._lock:
            return [worker.pid for worker in self._running.values()]

    def put(self, job: str) -> None:
        self._jobs.put(job)

    def get(self) -> str:
        found = self._done.get()
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for worker in self._running.values():
                worker.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _drive(self, number: int) -> None:
        """Feeds one worker until nothing is left, and starts another where it is gone."""
        log = self._file.with_name(f"worker-{number}.log")
        try:
            while (job := self._jobs.get()) is not None:
                found = self._tried(number, log, job)
                if found is None:
                    return
                self._done.put(found)
        except Exception as error:  # no worker can be started; who waits for the job is told
            self._done.put(error)
        finally:
            self._let_go(number)

    def _tried(self, number: int, log: Path, job: str) -> str | Exception | None:
        """What came of a job; None where all is over."""
        how = ""
        for _ in range(ATTEMPTS):
            worker = self._worker(number, log)
            if worker is None:
                return None
            answer = _asked(worker, job)
            if answer is not None:
                return _outcome(job, answer)
            how = _end_of(worker, log)
            if not self._closed:
                LOGGER.warning("%s: its worker %s", job, how)
        return _lost(job, how)

    def _worker(self, number: int, log: Path) -> subprocess.Popen | None:
        """The worker of that number, started where there is none or it has ended; None once all is over."""
        with self._lock:
            if self._closed:
                return None
            worker = self._running.get(number)
            if worker is None or worker.poll() is not None:
                with log.open("w") as file:
                    worker = self._running[number] = subprocess.Popen(
                        python("-c", _WORKER, str(self._file), *code_folders()), stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE, stderr=file, text=True, env=environment(), start_new_session=True,
                    )  # fmt: skip
            return worker

    def _let_go(self, number: int) -> None:
        with self._lock:
            worker = self._running.pop(number, None)
        if worker is not None:
            _end(worker)


def _asked(worker: subprocess.Popen, job: str) -> dict[str, Any] | None:
    """What a worker answers; None where it is gone."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())
    except (OSError, json.JSONDecodeError):  # before its answer, or in the middle of it
        _end(worker)
        return None


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.communicate()


def _end_of(worker: subprocess.Popen, log: Path) -> str:
    status = worker.returncode
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    said = last_line(log)
    return f"was ended {how}" + (f": {said}" if said else "")


def _lost(job: str, how: str) -> ResourceError:
    return ResourceError(
        f"{job}: its worker {how}, {ATTEMPTS} times; memory is too little, most likely; give fewer --workers, and go "
        "on with --resume"
    )


class RayTasks:
    """Tasks on a Ray cluster.

    Args:
        memory: Bytes that a task takes, about.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, doer: Doer, folder: Path, address: str, memory: int) -> None:
        self._ray = connected_ray(address, "--", "--address local")
        self._file = _written(doer, folder)
        task = self._ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1, memory=memory, runtime_env=of_a_task())
        self._task = task(answered)
        self._waiting: dict[Any, str] = {}

    def put(self, job: str) -> None:
        reference = self._task.remote(str(self._file), job, os.getcwd(), code_folders())
        self._waiting[reference] = job

    def get(self) -> str:
        done, _ = self._ray.wait(list(self._waiting))
        job = self._waiting.pop(done[0])
        try:
            found = _outcome(job, self._ray.get(done[0]))
        except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.RaySystemError) as error:
            raise _lost(job, f"was lost: {str(error).strip().splitlines()[0]}") from error
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        for reference in self._waiting:
            self._ray.cancel(reference, force=True)


def n_of_cluster(address: str) -> int:
    """The cores of a Ray cluster.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """
    ray = connected_ray(address, "--", "--address local")
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _written(doer: Doer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(doer, folder / DOER)
    return (folder / DOER).resolve()


def _outcome(job: str, answer: dict[str, Any]) -> str | Exception:
    """The job, or the error that it ended with, of our own kind where it was; what it warned of is told."""
    for warning in answer["warnings"]:
        LOGGER.warning("%s", warning)
    if answer["error"] is None:
        return job
    name, message = answer["error"]
    if answer["system"] is not None:
        return OSError(*answer["system"])
    kind = getattr(errors, name, _BUILTIN.get(name))
    return RuntimeError(f"{job}: {name}: {message}") if kind is None else kind(message)


_BUILTIN: dict[str, type[Exception]] = {"MemoryError": MemoryError, "ImportError": ImportError}
"""Whose kind tells a command's exit status, besides our own and OSError."""


def _said(error: Exception) -> tuple[str, str]:
    """The class and the words of an error; of one that came of too little memory or disk that."""
    short = "" if isinstance(error, (MemoryError, OSError)) else shortage(error)
    if short:
        return ResourceError.__name__, short
    return (ImportError if isinstance(error, ImportError) else type(error)).__name__, str(error)


class _Kept(logging.Handler):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def answered(file: str, job: str, folder: str, folders: Sequence[str]) -> dict[str, Any]:
    """Does a job by the doer of a file that this program wrote; `folders` hold code that the user named."""
    os.chdir(folder)
    kept = _Kept()
    LOGGER.addHandler(kept)
    error = system = None
    try:
        _read(file, folders).do(job)
    except Exception as raised:
        error = _said(raised)
        if isinstance(raised, OSError) and raised.errno is not None:
            system = (raised.errno, raised.strerror, None if raised.filename is None else str(raised.filename))
    finally:
        LOGGER.removeHandler(kept)
    return {"error": error, "system": system, "warnings": kept.texts}


_read_files: dict[str, Doer] = {}


def _read(file: str, folders: Sequence[str]) -> Doer:
    """Once per process."""
    if file not in _read_files:
        with code_from(folders):
            _read_files[file] = torch.load(file, weights_only=False)
    return _read_files[file]


def work(file: str, folders: Sequence[str] = ()) -> None:
    """A worker: lines with a job in, a line with its outcome out. It ends when nobody gives it more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_follow, args=(jobs,), daemon=True).start()
    with freed_is_kept():
        while True:
            answer = answered(file, jobs.get(), os.getcwd(), folders)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _follow(jobs: queue.Queue[str]) -> None:
    """Hands on the jobs; ends this process with the one that gives them, in the middle of a job as well."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(INTERRUPTED)
