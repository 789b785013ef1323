"""What the benchmarks share: the protocol's sets of windows, results in docs/measured, tables in Markdown."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from material import ROOT, cache, evaluation_windows

from compressor.evaluate.session import open_session

MEASURED = ROOT / "docs" / "measured"
SETS = {"moby_8": ("moby", 8), "sotu_8": ("sotu", 8), "moby_64": ("moby", 64), "sotu_64": ("sotu", 64)}
"""Name of a figure -> text and number of windows of 512 tokens."""
KINDS = {f"{name}_8": (name, 8) for name in ("policy", "foldoc", "mail", "code")}
"""Of other kinds of text than what recipes calibrate on, in the same form."""
PROTOCOL = ("moby_8", "sotu_8")


def set_windows(name: str, tokenizer: Path | None = None) -> np.ndarray:
    """The windows (n, 512) of one of SETS or KINDS, by SmolLM2's tokenizer if no other is given."""
    text, n = (SETS | KINDS)[name]
    return evaluation_windows(text, tokenizer, n=n)


def read_results(name: str) -> dict[str, Any]:
    """docs/measured/`name`.json; empty where nothing has been measured."""
    path = MEASURED / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_picture(name: str, svg: str) -> None:
    """docs/measured/`name`.svg."""
    (MEASURED / f"{name}.svg").write_text(svg)


def write_results(name: str, results: dict[str, Any]) -> None:
    """Writes it whole or not at all."""
    MEASURED.mkdir(parents=True, exist_ok=True)
    path = MEASURED / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column is aligned left, all others right. None is a dash."""
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)]]
    lines += [["–" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 1) -> str | None:
    """With thousands separated; large ones without a fraction."""
    if value is None:
        return None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.{digits}f}"


def interleaved(
    artifacts: Mapping[str, Path], inputs: dict[str, np.ndarray], threads: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each artifact's runs in onnxruntime, one after the other, so that all meet the same machine."""
    sessions = {name: open_session(path, threads) for name, path in artifacts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for repeat in range(repeats + 3):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(inputs)
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def cached(name: str) -> Path:
    """A folder of the cache for what benchmarks keep between runs."""
    folder = cache() / "bench" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
