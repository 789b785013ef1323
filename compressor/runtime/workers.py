"""Where the jobs of a batch run: processes of this machine, or a Ray cluster. A job is a command of its own.

A worker that ends by a signal, or is lost, has crashed; every other end is an exit status and a message. One that takes
longer than it may is interrupted, and ended by force where it does not heed that.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from compressor.core.errors import UsageError
from compressor.core.files import open_to_append
from compressor.core.quantities import duration
from compressor.runtime.processes import clean_environment, python
from compressor.runtime.supervisor import GRACE_SECONDS

INTERRUPTED = 130
_TAIL = 4096


@dataclass(frozen=True)
class Ended:
    """How a worker ended: its exit status, None if it crashed, and the last line that it wrote."""

    status: int | None
    message: str


class Engine(Protocol):
    """Runs commands of `compress`, each in a process of its own."""

    def predict(self, command: Sequence[str]) -> tuple[int, Ended | None]:
        """(bytes that a command will take, about; how it ended, where it cannot even be planned)."""
        ...

    def run(self, command: Sequence[str], log: Path, memory: int) -> Ended:
        """One command to its end, what it prints to a log; `memory` in bytes is what it will take, about."""
        ...

    def stop(self) -> None:
        """Interrupts what runs; what is started afterwards ends at once."""
        ...


@dataclass
class Budget:
    """Memory that jobs share: one waits until there is enough, and runs alone where there never will be."""

    total: int
    used: int = 0
    holders: int = 0
    condition: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def of(self, wanted: int) -> Iterator[None]:
        with self.condition:
            self.condition.wait_for(lambda: not self.holders or self.used + wanted <= self.total)
            self.used, self.holders = self.used + wanted, self.holders + 1
        try:
            yield
        finally:
            with self.condition:
                self.used, self.holders = self.used - wanted, self.holders - 1
                self.condition.notify_all()


_WORKER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from compressor.__main__ import worker
worker()
"""
"""Heeds an interrupt even where whoever started the batch ignores it, as nohup and shells do in the background."""
TIMED_OUT = 4
"""Status of a job that took longer than it may: of time there was too little."""


class _Processes:
    """Commands in processes of this machine, which end with the batch, when it is stopped, or when their time is up."""

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def predict(self, command: Sequence[str]) -> tuple[int, Ended | None]:
        """By a dry run, which reads headers only, in a process of its own: no file can take the batch down."""
        with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as said:
            found = self.ended([*command, "--dry-run", "--json"], printed, said)
            texts = [_tail(file) for file in (printed, said)]
        if found is None or isinstance(found, Ended):
            return 0, found or Ended(INTERRUPTED, "not started")
        if found:
            return 0, _ended(found, texts[1])
        try:
            return int(json.loads(texts[0])["peak_memory"]), None
        except (ValueError, KeyError, TypeError):
            return 0, Ended(TIMED_OUT, "its dry run did not print a plan; is the disk full?")

    def ended(self, command: Sequence[str], stdout: BinaryIO, stderr: BinaryIO) -> int | Ended | None:
        """The status of a command; how it ended where its time was up, None where it was not started."""
        with self._lock:
            if self._stopped.is_set():
                return None
            process = subprocess.Popen(
                python("-c", _WORKER, *command), stdin=subprocess.PIPE, stdout=stdout, stderr=stderr,
                env=environment(), start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        try:
            return process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            self._end(process)
            return Ended(TIMED_OUT, f"took longer than {duration(self.timeout or 0)} and was ended; give it more with "
                                    "--timeout and go on with --resume")  # fmt: skip
        finally:
            with self._lock:
                self._running.discard(process)
            if process.stdin is not None:
                process.stdin.close()

    def _end(self, process: subprocess.Popen) -> None:
        """By an interrupt, which lets a run be resumed; else by force, with all that it has started."""
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS / 2)
                return
        _kill(process)
        process.wait()

    def stop(self) -> None:
        """Interrupts what runs, and ends by force what does not heed that; at once when it is asked again."""
        again = self._stopped.is_set()
        self._stopped.set()
        with self._lock:
            for process in self._running:
                if again:
                    _kill(process)
                    continue
                process.send_signal(signal.SIGINT)
                late = threading.Timer(GRACE_SECONDS, _kill, [process])
                late.daemon = True
                late.start()


def _kill(process: subprocess.Popen) -> None:
    """A process that still runs, and its children, which share its session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


class LocalEngine(_Processes):
    """Processes of this machine."""

    def run(self, command: Sequence[str], log: Path, memory: int) -> Ended:
        try:
            descriptor = open_to_append(log)
        except OSError as error:
            return Ended(2, f"{log}: cannot be written; {error.strerror}; remove it")
        with os.fdopen(descriptor, "ab") as file:
            status = self.ended(command, file, file)
        if status is None:
            return Ended(INTERRUPTED, "not started")
        if isinstance(status, Ended):
            return status
        if status < 0 and self._stopped.is_set():
            return Ended(INTERRUPTED, "interrupted")
        return ended(status, log)


def connected_ray(address: str, prefix: str, local: str) -> Any:
    """The module ray, on the cluster at an address.

    Args:
        prefix: Of the options engine and address, where they are written: "--" or "n2n.".
        local: How a cluster of one's own is asked for there.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"{prefix}engine ray: ray is not installed; pip install 'compressor[ray]'") from error
    try:
        if not ray.is_initialized():
            with _among_pythons_own():
                ray.init(address=address, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise UsageError(
            f"{prefix}address {address}: no Ray cluster answers; start one with `ray start --head`, or write {local}"
        ) from error
    return ray


@contextmanager
def _among_pythons_own() -> Iterator[None]:
    """Works in the folder of Python's own modules: Ray puts the folder that it is started in before its tasks' path."""
    here = os.getcwd()
    os.chdir(sysconfig.get_path("stdlib"))
    try:
        yield
    finally:
        os.chdir(here)


def of_a_task() -> dict[str, Any]:
    """The environment of a Ray task, where it differs from the cluster's."""
    found = environment()
    names = ("PYTHONPATH", "PYTHONSAFEPATH", "OMP_NUM_THREADS")
    return {"env_vars": {name: found[name] for name in names if name in found}}


class RayEngine(_Processes):
    """Tasks on a Ray cluster that shares the file system; each in a worker of its own, with the memory it will take.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str, timeout: float | None = None) -> None:
        super().__init__(timeout)
        ray = self._ray = connected_ray(address, "--", "--address local")
        self._references: set[Any] = set()
        self._task = ray.remote(max_retries=0, max_calls=1, num_cpus=1)(run_here)

    def run(self, command: Sequence[str], log: Path, memory: int) -> Ended:
        if self._stopped.is_set():
            return Ended(INTERRUPTED, "not started")
        task = self._task.options(memory=memory, runtime_env=of_a_task())
        reference = task.remote(list(command), str(log), os.getcwd())
        self._references.add(reference)
        try:
            return ended(self._ray.get(reference, timeout=self.timeout), log)
        except self._ray.exceptions.GetTimeoutError:
            self._ray.cancel(reference, force=True)
            return Ended(TIMED_OUT, f"took longer than {duration(self.timeout or 0)} and was ended; give it more with "
                                    "--timeout and go on with --resume")  # fmt: skip
        except self._ray.exceptions.TaskCancelledError:
            return Ended(INTERRUPTED, "interrupted")
        except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.RaySystemError) as error:
            return Ended(None, str(error).strip().splitlines()[0])
        finally:
            self._references.discard(reference)

    def stop(self) -> None:
        again = self._stopped.is_set()
        super().stop()
        for reference in tuple(self._references):
            self._ray.cancel(reference, force=again)


def run_here(command: list[str], log: str, folder: str) -> int:
    """A command in this process, which is a Ray worker's and ends with it; returns its exit status."""
    os.chdir(folder)
    descriptor = open_to_append(Path(log))
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = ["compress", *command]
    try:
        importlib.import_module("compressor.cli.commands").main()  # by its name: this room knows no commands
    except SystemExit as ended_with:
        return int(ended_with.code or 0)
    return 0


def ended(status: int, log: Path) -> Ended:
    """A status and the last line of a log."""
    return _ended(status, last_line(log))


def _ended(status: int, text: str) -> Ended:
    last = (text.strip().splitlines() or [""])[-1].removeprefix("Error: ")
    if status == -signal.SIGINT:
        return Ended(INTERRUPTED, "interrupted")
    if status < 0:
        return Ended(None, f"the worker was ended by {signal.Signals(-status).name}")
    return Ended(status, last)


def last_line(log: Path) -> str:
    """The last line of a file, without reading all of it; nothing where there is none."""
    try:
        with log.open("rb") as file:
            lines = _tail(file, _TAIL).strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def _tail(file: BinaryIO, most: int = 1 << 30) -> str:
    """The end of a file as text."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - most))
    return file.read().decode(errors="replace")


def environment() -> dict[str, str]:
    """A worker's environment: one thread unless OMP_NUM_THREADS says otherwise."""
    return {"OMP_NUM_THREADS": "1", **clean_environment()}
