#!/usr/bin/env python3
"""Makes files wrong in every way and reads them: scripts/fuzz.py [FORMAT…] [--files 10000] [--processes 100].

Files of each format are damaged or put together wrongly (tests/hostile_files) and read by the library's functions and
by every command that reads such a file, in forked processes; with `--processes` so many for each command are whole
processes.
An answer within 5 s and 500 MB that is content or a clear refusal is right. A crash, a hang, an error that nobody
explains (status 5, but for what `verify` finds wrong) is a finding, and is kept in --keep. Writes
docs/measured/fuzz.json, unless --short, which takes a minute.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from measured import markdown, number, read_results, write_results  # noqa: E402

if TYPE_CHECKING:
    from tests.hostile_files.commands import Command
    from tests.hostile_files.readers import Reader

FORMATS = ("json", "zip", "safetensors", "gguf", "onnx", "yaml", "other")
SLOW_SECONDS, LOST_SECONDS = 5.0, 180.0
LARGEST = 500_000_000
PER_FORK = 100
SLOWER = 20
"""A reader that takes long gets so many times fewer files."""
A_BUG = "this is a bug of ours"
TIMED_OUT = "and was ended; give it more with --timeout"


def fuzz_table(results: dict[str, Any]) -> str:
    """A row for each format, and one for the commands as processes."""
    titles = ["files of", "readers", "files", "read", "refused"]
    titles += ["crashes", "hangs", "status 5", "memory", "slowest, s"]
    rows = []
    for name, each in results.items():
        found, taken = collections.Counter(each["findings"]), each["statuses"].get("0", 0)
        rows.append([
            "all, by processes" if name == "processes" else f"`{name}`", each["readers"], number(each["files"], 0),
            number(taken, 0), number(each["files"] - taken, 0),
            found["crash"], found["hang"], found["bug"], found["memory"], each["slowest_seconds"],
        ])  # fmt: skip
    return markdown(titles, rows)


@dataclass(frozen=True)
class Try:
    """A way to read a file: its name, how the file is written and made wrong, how it is read, its share of them."""

    name: str
    reader: Reader
    read: Callable[[Path], int]
    share: float = 1.0


@dataclass
class Count:
    """What came of one format's files."""

    readers: int
    files: int = 0
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "readers": self.readers, "files": self.files, "statuses": dict(sorted(self.statuses.items())),
            "findings": dict(self.findings), "slowest_seconds": round(self.slowest, 2),
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Of one file: a status, seconds, bytes that the process has grown by, and the text of an error."""

    number: int
    status: int
    seconds: float
    grown: int
    text: str

    @property
    def finding(self) -> str:
        if self.status < 0:
            return "hang" if self.status == -signal.SIGALRM else "crash"
        if self.status == 5 and (A_BUG in self.text or not _last_error(self.text)):
            return "bug"
        if self.status == 4 or self.grown > LARGEST:  # these files are small: what they claim is the file's fault
            return "memory"
        return "hang" if self.seconds > SLOW_SECONDS else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "formats", nargs="*", default=[], metavar="FORMAT", help=f"{', '.join(FORMATS)}; processes: these alone"
    )
    parser.add_argument("--files", type=int, default=10_000, help="of each format")
    parser.add_argument("--processes", type=int, default=0, help="of each command")
    parser.add_argument("--only", default="", help="readers whose name has this in it")
    parser.add_argument("--short", action="store_true", help="150 of each format, and by no reader that takes long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--no-record", action="store_true", help="leave docs/measured alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    if options.short:
        options.files, options.no_record = min(options.files, 150), True
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="compressor-fuzz-") as home:
        os.environ["COMPRESSOR_HOME"] = home
        for name in (name for name in options.formats or FORMATS if name != "processes"):
            results[name] = fuzz(name, options)
            _record(results, options)
        if options.processes:
            results["processes"] = fuzz_processes(options)
            _record(results, options)
    sys.exit(any(found["findings"] for found in results.values()))


def _record(results: dict[str, Any], options: argparse.Namespace) -> None:
    if not options.no_record:
        write_results("fuzz", read_results("fuzz") | results)


def tries_of(format: str, options: argparse.Namespace) -> list[Try]:
    """All that reads files of a format."""
    from tests.hostile_files.commands import COMMANDS
    from tests.hostile_files.readers import READERS

    found = [
        Try(name, reader, _called(reader)) for name, reader in READERS.items() if (reader.format or "other") == format
    ]
    for name, command in COMMANDS.items():
        if command.format == format and not (command.slow and options.short):
            found.append(Try(name, command.reader, _commanded(command.arguments), 1 / SLOWER if command.slow else 1.0))
    return [each for each in found if options.only in each.name]


def _called(reader: Reader) -> Callable[[Path], int]:
    def read(path: Path) -> int:
        from compressor.core.failures import explain

        try:
            reader.read(path)
        except BaseException as error:  # whatever it is: that it is explained is what is tried
            status, message = explain(error)
            print(f"Error: {message}" if status != 5 or A_BUG not in message else traceback.format_exc() + message)
            return status
        return 0

    return read


def _commanded(arguments: Callable[[Path], list[str]]) -> Callable[[Path], int]:
    def read(path: Path) -> int:
        from compressor.cli.commands import main

        try:
            main([*arguments(path), "--debug"])
        except SystemExit as ended:
            return int(ended.code or 0)
        raise AssertionError("main exits")

    return read


def fuzz(format: str, options: argparse.Namespace) -> dict[str, Any]:
    """Counts of one format; findings are written to the folder of findings."""
    tries = tries_of(format, options)
    count, began = Count(len(tries)), time.monotonic()
    total = sum(each.share for each in tries)
    for each in tries:
        n = max(1, round(options.files * each.share / total))
        with tempfile.TemporaryDirectory() as scratch:
            good = each.reader.write(Path(scratch))
            content = good.read_bytes()
            _warm(each, good)
            for answer in _answers(each, good, content, n, options.seed):
                _counted(count, each, answer, content, options.seed, options.keep)
    _show(format, count, began)
    return count.as_json()


def _show(name: str, count: Count, began: float) -> None:
    kinds = ", ".join(f"{n} × {kind}" for kind, n in count.kinds.most_common()) or "none"
    statuses = dict(sorted(count.statuses.items()))
    print(f"{name}: {count.files} files, statuses {statuses}, slowest {count.slowest:.2f} s, "
          f"{time.monotonic() - began:.0f} s; findings: {kinds}", flush=True)  # fmt: skip


def made(each: Try, content: bytes, number: int, seed: int) -> bytes:
    """The file of a number, the same each time."""
    return each.reader.wrong(content, random.Random(f"{seed}:{each.name}:{number}"))


def _warm(each: Try, good: Path) -> None:
    """What is imported on first use is not the file's; forks share it."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        if each.share == 1.0:
            each.read(good)


def _answers(each: Try, good: Path, content: bytes, n: int, seed: int) -> Iterator[Answer]:
    """One for each file; a fork that ends or hangs is followed by another that goes on after its file."""
    done = 0
    while done < n:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            os.setsid()
            try:
                _serve(each, good, content, range(done, min(n, done + PER_FORK)), seed, writing)
            except BaseException:  # of this script: what goes on after the fork is the parent's
                Path(good.parent, "fuzz-error.txt").write_text(traceback.format_exc())
                os._exit(99)
            os._exit(0)
        os.close(writing)
        began, waiting, ready = time.monotonic(), b"", True
        while ready:
            ready = bool(select.select([reading], [], [], LOST_SECONDS)[0])
            part = os.read(reading, 1 << 16) if ready else b""
            if not part:
                break
            *lines, waiting = (waiting + part).split(b"\n")
            for line in lines:
                yield Answer(**json.loads(line))
                done, began = done + 1, time.monotonic()
        os.close(reading)
        lost = not ready
        if lost:
            os.killpg(child, signal.SIGKILL)
        _, how = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(how)
        if code == 99:
            raise RuntimeError((good.parent / "fuzz-error.txt").read_text())
        if lost or code:
            yield Answer(
                done, -signal.SIGALRM if lost else min(code, -1), time.monotonic() - began, 0, f"ended by {code}"
            )
            done += 1


def _serve(each: Try, good: Path, content: bytes, numbers: range, seed: int, writing: int) -> None:
    """In a fork: reads its files, writes a line for each, and ends."""
    with tempfile.TemporaryFile() as printed, os.fdopen(writing, "w") as answers:
        for file in (1, 2):
            os.dup2(printed.fileno(), file)
        for number in numbers:
            good.write_bytes(made(each, content, number, seed))
            printed.seek(0)
            printed.truncate()
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _own_seconds()
            status = each.read(good)
            seconds = _own_seconds() - began
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            sys.stdout.flush()
            sys.stderr.flush()
            printed.seek(0)
            text = printed.read().decode(errors="replace")
            # Two lines that tell: where it was raised, and what the command says of it.
            answer = Answer(number, status, seconds, 1024 * grown, text[-6000:])
            print(json.dumps(vars(answer) | {"text": _last_error(answer.text) if not answer.finding else answer.text}),
                  file=answers, flush=True)  # fmt: skip


def _own_seconds() -> float:
    """A clock that stands while others have the processor: a busy machine makes no file slow."""
    try:
        waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        waited = 0.0
    return time.monotonic() - waited


def _last_error(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.startswith("Error")), "")


def _counted(count: Count, each: Try, answer: Answer, content: bytes, seed: int, keep: Path) -> None:
    count.files += 1
    count.statuses[str(answer.status)] += 1
    count.slowest = max(count.slowest, answer.seconds)
    # A file that is right after all, whose command did what it does, to the end or to the limit that it was given.
    at_work = each.share < 1 and (answer.status == 0 or TIMED_OUT in answer.text)
    if not answer.finding or (at_work and answer.finding == ("memory" if answer.status else "hang")):
        return
    count.findings[answer.finding] += 1
    kind = f"{answer.finding} of {each.name}{_place(answer.text)}"
    count.kinds[kind] += 1
    if count.kinds[kind] <= 2:
        keep.mkdir(exist_ok=True)
        stem = f"{each.name.replace(' ', '-')}-{answer.number}"
        (keep / f"{stem}.bin").write_bytes(made(each, content, answer.number, seed))
        (keep / f"{stem}.txt").write_text(f"{kind}\n{answer.seconds:.1f} s\n{answer.text}")


def _place(text: str) -> str:
    """The last line of the package in a traceback, and the kind of error."""
    lines = [line.strip() for line in text.splitlines()]
    within = [line for line in lines if line.startswith("File ") and "/compressor/" in line]
    if not within:
        return ""
    file, line = within[-1].split(",")[:2]
    return f" at {Path(file.strip('File ').strip(chr(34))).name}:{line.removeprefix(' line ')}"


def fuzz_processes(options: argparse.Namespace) -> dict[str, Any]:
    """Each command as a process, so many times; several commands at once."""
    from tests.hostile_files.commands import COMMANDS

    chosen = {name: command for name, command in COMMANDS.items() if options.only in name}
    count, began = Count(len(chosen)), time.monotonic()

    def answers(name: str, command: Command, good: Path) -> tuple[Try, bytes, list[Answer]]:
        each, content, found = Try(name, command.reader, lambda path: 0), good.read_bytes(), []
        for n in range(options.processes):
            good.write_bytes(made(each, content, n, options.seed + 1))
            found.append(_process(n, command.arguments(good)))
        return each, content, found

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as threads:
        folders = {name: Path(scratch, str(at)) for at, name in enumerate(chosen)}
        for folder in folders.values():
            folder.mkdir()
        written = {name: command.reader.write(folders[name]) for name, command in chosen.items()}
        waiting = [threads.submit(answers, name, command, written[name]) for name, command in chosen.items()]
        for each, content, found in (done.result() for done in waiting):
            for answer in found:
                _counted(count, each, answer, content, options.seed + 1, options.keep)
            print(f"{each.name}: {dict(collections.Counter(answer.status for answer in found))}", flush=True)
    _show("processes", count, began)
    return count.as_json()


def _process(number: int, arguments: list[str], again: bool = True) -> Answer:
    began = time.monotonic()
    line = [sys.executable, "-P", "-m", "compressor", *arguments]
    try:
        found = subprocess.run(line, capture_output=True, timeout=LOST_SECONDS, start_new_session=True)
    except subprocess.TimeoutExpired:
        if again:  # the machine may have stood still, which is not the file's fault
            return _process(number, arguments, again=False)
        return Answer(number, -signal.SIGALRM, time.monotonic() - began, 0, "no end")
    text = _last_error(found.stderr.decode(errors="replace"))
    # Starting Python and importing torch takes its time whatever the file: a hang is what ends at the limit alone.
    return Answer(number, found.returncode, min(time.monotonic() - began, SLOW_SECONDS), 0, text)


if __name__ == "__main__":
    main()
