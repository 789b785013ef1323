"""What came of a batch: a table that lives while it runs, then the same as lines of JSON and as JUnit's XML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from xml.etree import ElementTree

from compressor.core.artifact import REPORT, Artifact, failed_directory, is_artifact
from compressor.core.errors import CompressorError
from compressor.core.failures import BUG, RESOURCES
from compressor.core.files import write_text
from compressor.core.quantities import duration, size
from compressor.core.resources import said
from compressor.core.terminal import make_console, printable
from compressor.report.facts import loss_of
from compressor.report.tables import table
from compressor.runtime.workers import last_line

SEVERITY = (130, 5, 4, 3, 2, 1, 0)
STATES = {
    0: "done", 1: "a gate failed", 2: "wrong usage", 3: "unreadable input", 4: "out of disk, memory or time",
    5: "our bug", 130: "interrupted",
}  # fmt: skip
_SHOWN = 20


@dataclass(frozen=True)
class Outcome:
    """How a job ended, and what of its artifact people ask first; `kept` is from an earlier batch."""

    job: str
    model: str
    recipe: str
    status: int = 0
    message: str = ""
    artifact: str | None = None
    bytes: int | None = None
    original_bytes: int | None = None
    loss: float | None = None
    loss_kind: str | None = None
    seconds: float = 0.0
    attempts: int = 0
    kept: bool = False
    predicted_memory: int = 0
    key: str = ""

    @property
    def state(self) -> str:
        return "kept" if self.kept and self.status == 0 else STATES.get(self.status, str(self.status))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"state": self.state}


def outcome_of(target: Path, outcome: Outcome, status: int, message: str = "") -> Outcome:
    """The outcome with what the artifact's report says. A gate has failed only where an artifact says so."""
    directory = failed_directory(target) if status == 1 else target
    if status in SEVERITY and status not in (0, 1):
        return replace(outcome, status=status, message=message)
    if status not in SEVERITY or not is_artifact(directory):
        what = f"ended with status {status} and left no artifact; {message or 'it said nothing'}"
        return replace(outcome, status=RESOURCES if said(message) else BUG, message=what)
    try:
        report = Artifact.open(directory).report
    except CompressorError as error:
        return replace(outcome, status=error.exit_status, message=str(error))
    outcome = replace(outcome, message=message if status else "")
    sizes, loss = report.get("size") or {}, loss_of(report)
    return replace(
        outcome, status=status, artifact=str(directory), bytes=sizes.get("bytes"),
        original_bytes=sizes.get("original_bytes"), loss=loss.value if loss else None,
        loss_kind=loss.what if loss else None,
    )  # fmt: skip


class Board:
    """Tells how a batch goes: a live table on a terminal, a line per job elsewhere, or nothing."""

    def __init__(self, n_jobs: int, silent: bool = False) -> None:
        self.n_jobs, self.silent = n_jobs, silent
        self.console = make_console(stderr=True)
        self.outcomes: list[Outcome] = []
        self.running: dict[str, Path] = {}
        self.live: Any = None

    def __enter__(self) -> Board:
        if self.console.is_terminal and not self.silent:
            from rich.live import Live

            self.live = Live(console=self.console, auto_refresh=False)
            self.live.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.refresh()
            self.live.__exit__(kind, error, trace)

    def started(self, job: str, log: Path) -> None:
        self.running[job] = log

    def done(self, outcome: Outcome) -> None:
        self.running.pop(outcome.job, None)
        self.outcomes.append(outcome)
        if self.live is None:
            text = f"{len(self.outcomes)} of {self.n_jobs} · {outcome.job}: {outcome.state}"
            self.say(f"{text}; {outcome.message}" if outcome.message else text)

    def say(self, text: str) -> None:
        if not self.silent:
            self.console.print(text, soft_wrap=True)

    def refresh(self) -> None:
        """The table as it is now."""
        if self.live is None:
            return
        shown = summary_table(self.outcomes[-_SHOWN:])
        for job, log in tuple(self.running.items()):
            shown.add_row(job, "runs", "", "", "", "", last_line(log))
        waiting = self.n_jobs - len(self.outcomes) - len(self.running)
        shown.caption = f"{len(self.outcomes)} of {self.n_jobs} done, {len(self.running)} running, {waiting} waiting"
        self.live.update(shown, refresh=True)


def summary_table(outcomes: Sequence[Outcome]) -> Any:
    """The outcomes, one row each."""
    made = table("job", "state", "before", "after", "loss", "time", "", numbers=("before", "after", "loss", "time"))
    for each in outcomes:
        made.add_row(
            each.job, each.state, size(each.original_bytes) if each.original_bytes else "",
            size(each.bytes) if each.bytes else "", "" if each.loss is None else f"{each.loss:.2%}",
            "" if each.kept else duration(each.seconds), each.message,
        )  # fmt: skip
    return made


def totals(outcomes: Sequence[Outcome]) -> str:
    """How many jobs ended in which way."""
    counts: dict[str, int] = {}
    for outcome in sorted(outcomes, key=lambda each: SEVERITY.index(each.status), reverse=True):
        counts[outcome.state] = counts.get(outcome.state, 0) + 1
    return ", ".join(f"{n} {state}" for state, n in counts.items())


def write_summary(directory: Path, outcomes: Sequence[Outcome], seconds: float) -> None:
    """summary.jsonl and summary.xml, each whole or not at all."""
    lines = [json.dumps(outcome.as_json(), ensure_ascii=False) for outcome in outcomes]
    write_text(directory / "summary.jsonl", "".join(line + "\n" for line in lines), errors="replace")
    write_text(directory / "summary.xml", junit(outcomes, seconds), errors="replace")


def junit(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The outcomes as JUnit's XML: a gate that failed is a failure, anything else an error."""
    failures = sum(outcome.status == 1 for outcome in outcomes)
    errors = sum(outcome.status not in (0, 1) for outcome in outcomes)
    counts = {"tests": str(len(outcomes)), "failures": str(failures), "errors": str(errors), "time": f"{seconds:.2f}"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "compress batch", **counts})
    for outcome in outcomes:
        names = {"name": printable(outcome.job), "classname": printable(outcome.recipe)}
        case = ElementTree.SubElement(suite, "testcase", {**names, "time": f"{outcome.seconds:.2f}"})
        if outcome.status:
            kind = "failure" if outcome.status == 1 else "error"
            what = {"type": f"exit status {outcome.status}", "message": printable(outcome.message or outcome.state)}
            ElementTree.SubElement(case, kind, what).text = printable(outcome.message)
        if outcome.artifact:
            facts = (
                f"{outcome.artifact}/{REPORT}: {outcome.bytes} of {outcome.original_bytes} bytes, loss {outcome.loss}"
            )
            ElementTree.SubElement(case, "system-out").text = printable(facts)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"
