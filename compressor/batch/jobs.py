"""Many models: the jobs of a manifest in worker processes, whatever becomes of each, and a summary of all.

In the output directory: an artifact per job, `logs/`, `summary.jsonl` and `summary.xml`. `.journal.jsonl` notes what is
begun and done while it happens, so that `--resume` knows it whenever a batch ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

from compressor.batch.fingerprint import fingerprint
from compressor.batch.manifest import Job
from compressor.batch.summary import SEVERITY, Board, Outcome, outcome_of, write_summary
from compressor.core.artifact import Artifact, damaged_files, failed_directory, is_artifact
from compressor.core.artifact import beside as sibling
from compressor.core.errors import CompressorError, UsageError
from compressor.core.failures import explain
from compressor.core.locking import is_held, locked
from compressor.core.reading import read_bytes
from compressor.runtime.workers import INTERRUPTED, Budget, Ended, Engine

JOURNAL = ".journal.jsonl"
LARGEST_JOURNAL = 1_000_000_000
KILLED = 4
"""Status of a job whose worker was lost each time: on Linux, it is the kernel that kills what takes too much memory."""
PATIENCE_SECONDS = 30.0
"""That a job waits for a worker of an earlier batch, which was killed, to let go of its folder."""


@dataclass
class Batch:
    """Jobs, where their artifacts go, and how they are run.

    resume    keep what is complete, and go on with what was interrupted
    force     replace artifacts that are there
    retries   of a job whose worker crashed; they run with no other beside
    """

    jobs: Sequence[Job]
    output: Path
    engine: Engine
    n_workers: int
    budget: Budget
    resume: bool = False
    force: bool = False
    retries: int = 1
    unwritten: str = ""
    """Why the journal or the summary could not be written; what the jobs made is there all the same."""
    _earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    _writing: Lock = field(default_factory=Lock)
    _stopping: Event = field(default_factory=Event)

    def run(self, board: Board) -> list[Outcome]:
        """Every job to some end; the outcomes in the order of the jobs.

        Raises:
            UsageError: The directory is another batch's at the moment, or holds artifacts that would be replaced.
        """
        with locked(self.output, "`compress batch`"):
            self._refuse_existing()
            (self.output / "logs").mkdir(exist_ok=True)
            self._earlier = _read_journal(self.output / JOURNAL)
            started = time.monotonic()
            with board, ThreadPoolExecutor(self.n_workers) as pool:
                pending = [pool.submit(self._to_its_end, job, board) for job in self.jobs]
                self._wait(pending, board)
            outcomes = [future.result() for future in pending]
            try:
                write_summary(self.output, outcomes, time.monotonic() - started)
            except OSError as error:
                self.unwritten = explain(error)[1]
            return outcomes

    def _wait(self, pending: list[Future], board: Board) -> None:
        left = set(pending)
        while left:
            try:
                _, left = wait(left, timeout=0.25)
                board.refresh()
            except KeyboardInterrupt:
                board.say("interrupted; what runs is ended so that --resume can go on with it; again ends it at once")
                self._stopping.set()
                self.engine.stop()

    def _refuse_existing(self) -> None:
        links = [self.output / name for name in (JOURNAL, "logs") if (self.output / name).is_symlink()]
        if links:
            raise UsageError(f"{links[0]}: is a link, and nothing is written through one; remove it")
        there = [job.name for job in self.jobs if is_artifact(self.output / job.name)]
        if there and not (self.resume or self.force):
            raise UsageError(
                f"{self.output}: holds {len(there)} of these {len(self.jobs)} artifacts already, as {there[0]}; keep "
                "them with --resume, replace them with --force, or give another directory with -o"
            )

    def _to_its_end(self, job: Job, board: Board) -> Outcome:
        started = time.monotonic()
        try:
            outcome = self._outcome(job, board)
        except Exception as error:  # whatever it is, it is this job's alone: nothing takes the others down
            status, message = explain(error)
            spent = round(time.monotonic() - started, 2)
            outcome = Outcome(job.name, job.model, job.recipe, status, message, seconds=spent)
        if not self._stopping.is_set() or outcome.status != INTERRUPTED:
            self._note({"done": job.name} | asdict(outcome))
        board.done(outcome)
        return outcome

    def _outcome(self, job: Job, board: Board) -> Outcome:
        started, log = time.monotonic(), self.output / "logs" / f"{job.name}.log"
        empty = Outcome(job.name, job.model, job.recipe)
        if self._stopping.is_set():
            return replace(empty, status=INTERRUPTED, message="not started")
        key = fingerprint(job)
        kept = self._complete(job, key)
        if kept is not None:
            return kept
        board.started(job.name, log)
        memory, refused = self.engine.predict(job.command(self.output / job.name, "--force"))
        self._await_others(job, board)
        ended, attempts = (refused, 0) if refused is not None else self._attempts(job, key, memory, log)
        spent = round(time.monotonic() - started, 2)
        known = replace(empty, seconds=spent, attempts=attempts, key=key, predicted_memory=memory)
        return outcome_of(
            self.output / job.name, known, KILLED if ended.status is None else ended.status, ended.message
        )

    def _await_others(self, job: Job, board: Board) -> None:
        """Until a worker whose batch was killed has ended; it ends by itself, and else this job is refused by name."""
        partial, until = sibling(self.output / job.name, ".partial"), time.monotonic() + PATIENCE_SECONDS
        if is_held(partial):
            board.say(f"{job.name}: waits for a worker of an earlier batch, which still writes to {partial}")
        while is_held(partial) and time.monotonic() < until and not self._stopping.is_set():
            time.sleep(0.25)

    def _attempts(self, job: Job, key: str, memory: int, log: Path) -> tuple[Ended, int]:
        target = self.output / job.name
        resumes = self.resume and self._earlier.get(job.name, {}).get("key") == key
        ended = Ended(None, "")
        for attempt in range(self.retries + 1):
            more = ["--resume"] if resumes and (sibling(target, ".partial") / "work" / "run.json").exists() else []
            with self.budget.of(self.budget.total if attempt else memory):
                self._note({"begun": job.name, "key": key})
                ended = self.engine.run(job.command(target, "--force", *more), log, memory)
            resumes = True
            if ended.status is not None:
                return ended, attempt + 1
        return Ended(None, f"{ended.message}, {self.retries + 1} times; it may have taken more memory than there is"), (
            self.retries + 1
        )

    def _complete(self, job: Job, key: str) -> Outcome | None:
        """The outcome of an earlier batch, where it was made of the same and is still whole."""
        noted = self._earlier.get(job.name, {})
        if not self.resume or noted.get("key") != key or noted.get("status") not in (0, 1):
            return None
        target = self.output / job.name
        directory = failed_directory(target) if noted["status"] else target
        try:
            if not is_artifact(directory) or damaged_files(Artifact.open(directory)):
                return None
        except CompressorError:  # damaged: it is made again
            return None
        empty = Outcome(job.name, job.model, job.recipe, key=key, kept=True)
        return outcome_of(target, empty, noted["status"], noted["message"])

    def _note(self, entry: dict[str, Any]) -> None:
        """Into the journal; a job is not lost with its note, which only --resume needs."""
        try:
            with self._writing, (self.output / JOURNAL).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            self.unwritten = explain(error)[1]


def worst(outcomes: Sequence[Outcome]) -> int:
    """The exit status of a batch: the worst of its jobs."""
    return min((outcome.status for outcome in outcomes), key=SEVERITY.index, default=0)


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """The last entry of each job; a line that was not finished is none."""
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    for line in read_bytes(path, LARGEST_JOURNAL, UsageError).split(b"\n"):
        try:
            entry = json.loads(line)
            job = entry.get("done", entry.get("begun"))
        except (ValueError, AttributeError, RecursionError):
            continue
        if isinstance(job, str) and isinstance(entry.get("key"), str):
            found[job] = {"key": entry["key"], "status": entry.get("status"), "message": str(entry.get("message", ""))}
    return found
