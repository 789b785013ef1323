#!/usr/bin/env python3
"""Runs commands under limits of memory: each is done (status 0) or says that memory is too little (4), never else.

scripts/check_memory.py [--limits 16] [--only pico wide] [--short]. Of two networks: a run from nothing, a --resume of
one that was killed in the middle, and the commands on an artifact, each at limits of address space (`ulimit -v`) from
less than Python's libraries take to what a run takes. What a run had finished is there after a --resume that failed,
byte by byte, and a --resume without a limit then gives the bytes of an undisturbed run. Writes
docs/measured/shortage.json.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from check_kills import RECIPE, digests  # noqa: E402
from measured import markdown, read_results, write_results  # noqa: E402

RUN = ("run", "llama", "--recipe", "recipe.yaml", "--data", "calibration.txt", "--eval", "evaluation.txt")
READING = {
    "run --dry-run": (*RUN, "--dry-run"), "inspect": ("inspect", "whole"), "verify": ("verify", "whole"),
    "eval": ("eval", "whole", "--data", "evaluation.txt"), "bench": ("bench", "whole"),
    "diff": ("diff", "whole", "whole"),
    "generate": ("generate", "whole", "the river"), "report": ("report", "whole"),
}  # fmt: skip
"""Commands that leave models and weights as they are."""
NETWORKS = {"pico": {}, "wide": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6}}
"""What is other than in tests/pico.py; `wide` has the widths of SmolLM2-135M, and a fifth of its layers."""
LEAST, MOST = 50_000_000, 4_000_000_000
HUNG_SECONDS = 300
SHORT = 5


def shortage_table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each network and kind of command."""
    titles = ["network", "command", "limits, MB", "done", "status 4", "other ends", "work lost"]
    rows = [
        [name, kind, f"{each['limits_mb'][0]:,}–{each['limits_mb'][-1]:,}", each["done"], each["refused"],
         each["other"], each["lost"]]
        for name, kinds in results.items() for kind, each in kinds.items()
    ]  # fmt: skip
    return markdown(titles, rows)


def limits(n: int, least: int = LEAST, most: int = MOST) -> list[int]:
    """Bytes: half of them below 1.6 GB, where libraries load and networks begin to fit."""
    edge, lower = 1_600_000_000, max(1, n * 3 // 4)
    below = [least + (edge - least) * i // lower for i in range(lower)]
    return below + [edge + (most - edge) * (i + 1) // max(1, n - lower) for i in range(n - lower)]


def command(folder: Path, words: Sequence[str], limit: int | None = None) -> tuple[int, str]:
    """Exit status and last line of a command, the status None's stand-in -1 where it did not end."""
    with (folder / "printed.txt").open("w+", encoding="utf-8", errors="replace") as printed:
        process = start(folder, words, limit, printed.fileno())
        try:
            status = process.wait(HUNG_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = -1
        printed.seek(0)
        lines = printed.read().strip().splitlines()
    return status, lines[-1] if lines else ""


def start(folder: Path, words: Sequence[str], limit: int | None, output: int) -> subprocess.Popen[bytes]:
    home = str(folder / "home")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COMPRESSOR_HOME": home}
    limited = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "compressor", *words], cwd=folder, env=environment, stdout=output,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=limited,
    )  # fmt: skip


def interrupted(folder: Path) -> None:
    """Leaves `begun.partial` with at least one block that is finished, and without the process that made it."""
    blocks = folder / "begun.partial" / "work"
    process = start(folder, [*RUN, "-o", "begun"], None, subprocess.DEVNULL)
    while process.poll() is None and not list(blocks.glob("model.layers.1*")):
        time.sleep(0.01)
    if process.poll() is not None:
        raise SystemExit("the run was done before it could be killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished(partial: Path) -> dict[str, str]:
    """The blocks that a run need not make again, by their digests."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((partial / "work").glob("model.*.safetensors"))
    }


def from_nothing(folder: Path, limit: int) -> tuple[int, str, bool]:
    """Status and last line of a run, and whether what it left is lost to the run after it."""
    status, said = command(folder, [*RUN, "-o", "out"], limit)
    resumable = (folder / "out.partial" / "work" / "run.json").exists()
    lost = status != 0 and resumable and command(folder, [*RUN, "-o", "out", "--resume"])[0] != 0
    lost |= (status == 0 or resumable) and digests(folder / "out") != digests(folder / "whole")
    return status, said, lost


def resumed(folder: Path, limit: int) -> tuple[int, str, bool]:
    """The same of a --resume of what `interrupted` left."""
    shutil.copytree(folder / "begun.partial", folder / "out.partial")
    (folder / "out.partial" / ".lock").unlink(missing_ok=True)
    before = finished(folder / "out.partial")
    status, said = command(folder, [*RUN, "-o", "out", "--resume"], limit)
    if status:
        kept = finished(folder / "out.partial")
        if any(kept.get(name) != digest for name, digest in before.items()):
            return status, said, True
        if command(folder, [*RUN, "-o", "out", "--resume"])[0]:
            return status, said, True
    return status, said, digests(folder / "out") != digests(folder / "whole")


def on_artifacts(words: Sequence[str]) -> Callable[[Path, int], tuple[int, str, bool]]:
    def one(folder: Path, limit: int) -> tuple[int, str, bool]:
        before = digests(folder / "whole")
        status, said = command(folder, words, limit)
        return status, said, digests(folder / "whole") != before

    return one


def checked(folder: Path, kind: str, one: Callable[[Path, int], tuple[int, str, bool]], at: list[int]) -> dict:
    """What came of one kind of command at each limit; each that ends otherwise is printed with what it said."""
    ends: Counter[str] = Counter()
    for limit in at:
        status, said, lost = one(folder, limit)
        ends.update({0: ["done"], 4: ["refused"]}.get(status, ["other"]) + ["lost"] * lost)
        if status not in (0, 4) or lost:
            print(f"{kind} at {limit / 1e6:.0f} MB: status {status}{', WORK LOST' * lost}: {said}", flush=True)
        for name in ("out", "out.partial", "out.failed"):
            shutil.rmtree(folder / name, ignore_errors=True)
    found = {name: ends[name] for name in ("done", "refused", "other", "lost")}
    print(f"{kind}: {found}", flush=True)
    return {"limits_mb": [round(limit / 1e6) for limit in at], **found}


def prepare(folder: Path, more: dict[str, int]) -> None:
    """A network, its data, an artifact of it, and an interrupted run."""
    import transformers

    from tests import pico

    config = transformers.AutoConfig.from_pretrained(pico.llama(folder / "llama"))
    if more:
        config.update({**more, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "layer_types": None})
        pico.saved(config, transformers.LlamaForCausalLM, folder / "llama")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "calibration.txt").write_text(pico.text(1))
    (folder / "evaluation.txt").write_text(pico.text(2))
    status, said = command(folder, [*RUN, "-o", "whole"])
    if status:
        raise SystemExit(f"without a limit: status {status}: {said}")
    interrupted(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--short", action="store_true", help="the small network at a few limits, nothing recorded")
    options = parser.parse_args()
    at = limits(SHORT if options.short else options.limits)
    results: dict[str, dict[str, Any]] = {}
    for name in options.only[: 1 if options.short else None]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            prepare(folder, NETWORKS[name])
            kinds = {"run": from_nothing, "run --resume": resumed}
            results[name] = {kind: checked(folder, kind, one, at) for kind, one in kinds.items()}
            for kind, words in READING.items() if name == "pico" else ():
                results[name][kind] = checked(folder, kind, on_artifacts(words), at[::2])
        if not options.short:
            write_results("shortage", read_results("shortage") | results)
    sys.exit(any(each["other"] or each["lost"] for kinds in results.values() for each in kinds.values()))


if __name__ == "__main__":
    main()
