"""Where the jobs of a batch run: processes of this machine, or a Ray cluster. A job is a command of its own.

A worker that ends by a signal, or is lost, has crashed; every other end is an exit status and a message.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import compressor
from compressor.core.errors import UsageError

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


class _Planning:
    def predict(self, command: Sequence[str]) -> tuple[int, Ended | None]:
        """By a dry run, which reads headers only, in a process of its own: no file can take the batch down."""
        found = subprocess.run(
            [sys.executable, "-m", "compressor", *command, "--dry-run", "--json"], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, env=environment(), check=False, start_new_session=True,
        )  # fmt: skip
        if found.returncode:
            return 0, _ended(found.returncode, found.stderr)
        return int(json.loads(found.stdout)["peak_memory"]), None


_WORKER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from compressor.cli.commands import main
main()
"""
"""Heeds an interrupt even where whoever started the batch ignores it, as nohup and shells do in the background."""


class LocalEngine(_Planning):
    """Processes of this machine."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], log: Path, memory: int) -> Ended:
        with log.open("ab") as file:
            with self._lock:
                if self._stopped.is_set():
                    return Ended(INTERRUPTED, "not started")
                process = subprocess.Popen(
                    [sys.executable, "-c", _WORKER, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    env=environment(), start_new_session=True,
                )  # fmt: skip
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        return ended(status, log)

    def stop(self) -> None:
        self._stopped.set()
        with self._lock:
            for process in self._running:
                process.send_signal(signal.SIGINT)


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
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise UsageError(
            f"{prefix}address {address}: no Ray cluster answers; start one with `ray start --head`, or write {local}"
        ) from error
    return ray


class RayEngine(_Planning):
    """Tasks on a Ray cluster that shares the file system; each in a worker of its own, with the memory it will take.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str) -> None:
        ray = self._ray = connected_ray(address, "--", "--address local")
        self._references: set[Any] = set()
        self._stopped = threading.Event()
        self._task = ray.remote(max_retries=0, max_calls=1, num_cpus=1)(run_here)

    def run(self, command: Sequence[str], log: Path, memory: int) -> Ended:
        if self._stopped.is_set():
            return Ended(INTERRUPTED, "not started")
        settings = {"env_vars": {name: environment()[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")}}
        reference = self._task.options(memory=memory, runtime_env=settings).remote(list(command), str(log), os.getcwd())
        self._references.add(reference)
        try:
            return ended(self._ray.get(reference), log)
        except self._ray.exceptions.TaskCancelledError:
            return Ended(INTERRUPTED, "interrupted")
        except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.RaySystemError) as error:
            return Ended(None, str(error).strip().splitlines()[0])
        finally:
            self._references.discard(reference)

    def stop(self) -> None:
        self._stopped.set()
        for reference in tuple(self._references):
            self._ray.cancel(reference)


def run_here(command: list[str], log: str, folder: str) -> int:
    """A command in this process, which is a Ray worker's and ends with it; returns its exit status."""
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = ["compress", *command]
    try:
        runpy.run_module("compressor", run_name="__main__")
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
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def environment() -> dict[str, str]:
    """Of a worker: this package, and one thread unless OMP_NUM_THREADS says otherwise."""
    package = str(Path(compressor.__file__).resolve().parents[1])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
