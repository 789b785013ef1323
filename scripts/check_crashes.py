#!/usr/bin/env python3
"""Ends runs at every step that changes the disk, and checks what each leaves and what the next command makes of it.

scripts/check_crashes.py [--only fresh resume force batch batch-force] [--rotate] [--short] [--audit]. Of a fresh run,
a resumed one, one that replaces an artifact by --force, and a batch of two models, all on a network of a few thousand
weights. After each end, whatever has the artifact's name is whole, old or new; then the next command is given: the same
again, with --resume and with --force, each from the very state that was left. Writes docs/measured/crashes.json.
--audit runs a run under strace and tells what of the disk it changes beside what is counted here.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from crashing import Crash, Step, crashes, run_child, steps_of  # noqa: E402
from measured import markdown, read_results, write_results  # noqa: E402

MADE_AGAIN = ("compression.json", "report.html", "README.md")
RECIPE = """
passes: [{pass: affine, method: rtn, bits: 4, group: 16}]
embeddings: {bits: 4, group: 16}
calibration: {tokens: 64, window: 32}
evaluation: {tokens: 0, speed: false}
"""
MANIFEST = "recipe: r.yaml\nmodels: [first.pt, second.pt]\narch: tests.pico:Tied\nformat: safetensors\n"
RUN = ("run", "llama", "--recipe", "r.yaml", "-o", "out", "--data", "data.txt", "--eval", "evaluation.txt")
TIED = ("run", "first.pt", "-r", "r.yaml", "--arch", "tests.pico:Tied", "-o", "x", "--format", "safetensors")
BATCH = ("batch", "m.yaml", "-o", "out", "--trust-recipe", "-j", "1")
SHORT = 41
"""One crash in so many."""
HOLDS = "holds an artifact already"
BATCH_HOLDS = "of these 2 artifacts already, as"
NOTHING = "no interrupted run to resume"


@dataclass
class Scenario:
    """A command that is ended, the folder that it starts in, and the words that the next command may add.

    refused    what a next command may say instead of finishing, and only where an artifact is there and whole
    """

    name: str
    words: tuple[str, ...]
    next: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...] = ("out",)
    start: Callable[[Path], None] = lambda folder: None
    refused: str = HOLDS
    failures: list[str] = field(default_factory=list)
    n_steps: int = 0
    n_crashes: int = 0
    n_commands: int = 0


def command(*words: str) -> Callable[[], int]:
    """`compress` with these words, in this process; a batch's workers are forked, and die with it."""

    def work() -> int:
        import compressor.runtime.workers as workers
        from compressor.cli.commands import _status

        workers.LocalEngine = _Forking
        return _status(list(words))

    return work


class _Forking:
    """An engine whose workers are forked from this process, and of its group."""

    def __init__(self, timeout: float | None = None) -> None:
        pass

    def predict(self, command: Any) -> tuple[int, None]:
        return 0, None

    def run(self, words: Any, log: Path, memory: int) -> Any:
        from compressor.cli.commands import _status
        from compressor.runtime.workers import ended

        child = os.fork()
        if child == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            status = 99
            try:
                status = _status(list(words))
                sys.stderr.flush()
            finally:
                os._exit(status)
        return ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log)

    def stop(self) -> None:
        pass


def make_lab(lab: Path) -> None:
    """The networks and recipes that every scenario starts with."""
    import transformers

    from tests import pico

    config = transformers.LlamaConfig(
        vocab_size=pico.VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pico.saved(config, transformers.LlamaForCausalLM, lab / "llama")
    pico.write_state_dict(pico.Tied, lab / "first.pt")
    pico.write_state_dict(pico.Tied, lab / "second.pt")
    (lab / "data.txt").write_text(pico.text(1, 300))
    (lab / "evaluation.txt").write_text(pico.text(2, 300))
    (lab / "r.yaml").write_text(RECIPE)
    (lab / "m.yaml").write_text(MANIFEST)


def digests(directory: Path) -> dict[str, str] | None:
    """Of an artifact's files; None where there is none."""
    if not directory.exists():
        return None
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in MADE_AGAIN]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_whole(directory: Path) -> bool:
    """Whether everything that compression.json names is there as it says."""
    from compressor.core.artifact import Artifact, damaged_files, foreign_files, is_artifact

    return is_artifact(directory) and not damaged_files(Artifact.open(directory)) and not foreign_files(directory)


def check(scenario: Scenario, lab: Path, folder: Path, every: int = 1, rotate: bool = False) -> None:
    """Every crash of a scenario, or one in `every`; with `rotate` one next command for each, in turn."""
    template = folder / f"{scenario.name}-template"
    shutil.copytree(lab, template, symlinks=True)
    scenario.start(template)
    undisturbed = folder / f"{scenario.name}-undisturbed"
    shutil.copytree(template, undisturbed)
    steps, status, printed = steps_of(command(*scenario.words), undisturbed)
    if status != 0:
        sys.exit(f"{scenario.name}: an undisturbed command ended by {status}\n{printed}")
    scenario.n_steps = len(steps)
    wanted = {name: digests(undisturbed / name) for name in scenario.outputs}
    old = {name: digests(template / name) for name in scenario.outputs}
    names = sorted(path.name for path in undisturbed.iterdir())
    for number, crash in enumerate(crashes(steps)[::every]):
        nexts = (scenario.next[number % len(scenario.next)],) if rotate else scenario.next
        _check_one(scenario, template, folder, steps, crash, nexts, wanted, old, names)
        if number % 50 == 49:
            print(f"{scenario.name}: {number + 1} of {len(crashes(steps)[::every])}", flush=True)


def _check_one(
    scenario: Scenario, template: Path, folder: Path, steps: list[Step], crash: Crash,
    nexts: tuple[tuple[str, ...], ...], wanted: dict, old: dict, names: list[str],
) -> None:  # fmt: skip
    crashed = folder / "crashed"
    shutil.copytree(template, crashed)
    status, printed = run_child(command(*scenario.words), crashed, crash)
    scenario.n_crashes += 1

    def wrong(what: str, text: str = "") -> None:
        scenario.failures.append(f"{crash} ({steps[crash.number]}): {what}")
        print(f"{scenario.name}: {scenario.failures[-1]}\n{text}", flush=True)

    if status is not None:
        wrong(f"did not die, status {status}", printed)
    for name in scenario.outputs:
        found = digests(crashed / name)
        if found not in (wanted[name], old[name]) or (found is not None and not is_whole(crashed / name)):
            wrong(f"{name} is neither the old artifact nor the new one")
    left_nothing = not any(path.name.endswith(".partial") for path in crashed.rglob("*"))
    for more in nexts:
        again = folder / "again"
        shutil.copytree(crashed, again)
        status, printed = run_child(command(*scenario.words, *more), again)
        scenario.n_commands += 1
        there = [again / name for name in scenario.outputs if (again / name).exists()]
        whole = all(is_whole(output) for output in there)
        new = all(digests(again / name) == wanted[name] for name in scenario.outputs)
        words = " ".join(more) or "the same command"
        if status == 2 and there and whole and scenario.refused in printed and "--force" not in more:
            pass  # it is there, old or new, and is said to be
        elif status == 2 and NOTHING in printed and "--resume" in more and left_nothing:
            pass  # and nothing was left to resume
        elif status != 0:
            wrong(f"then {words} ends by {status}", printed)
        elif not (whole and new and len(there) == len(scenario.outputs)):
            wrong(f"then {words} gives another artifact", printed)
        elif sorted(path.name for path in again.iterdir()) != names:
            wrong(f"then {words} leaves {sorted(path.name for path in again.iterdir())}", printed)
        shutil.rmtree(again)
    shutil.rmtree(crashed)


def interrupted(folder: Path) -> None:
    """A run that was ended when its first block was done."""
    steps, _, _ = steps_of(command(*RUN), _copy(folder))
    at = next(step.number for step in steps if step.kind == "replace" and "layers.0" in step.path) + 2
    run_child(command(*RUN), folder, Crash(at))


def _copy(folder: Path) -> Path:
    copy = folder.with_name(f"{folder.name}-copy")
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(folder, copy))


def replaced(folder: Path) -> None:
    """An artifact of another recipe in the output's place, and one that had missed a gate."""
    status, printed = run_child(command(*RUN, "--set", "affine.bits=8"), folder)
    assert status == 0, printed
    status, printed = run_child(command(*RUN, "--force", "--set", "gates.max_size=1kB"), folder)
    assert status == 1, printed


def replaced_batch(folder: Path) -> None:
    """Artifacts of another batch."""
    status, printed = run_child(command("batch", "m.yaml", "-o", "out", "--trust-recipe", "-j", "1"), folder)
    assert status == 0, printed


def scenarios() -> dict[str, Scenario]:
    """By name: what is ended."""
    jobs = ("out/first-r", "out/second-r")
    found = [
        Scenario("fresh", RUN, ((), ("--resume",), ("--force",))),
        Scenario("resume", (*RUN, "--resume"), ((), ("--force",)), start=interrupted),
        Scenario("force", (*RUN, "--force"), ((), ("--resume",)), start=replaced),
        Scenario("batch", BATCH, ((), ("--resume",), ("--force",)), jobs, refused=BATCH_HOLDS),
        Scenario("batch-force", (*BATCH, "--force"), ((), ("--resume",)), jobs, replaced_batch, BATCH_HOLDS),
    ]
    return {scenario.name: scenario for scenario in found}


def warm(lab: Path, folder: Path) -> None:
    """Imports what a run needs, by one in this process."""
    from compressor.cli.commands import _status

    before, copy = Path.cwd(), Path(shutil.copytree(lab, folder / "warm"))
    os.chdir(copy)
    try:
        for words in (RUN, TIED):
            if _status(list(words)):
                sys.exit("the network of this script cannot be compressed")
        import compressor.batch.jobs  # noqa: F401

        gc.collect()
        gc.freeze()  # a collection in a child would copy all of it
    finally:
        os.chdir(before)


_CALLS = (
    "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "link", "symlink",
    "ftruncate", "fsync", "fdatasync", "openat", "write", "pwrite64", "writev", "sendfile", "copy_file_range",
)  # fmt: skip
_CALL = re.compile(rf"^(?:\d+ +)?({'|'.join(_CALLS)})\((.*)\) += \d+")
_WRITES = re.compile("O_(WRONLY|RDWR|CREAT|TRUNC)")


def audit(lab: Path, folder: Path) -> dict[str, int]:
    """System calls of a whole run that change the lab's disk, and how many steps are counted for them, by kind."""
    copy, log = Path(shutil.copytree(lab, folder / "audited")), folder / "strace.log"
    steps, _, _ = steps_of(command(*RUN), Path(shutil.copytree(lab, folder / "counted")))
    words = ["strace", "-f", "-y", "-s", "256", "-o", str(log), "-e", f"trace={','.join(_CALLS)}"]
    words += [sys.executable, "-P", "-m", "compressor", *RUN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=copy, env=environment, check=True, capture_output=True)
    found: dict[str, int] = {}
    for line in log.read_text(errors="replace").splitlines():
        match = _CALL.match(line)
        of_the_output = match is not None and (f"{copy}/out" in match[2] or '"out' in match[2])
        if match is None or not of_the_output or (match[1] == "openat" and not _WRITES.search(match[2])):
            continue
        found[f"system calls: {match[1]}"] = found.get(f"system calls: {match[1]}", 0) + 1
    for step in steps:
        found[f"counted: {step.kind}"] = found.get(f"counted: {step.kind}", 0) + 1
    return dict(sorted(found.items()))


def crashes_table(results: dict[str, Any]) -> str:
    """What came of the crashes, a row per kind of command."""
    rows = [[name, entry["steps"], entry["crashes"], entry["commands"], entry["failures"]]
            for name, entry in results["scenarios"].items()]  # fmt: skip
    return markdown(["command", "steps", "crashes", "next commands", "failures"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(scenarios()), default=list(scenarios()))
    parser.add_argument("--every", type=int, default=1, help="one crash in so many")
    parser.add_argument("--rotate", action="store_true", help="one next command after each crash, in turn, not all")
    parser.add_argument("--short", action="store_true", help="a few of each, for a test; one next command after each")
    parser.add_argument("--audit", action="store_true", help="compare with strace, and stop")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, lab = Path(scratch), Path(scratch) / "lab"
        os.environ["COMPRESSOR_HOME"] = str(folder / "home")
        lab.mkdir()
        make_lab(lab)
        warm(lab, folder)
        if arguments.audit:
            print("\n".join(f"{kind}: {n}" for kind, n in audit(lab, folder).items()))
            return
        results = {} if arguments.short else read_results("crashes")
        results.setdefault("scenarios", {})
        for name in arguments.only:
            scenario, began = scenarios()[name], time.monotonic()
            rotate = arguments.rotate or arguments.short
            check(scenario, lab, folder, SHORT if arguments.short else arguments.every, rotate)
            found = {"crashes": scenario.n_crashes, "commands": scenario.n_commands, "failures": len(scenario.failures)}
            results["scenarios"][name] = (
                {"steps": scenario.n_steps} | found | {"seconds": round(time.monotonic() - began)}
            )
            print(name, results["scenarios"][name], flush=True)
            if arguments.every == 1 and not arguments.short:
                write_results("crashes", results)
    sys.exit(any(entry["failures"] for entry in results["scenarios"].values()))


if __name__ == "__main__":
    main()
