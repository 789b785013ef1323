"""No file, no name, no disk and no death takes a batch down: every job comes to an end that the summary tells."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from compressor.batch import jobs as batch_jobs
from compressor.batch.jobs import JOURNAL, Batch, worst
from compressor.batch.manifest import Job, jobs_of_line
from compressor.batch.summary import Board, Outcome, junit, summary_table
from compressor.cli.commands import _status
from compressor.core.errors import UsageError
from compressor.core.locking import is_held, locked
from compressor.core.quantities import parse_duration
from compressor.core.terminal import make_console
from compressor.report.tables import inspection_tables
from compressor.runtime import workers
from compressor.runtime.workers import Budget, Ended, LocalEngine
from tests import pico

ROOT = Path(__file__).parents[2]
RECIPE = "passes: [{pass: affine, method: rtn, bits: 4, group: 16}]\nevaluation: {tokens: 0, samples: 0}\n"
NASTY = [
    "[/x]", "[bold red]", "[link=http://x]y[/link]", ":smile:", "\x1b[31mred\x1b[0m", "\x9b31m", "\r", "\x07", "a\tb",
    "‮evil", "\ud800", "\u2028", "￾", "{x}", "%s%n", "\\[x]", "<&\">", "]]>", "🙂\u200d🙂",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    (tmp_path / "r.yaml").write_text(RECIPE)
    pico.write_state_dict(pico.Tied, tmp_path / "good.pt")
    return tmp_path


class Writing:
    """An engine whose every job ends as it is told, with an artifact where that is 0 or 1."""

    def __init__(self, *ends: Ended | Exception, report: str = "{}") -> None:
        self.ends, self.report, self.asked = list(ends), report, []

    def predict(self, command):
        return 0, None

    def run(self, command, log, memory):
        target = Path(command[command.index("-o") + 1])
        self.asked.append(target.name)
        end = self.ends.pop(0) if self.ends else Ended(0, "")
        if isinstance(end, Exception):
            raise end
        if end.status == 0:
            target.mkdir(exist_ok=True)
            (target / "compression.json").write_text(self.report)
        return end

    def stop(self):
        pass


def run(engine, jobs, **changes) -> list[Outcome]:
    return Batch(jobs, Path("out"), engine, 1, Budget(10**11), **changes).run(Board(len(jobs), silent=True))


def named(*names: str) -> list[Job]:
    return [Job(name, "good.pt", "r.yaml", ("--arch", "tests.pico:Tied")) for name in names]


@pytest.mark.parametrize("width", [None, 40])
def test_no_name_is_markup_or_an_escape_in_a_table(width, monkeypatch, capsys):
    """In the summary, a plan and an inspection; `rich` would take [/x] for a closing tag and :smile: for a picture."""
    outcomes = [Outcome(name, name, name, 3, f"{name}: is wrong") for name in NASTY]
    found = {"tensors": [{"name": n, "shape": [2], "encoding": n, "bytes": 2} for n in NASTY], "path": NASTY[0]}
    console = make_console(width=width)
    for part in (summary_table(outcomes), *inspection_tables(found), "[/x] :smile: \x1b[2J"):
        console.print(part)
    printed = capsys.readouterr().out
    assert "[/x]" in printed
    assert ":smile:" in printed
    assert not set("\x1b\x9b\r\x07‮\u2028") & set(printed)


def test_a_live_table_takes_any_name(monkeypatch):
    board = Board(len(NASTY))
    board.console = make_console()
    board.console.file, board.console._force_terminal = io.StringIO(), True
    with board:
        for name in NASTY:
            board.started(name, Path("gone"))
            board.refresh()
            board.done(Outcome(name, name, name, 3, name))
        board.say("[/x]")


@pytest.mark.parametrize("name", NASTY)
def test_xml_is_whole_whatever_a_name_holds(name):
    outcomes = [Outcome(name, name, name, 3, name, artifact=name), Outcome(name, name, name, 1, name)]
    suite = ElementTree.fromstring(junit(outcomes, 1.0).partition("\n")[2].encode(errors="strict"))
    assert len(suite[0]) == 2


def test_names_that_no_file_can_have_are_shortened_and_told_apart(folder):
    for letter in "ab":
        pico.write_state_dict(pico.Tied, folder / f"{'n' * 230}{letter}.pt")
    wide = "ü" * 120
    pico.write_state_dict(pico.Tied, folder / f"{wide}.pt")
    jobs = jobs_of_line(["nn*.pt", f"{wide}.pt"], {"recipes": ["r.yaml"], "arch": "tests.pico:Tied"})
    assert len({job.name for job in jobs}) == 3
    assert all(len(os.fsencode(f"{job.name}.partial.partial")) < 255 for job in jobs)
    outcomes = run(Writing(), jobs)
    assert [each.status for each in outcomes] == [0, 0, 0]


@pytest.mark.parametrize(
    "garbage",
    [
        b"{}\n",
        b"\xff\xfe\x00\x80" * 50, b'{"done": ["x"]}\n', b'{"done": {"a": 1}, "key": 3}\n', b"[[[[" * 20_000 + b"\n",
        b'{"done": "a", "key": "k", "status": "x"}\n', b'{"done": "a", "status": [1]}\n', b"null\n3\n[]\n",
        b'{"begun": 1e999, "key": "k"}\n', b"9" * 5000 + b"\n",
    ],
)  # fmt: skip
def test_a_journal_with_garbage_is_read_over(folder, garbage):
    run(Writing(), named("a"))
    kept = Path("out", JOURNAL).read_bytes()
    Path("out", JOURNAL).write_bytes(garbage + b"\n" + kept.splitlines()[-1].replace(b'"done": "a"', b'"done": "z"'))
    outcomes = run(Writing(), named("a"), resume=True)
    assert [each.status for each in outcomes] == [0]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_journal_that_is_no_file_is_refused_at_once(folder, make):
    Path("out").mkdir()
    make(Path("out", JOURNAL))
    with pytest.raises(UsageError, match=r"out/.journal.jsonl: is a .*; only regular files are read"):
        run(Writing(), named("a"), resume=True)


@pytest.mark.parametrize("damage", ["{", '{"size": 3}', '"x"', "", "\0", "[" * 100_000, '{"sha256": {"x": "y"}}'])
def test_a_damaged_report_costs_its_own_job_alone(folder, damage):
    jobs = named("a", "b")
    whole = json.dumps({"sha256": {}, "size": {"bytes": 3}})
    run(Writing(report=whole), jobs)
    Path("out/a/compression.json").write_text(damage)
    engine = Writing(report=whole)
    outcomes = run(engine, jobs, resume=True)
    assert [each.status for each in outcomes] == [0, 0]
    assert "a" in engine.asked
    engine = Writing(report=damage)
    outcomes = run(engine, jobs, force=True)
    assert {each.status for each in outcomes} <= {0, 3}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(28, "No space left on device", "out/logs/a.log"), 4), (MemoryError(), 4), (RecursionError("deep"), 5),
        (PermissionError(13, "Permission denied", "out/logs/a.log"), 2), (OSError(24, "Too many open files"), 4),
        (RuntimeError("can't start new thread"), 4), (KeyError("x"), 5),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "x"), 5),
    ],
)  # fmt: skip
def test_whatever_happens_to_a_job_here_is_its_own(folder, error, status):
    outcomes = run(Writing(error), named("a", "b"), retries=0)
    assert [each.status for each in outcomes] == [status, 0]
    assert outcomes[0].message
    assert len(Path("out/summary.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended(1, "OSError: [Errno 28] No space left on device"), 4), (Ended(1, "MemoryError"), 4), (Ended(1, ""), 5),
        (Ended(120, ""), 5), (Ended(1, "std::bad_alloc"), 4), (Ended(4, "out"), 4),
    ],
)  # fmt: skip
def test_a_gate_has_failed_only_where_an_artifact_says_so(folder, ended, status):
    outcomes = run(Writing(ended), named("a"), retries=0)
    assert [each.status for each in outcomes] == [status]
    assert worst(outcomes) == status


def test_a_full_disk_under_the_summary_loses_no_outcome(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "out/summary.jsonl")

    monkeypatch.setattr(batch_jobs, "write_summary", full)
    made = Batch(named("a"), Path("out"), Writing(), 1, Budget(10**11))
    assert [each.status for each in made.run(Board(1, silent=True))] == [0]
    assert "out/summary.jsonl: disk is too little" in made.unwritten


def test_a_full_disk_under_the_journal_loses_no_job(folder):
    class Filling(Writing):
        def predict(self, command):
            Path("out", JOURNAL).unlink(missing_ok=True)
            Path("out", JOURNAL).symlink_to("/dev/full")
            return 0, None

    made = Batch(named("a", "b"), Path("out"), Filling(), 1, Budget(10**11))
    assert [each.status for each in made.run(Board(1, silent=True))] == [0, 0]
    assert "No space left" in made.unwritten


STUBBORN = """
import signal, time
def build():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
"""


def hanging(folder: Path) -> Job:
    (folder / "stubborn.py").write_text(STUBBORN)
    return Job("hangs", "good.pt", "r.yaml", ("--arch", "stubborn:build"))


def test_a_job_that_hangs_ends_when_its_time_is_up(folder, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.4)
    (outcome,) = run(LocalEngine(timeout=4), [hanging(folder)])
    assert outcome.status == 4
    assert "took longer than 4 s and was ended; give it more with --timeout" in outcome.message


def test_a_job_that_heeds_no_interrupt_is_ended_by_force(folder, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.4)
    engine = LocalEngine()
    job = hanging(folder)
    log = Path("log")
    ends: list[Ended] = []
    thread = threading.Thread(target=lambda: ends.append(engine.run(job.command(Path("x")), log, 0)))
    thread.start()
    while not engine._running:
        time.sleep(0.01)
    time.sleep(3)
    engine.stop()
    thread.join(20)
    assert ends == [Ended(130, "interrupted")]


PARENT = """
import sys
from pathlib import Path
from compressor.runtime.workers import LocalEngine
LocalEngine().run(sys.argv[1:], Path("log"), 0)
"""
SLEEPING = "import time\nfrom tests import pico\ndef build():\n    open('began', 'w').close()\n    time.sleep(120)\n"


def test_a_worker_ends_with_the_batch_that_was_killed(folder):
    (folder / "sleeping.py").write_text(SLEEPING)
    words = ["run", "good.pt", "--recipe", "r.yaml", "--arch", "sleeping:build", "-o", "x"]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *words])
    until = time.monotonic() + 60
    while not Path("began").exists() and time.monotonic() < until:
        time.sleep(0.05)
    (worker,) = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == parent.pid]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _parent(worker) is not None and time.monotonic() < until:
        time.sleep(0.05)
    assert _parent(worker) is None
    assert "Interrupted" in Path("log").read_text()


def _parent(pid: int) -> int | None:
    """The parent of a process that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[1])


def test_a_job_waits_for_a_worker_that_still_writes_and_else_names_it(folder, monkeypatch):
    monkeypatch.setattr(batch_jobs, "PATIENCE_SECONDS", 0.5)
    partial = Path("out/a.partial")
    with locked(partial, "run"):
        assert is_held(partial)
        started = time.monotonic()
        run(Writing(), named("a"))
        assert 0.4 < time.monotonic() - started < 5
        with (
            pytest.raises(UsageError, match=rf"another run is writing here, process {os.getpid()}; wait until"),
            locked(partial, "run"),
        ):
            pass
    assert not is_held(partial)


class Here(Writing):
    """An engine whose jobs run in this process."""

    def run(self, command, log, memory):
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = _status(command)
        return workers.ended(status, log)


def test_markup_and_the_longest_name_stop_no_other(folder, monkeypatch, capfd):
    """The case that was found, by the command."""
    monkeypatch.setattr(workers, "LocalEngine", lambda timeout=None: Here())
    torch.save({"[/x]": torch.zeros(90, 70).to_sparse()}, folder / "evil.pt")
    pico.write_state_dict(pico.Tied, folder / f"{'m' * 240}.pt")
    text = "{recipe: r.yaml, arch: 'tests.pico:Tied', format: safetensors, models: [evil.pt, 'mm*.pt']}"
    (folder / "m.yaml").write_text(text)
    monkeypatch.setenv("COLUMNS", "60")
    assert _status(["batch", "m.yaml", "--trust-recipe", "-j", "1", "-o", "A"]) == 3
    printed = capfd.readouterr()
    made = {path.name for path in Path("A").iterdir()}
    assert {"summary.jsonl", "summary.xml"} <= made
    assert any(name.startswith("mmm") and len(name) == 200 for name in made)
    assert "[/x]" in printed.out + printed.err


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30min", 1800), ("1.5 h", 5400), ("2d", 172800), ("5m", 300)]
)
def test_times_are_read(text, seconds):
    assert parse_duration(text, "--timeout") == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1 week", "inf", "nan", "1e3", "9" * 400])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match="--timeout: .* is no time; write 30min, 2h, or seconds"):
        parse_duration(text, "--timeout")
