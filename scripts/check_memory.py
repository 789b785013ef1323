#!/usr/bin/env python3
"""Runs commands under limits of memory: each is done (status 0) or says that memory is too little (4), never else.

scripts/check_memory.py [--limits 16] [--only pico cnn wide] [--short]. Of some networks: a run from nothing, a --resume
of one that was killed in the middle, and the commands on an artifact, each at limits of address space (`ulimit -v`)
from less than Python's libraries take to what a run takes. What a run had finished is there after a --resume that
failed, byte by byte, and a --resume without a limit then gives the bytes of an undisturbed run. Writes
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from check_kills import RECIPE, digests  # noqa: E402
from measured import markdown, read_results, write_results  # noqa: E402

TEXTS = ("--data", "calibration.txt", "--eval", "evaluation.txt")
ARRAYS = ("--data", "calibration.npz", "--eval", "evaluation.npz")
CODE = ("--arch", "tests.pico:ResNet")


@dataclass(frozen=True)
class Network:
    """What is compressed: the words of a run, what is other than in tests/pico.py, and the commands on its artifact.

    A network of blocks `resumes` where one of them is done.
    """

    run: tuple[str, ...]
    more: dict[str, int] = field(default_factory=dict)
    reading: dict[str, tuple[str, ...]] = field(default_factory=dict)
    resumes: bool = True


LLAMA = ("run", "llama", "--recipe", "recipe.yaml", *TEXTS)
CNN = ("run", "cnn.pt", "--recipe", "cnn.yaml", *CODE, *ARRAYS)
ALWAYS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "whole"), "bench": ("bench", "whole"), "diff": ("diff", "whole", "whole"),
    "report": ("report", "whole"),
}  # fmt: skip
"""Commands that leave models and weights as they are, on an artifact of any network."""
NETWORKS = {
    "pico": Network(LLAMA, reading={
        "run --dry-run": (*LLAMA, "--dry-run"), "verify": ("verify", "whole"),
        "eval": ("eval", "whole", "--data", "evaluation.txt"), "generate": ("generate", "whole", "the river"), **ALWAYS,
    }),
    "cnn": Network(CNN, resumes=False, reading={
        "run --dry-run": (*CNN, "--dry-run"), "verify": ("verify", "whole", *CODE),
        "eval": ("eval", "whole", "--data", "evaluation.npz", *CODE), **ALWAYS,
    }),
    "wide": Network(LLAMA, {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6}),
}  # fmt: skip
"""`wide` has the widths of SmolLM2-135M, and a fifth of its layers."""
CNN_RECIPE = """
passes: [{pass: affine, method: rtn, bits: 4, group: 16}]
evaluation: {samples: 8, speed: false}
"""
Tried = Callable[[Path, int], tuple[int, str, bool]]
"""Of a folder and a limit: the status and the last line of a command, and whether finished work is lost."""
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


def interrupted(folder: Path, words: Sequence[str]) -> None:
    """Leaves `begun.partial` with at least one block that is finished, and without the process that made it."""
    blocks = folder / "begun.partial" / "work"
    process = start(folder, [*words, "-o", "begun"], None, subprocess.DEVNULL)
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


def from_nothing(words: Sequence[str]) -> Tried:
    """A run."""

    def one(folder: Path, limit: int) -> tuple[int, str, bool]:
        status, said = command(folder, [*words, "-o", "out"], limit)
        resumable = (folder / "out.partial" / "work" / "run.json").exists()
        lost = status != 0 and resumable and command(folder, [*words, "-o", "out", "--resume"])[0] != 0
        lost |= (status == 0 or resumable) and digests(folder / "out") != digests(folder / "whole")
        return status, said, lost

    return one


def resumed(words: Sequence[str]) -> Tried:
    """A --resume of what `interrupted` left."""

    def one(folder: Path, limit: int) -> tuple[int, str, bool]:
        shutil.copytree(folder / "begun.partial", folder / "out.partial")
        (folder / "out.partial" / ".lock").unlink(missing_ok=True)
        before = finished(folder / "out.partial")
        status, said = command(folder, [*words, "-o", "out", "--resume"], limit)
        if status:
            kept = finished(folder / "out.partial")
            if any(kept.get(name) != digest for name, digest in before.items()):
                return status, said, True
            if command(folder, [*words, "-o", "out", "--resume"])[0]:
                return status, said, True
        return status, said, digests(folder / "out") != digests(folder / "whole")

    return one


def on_artifacts(words: Sequence[str]) -> Tried:
    def one(folder: Path, limit: int) -> tuple[int, str, bool]:
        before = digests(folder / "whole")
        status, said = command(folder, words, limit)
        return status, said, digests(folder / "whole") != before

    return one


def checked(folder: Path, kind: str, one: Tried, at: list[int]) -> dict:
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


def prepare(folder: Path, network: Network) -> None:
    """A network, its data, an artifact of it, and where it has blocks an interrupted run."""
    import numpy as np
    import transformers

    from tests import pico

    if network.run == LLAMA:
        config = transformers.AutoConfig.from_pretrained(pico.llama(folder / "llama"))
        if network.more:
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "layer_types": None}
            config.update({**network.more, **heads})
            pico.saved(config, transformers.LlamaForCausalLM, folder / "llama")
    else:
        pico.write_state_dict(pico.ResNet, folder / "cnn.pt")
    generator = np.random.default_rng(0)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "cnn.yaml").write_text(CNN_RECIPE)
    for number, part in enumerate(("calibration", "evaluation"), 1):
        (folder / f"{part}.txt").write_text(pico.text(number))
        np.savez(folder / f"{part}.npz", input=generator.standard_normal((16, 3, 12, 12)).astype("f4"))
    status, said = command(folder, [*network.run, "-o", "whole"])
    if status:
        raise SystemExit(f"without a limit: status {status}: {said}")
    if network.resumes:
        interrupted(folder, network.run)


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
            network = NETWORKS[name]
            prepare(folder, network)
            kinds = {"run": from_nothing(network.run)}
            kinds |= {"run --resume": resumed(network.run)} if network.resumes else {}
            results[name] = {kind: checked(folder, kind, one, at) for kind, one in kinds.items()}
            for kind, words in network.reading.items():
                results[name][kind] = checked(folder, kind, on_artifacts(words), at[::2])
        if not options.short:
            write_results("shortage", read_results("shortage") | results)
    sys.exit(any(each["other"] or each["lost"] for kinds in results.values() for each in kinds.values()))


if __name__ == "__main__":
    main()
