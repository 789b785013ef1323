"""Students are judged here, in processes of this machine, or on a Ray cluster: whoever does it, the same figures.

What judges them is written to a file once and read by each worker. A worker takes descriptions of students and gives
back a line for each as soon as it is judged.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from compressor.core.errors import PassError
from compressor.core.references import code_folders, code_from
from compressor.core.students import Student
from compressor.runtime.processes import python
from compressor.runtime.workers import connected_ray, environment, last_line, of_a_task

EVALUATOR = "evaluator.pt"
_WORKER = "import sys; from compressor.structure.students.pool import work; work(sys.argv[1], sys.argv[2:])"


class Evaluator(Protocol):
    """What judges students; picklable."""

    def evaluate(self, students: Sequence[Student]) -> Iterator[tuple[Student, float]]:
        """Each with its accuracy, in any order."""
        ...


class Pool(Protocol):
    """Judges students side by side."""

    def evaluate(self, students: Sequence[Student]) -> Iterator[tuple[Student, float]]:
        """Each with its accuracy, as they are done."""
        ...

    def close(self) -> None:
        """Lets the workers go."""
        ...


class Here:
    """One after the other, in this process."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluate = evaluator.evaluate

    def close(self) -> None:
        """Nothing to let go."""


class Processes:
    """Processes of this machine, each with a core and a copy of the teacher.

    Args:
        folder: For the evaluator's file and the workers' logs.
        n: How many.

    Raises:
        PassError: A worker has died; its log says why.
    """

    def __init__(self, evaluator: Evaluator, folder: Path, n: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(evaluator, folder / EVALUATOR)
        self.logs = [folder / f"worker-{number}.log" for number in range(n)]
        self.workers = [self._started(folder, log) for log in self.logs]

    def _started(self, folder: Path, log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                python("-c", _WORKER, str(folder / EVALUATOR), *code_folders()), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=file, text=True, env=environment(),
            )  # fmt: skip

    def evaluate(self, students: Sequence[Student]) -> Iterator[tuple[Student, float]]:
        done: queue.Queue[tuple[Student, float] | Exception] = queue.Queue()
        chunks: queue.Queue[list[Student]] = queue.Queue()
        for chunk in neighbours(sorted(students), len(self.workers)):
            chunks.put(chunk)
        threads = [threading.Thread(target=self._drive, args=(number, chunks, done), daemon=True)
                   for number in range(len(self.workers))]  # fmt: skip
        for thread in threads:
            thread.start()
        for _ in students:
            found = done.get()
            if isinstance(found, Exception):
                raise found
            yield found

    def _drive(self, number: int, chunks: queue.Queue, done: queue.Queue) -> None:
        """Feeds one worker until no chunk is left."""
        worker = self.workers[number]
        assert worker.stdin is not None
        assert worker.stdout is not None
        while True:
            try:
                chunk: list[Student] = chunks.get_nowait()
            except queue.Empty:
                return
            try:
                worker.stdin.write(json.dumps([student.key for student in chunk]) + "\n")
                worker.stdin.flush()
                for _ in chunk:
                    key, accuracy = json.loads(worker.stdout.readline())
                    done.put((Student.read(key), accuracy))
            except (OSError, json.JSONDecodeError):  # it is gone, in the middle of a line or before
                done.put(PassError(f"a worker that judges students has ended: {last_line(self.logs[number])}"))
                return

    def close(self) -> None:
        for worker in self.workers:
            if worker.stdin is not None:
                worker.stdin.close()
        for worker in self.workers:
            try:
                worker.wait(timeout=5)
            except subprocess.TimeoutExpired:  # in the middle of a student
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()


class RayPool:
    """Tasks on a Ray cluster that shares the file system.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, evaluator: Evaluator, folder: Path, address: str) -> None:
        ray = self._ray = connected_ray(address, "n2n.", "address: local")
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / EVALUATOR).resolve()
        torch.save(evaluator, self.file)
        self._task = ray.remote(num_cpus=1, runtime_env=of_a_task())(judged)

    def evaluate(self, students: Sequence[Student]) -> Iterator[tuple[Student, float]]:
        n = int(self._ray.cluster_resources().get("CPU", 1))
        waiting = [
            self._task.remote(str(self.file), [student.key for student in chunk], code_folders())
            for chunk in neighbours(sorted(students), n)
        ]
        while waiting:
            done, waiting = self._ray.wait(waiting)
            for key, accuracy in self._ray.get(done[0]):
                yield Student.read(key), accuracy

    def close(self) -> None:
        """The cluster stays as it was."""


def neighbours(students: Sequence[Student], n: int) -> list[list[Student]]:
    """About `n` runs of neighbours, which share most."""
    size = max(1, -(-len(students) // n))
    return [list(students[i : i + size]) for i in range(0, len(students), size)]


def judged(file: str, keys: list[str], folders: Sequence[str] = ()) -> list[tuple[str, float]]:
    """Judges students by the evaluator of a file that this program wrote; `folders` hold code that the user named."""
    evaluator = _read(file, folders)
    return [(student.key, accuracy) for student, accuracy in evaluator.evaluate([Student.read(key) for key in keys])]


_read_files: dict[str, Any] = {}


def _read(file: str, folders: Sequence[str]) -> Any:
    """Once per process."""
    if file not in _read_files:
        torch.set_num_threads(1)
        with code_from(folders):
            _read_files[file] = torch.load(file, weights_only=False)
    return _read_files[file]


def work(file: str, folders: Sequence[str] = ()) -> None:
    """A worker: lines of descriptions in, a line per judged student out."""
    evaluator = _read(file, folders)
    for line in sys.stdin:
        for student, accuracy in evaluator.evaluate([Student.read(key) for key in json.loads(line)]):
            sys.stdout.write(json.dumps([student.key, accuracy]) + "\n")
            sys.stdout.flush()
