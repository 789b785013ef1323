"""Many models: whatever becomes of one, the others are done; what is complete is kept; crashed workers run again."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compressor.batch.jobs import JOURNAL, Batch, worst
from compressor.batch.manifest import Job, read_manifest
from compressor.batch.summary import Board, Outcome, junit, totals
from compressor.core.errors import UsageError
from compressor.core.locking import locked
from compressor.runtime.workers import Budget, Ended, LocalEngine, RayEngine
from tests import pico

ROOT = Path(__file__).parents[2]
RECIPE = (
    "passes: [{pass: affine, method: rtn, bits: 4, group: 16}]\nevaluation: {tokens: 0, samples: 0, speed: false}\n"
)
MANIFEST = """
recipe: r.yaml
arch: tests.pico:Tied
format: safetensors
models:
  - good.pt
  - broken.pt
  - {path: large.pt, gates: {max_size: 1kB}}
"""


@pytest.fixture
def folder(here, monkeypatch):
    """Two good state dicts and a broken one; `Tied` needs no data when it is rounded to nearest."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (here / "r.yaml").write_text(RECIPE)
    (here / "m.yaml").write_text(MANIFEST)
    pico.write_state_dict(pico.Tied, here / "good.pt")
    pico.write_state_dict(pico.Tied, here / "large.pt")
    (here / "broken.pt").write_bytes((here / "good.pt").read_bytes()[:500])
    return here


class Scripted:
    """An engine whose workers end as they are told, job by job; it notes what it was asked."""

    def __init__(self, **ends: list[int | None]) -> None:
        self.ends, self.asked = ends, []

    def predict(self, command):
        return 0, None

    def run(self, command, log, memory):
        target = Path(command[command.index("-o") + 1])
        name = target.name.removesuffix("-r")
        self.asked.append((name, "--resume" in command))
        status = self.ends[name].pop(0)
        work = target.with_name(target.name + ".partial") / "work"
        work.mkdir(parents=True, exist_ok=True)
        (work / "run.json").write_text("{}")
        if status == 0:
            target.mkdir(exist_ok=True)
            (target / "compression.json").write_text("{}")
        return Ended(status, "" if status == 0 else "why")

    def stop(self):
        pass


def batch(engine, jobs, n_workers: int = 1, **changes) -> Batch:
    return Batch(jobs, Path("out"), engine, n_workers, Budget(10**11), **changes)


def quiet(jobs) -> Board:
    return Board(len(jobs), silent=True)


def test_one_that_fails_stops_none_and_what_is_complete_is_kept(folder):
    jobs = read_manifest(Path("m.yaml"))
    outcomes = batch(LocalEngine(), jobs, 2).run(quiet(jobs))
    assert [(each.job, each.status) for each in outcomes] == [("good-r", 0), ("broken-r", 3), ("large-r", 1)]
    assert worst(outcomes) == 3
    assert "broken.pt: is truncated" in outcomes[1].message
    assert "largest are" in outcomes[2].message
    assert not Path("out/large-r").exists()
    lines = [json.loads(line) for line in Path("out/summary.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines] == ["done", "unreadable input", "a gate failed"]
    assert lines[0]["bytes"] < lines[0]["original_bytes"]
    suite = ElementTree.parse("out/summary.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    made = Path("out/good-r/model.safetensors").stat().st_mtime_ns
    with pytest.raises(
        UsageError, match=r"out: holds 1 of these 3 artifacts already, as good-r; keep them with --resume"
    ):
        batch(LocalEngine(), jobs).run(quiet(jobs))
    again = batch(LocalEngine(), jobs, resume=True).run(quiet(jobs))
    assert [(each.state, each.kept) for each in again] == [
        ("kept", True), ("unreadable input", False), ("a gate failed", True),
    ]  # fmt: skip
    assert Path("out/good-r/model.safetensors").stat().st_mtime_ns == made
    with Path("out/good-r/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff" if file.read(1) != b"\xff" else b"\x00")
    engine = Scripted(good=[0])
    batch(engine, jobs[:1], resume=True).run(quiet(jobs))
    assert engine.asked == [("good", False)]


def test_a_crashed_worker_runs_again_alone_and_goes_on(folder):
    jobs = read_manifest(Path("m.yaml"))[:1]
    engine = Scripted(good=[None, 0])
    (outcome,) = batch(engine, jobs).run(quiet(jobs))
    assert (outcome.status, outcome.attempts) == (0, 2)
    assert engine.asked == [("good", False), ("good", True)]
    engine = Scripted(good=[None, None, None])
    (outcome,) = batch(engine, jobs, retries=2, force=True).run(quiet(jobs))
    assert (outcome.status, outcome.attempts) == (4, 3)
    assert "why, 3 times" in outcome.message


def test_a_journal_of_other_settings_resumes_nothing(folder):
    jobs = read_manifest(Path("m.yaml"))[:1]
    batch(Scripted(good=[130]), jobs).run(quiet(jobs))
    engine = Scripted(good=[130])
    batch(engine, jobs, resume=True).run(quiet(jobs))
    assert engine.asked == [("good", True)]
    with Path("out", JOURNAL).open("a") as file:
        file.write('{"begun": "good-')  # the batch was killed while it wrote
    other = [Job(job.name, job.model, job.recipe, (*job.options, "--seed", "4"), job.inputs) for job in jobs]
    engine = Scripted(good=[130])
    batch(engine, other, resume=True).run(quiet(jobs))
    assert engine.asked == [("good", False)]


def test_two_batches_do_not_write_into_one_directory(folder):
    jobs = read_manifest(Path("m.yaml"))
    with locked(Path("out"), "batch"), pytest.raises(UsageError, match="out: another `compress batch` is writing here"):
        batch(Scripted(), jobs).run(quiet(jobs))


def test_an_interrupted_worker_ends_by_130(folder):
    engine, ends = LocalEngine(), []
    words = ["run", "good.pt", "--recipe", "r.yaml", "--arch", "tests.pico:Tied", "--format", "safetensors", "-o", "x"]
    thread = threading.Thread(target=lambda: ends.append(engine.run(words, Path("log"), 0)))
    thread.start()
    while not Path("x.partial").exists() and thread.is_alive():
        time.sleep(0.01)
    engine.stop()
    thread.join()
    assert ends[0].status == 130
    assert engine.run(words, Path("log"), 0) == Ended(130, "not started")


def test_a_worker_that_is_killed_has_crashed(folder, started):
    engine, ends = LocalEngine(), []
    words = ["run", "good.pt", "--recipe", "r.yaml", "--arch", "tests.pico:Tied", "--format", "safetensors", "-o", "x"]
    thread = threading.Thread(target=lambda: ends.append(engine.run(words, Path("log"), 0)))
    thread.start()
    while not started():
        time.sleep(0.01)
    for process in started():
        process.kill()
    thread.join()
    assert ends == [Ended(None, "the worker was ended by SIGKILL")]


def test_memory_is_shared_and_what_never_fits_runs_alone():
    budget, seen = Budget(100), []
    most = [0]

    def job(wanted: int) -> None:
        with budget.of(wanted):
            seen.append(wanted)
            most[0] = max(most[0], budget.used if budget.holders > 1 else 0)
            time.sleep(0.02)

    threads = [threading.Thread(target=job, args=(wanted,)) for wanted in (60, 60, 40, 500, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [30, 40, 60, 60, 500]
    assert most[0] <= 100
    assert (budget.used, budget.holders) == (0, 0)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((0, 1), 1), ((1, 2), 2), ((2, 3), 3), ((3, 4), 4), ((5, 4), 5), ((5, 130), 130), ((), 0)],
)
def test_the_status_is_the_worst_of_the_jobs(statuses, expected):
    assert worst([Outcome("a", "a", "r", status=status) for status in statuses]) == expected


def test_xml_holds_whatever_a_message_says():
    outcomes = [Outcome("a<b>", "m", "r", status=3, message='<&"\x00\x1b[31m'), Outcome("c", "m", "r", status=1)]
    suite = ElementTree.fromstring(junit(outcomes, 1.0).partition("\n")[2])[0]
    assert [case.get("name") for case in suite] == ["a<b>", "c"]
    assert suite[0][0].get("message") == '<&"��[31m'
    assert totals(outcomes) == "1 a gate failed, 1 unreadable input"


@pytest.mark.slow
def test_a_local_ray_runs_the_same_jobs_and_survives_a_lost_worker(folder):
    ray = pytest.importorskip("ray")
    jobs = read_manifest(Path("m.yaml"))[:2]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        killer = threading.Thread(target=_kill_the_first, args=(Path("out/good-r.partial"),))
        killer.start()
        outcomes = batch(RayEngine("auto"), jobs, 2).run(quiet(jobs))
        killer.join()
    finally:
        ray.shutdown()
    assert [(each.job, each.status) for each in outcomes] == [("good-r", 0), ("broken-r", 3)]
    assert outcomes[0].attempts == 2


def _kill_the_first(partial: Path) -> None:
    """Kills the process that holds the lock of a run, once."""
    for _ in range(3000):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                held = [os.readlink(each) for each in (process / "fd").iterdir()]
            except OSError:
                continue
            if str(partial.resolve() / ".lock") in held and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
                return
        time.sleep(0.01)
