"""Which run it is: everything that the bytes of an artifact come from, and how two runs differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from compressor.core.options import Format, Mode

_SHOWN = 5
"""Differences that are told one by one."""
_LONGEST = 40


class Targets(BaseModel):
    """What the options asked for beside the recipe: bytes of all files, a share of multiplications, a loss; seconds of
    a run or times the original's speed, with so many threads and examples."""

    model_config = ConfigDict(frozen=True)
    size: int | None = None
    flops: float | None = None
    loss: float | None = None
    latency: float | None = None
    speedup: float | None = None
    threads: int | None = None
    batch: int = 1


class Identity(BaseModel):
    """One run. Two with the same identity write the same bytes.

    model      SHA-256 of the weight files together, of the config and of each file of the tokenizer
    arch       the function that returns the network, where one was named; its code is not looked at
    recipe     as it was asked for, every setting spelt out
    data       SHA-256 of what is learned from and judged by
    targets    what else the options asked for
    threads    of torch: sums in another order round otherwise
    device     the product that blocks were computed with: `cpu`, or the name of a GPU, which rounds otherwise
    versions   of this package and of those that compute
    """

    model_config = ConfigDict(frozen=True)
    model: dict[str, str]
    arch: str | None = None
    recipe: dict[str, Any]
    seed: int
    data: dict[str, str | None]
    mode: Mode
    format: Format
    targets: Targets = Targets()
    threads: int
    device: str = "cpu"
    versions: dict[str, str]

    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def differences(self, earlier: Identity) -> list[str]:
        """What is not as in an earlier run, each with both values in short."""
        here, there = dict(_leaves(self.model_dump())), dict(_leaves(earlier.model_dump()))
        names = [*here, *(name for name in there if name not in here)]
        return [
            f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
            for name in names
            if here.get(name) != there.get(name)
        ]

    def difference(self, earlier: Identity) -> str:
        """The same as a sentence; empty where nothing differs."""
        found = self.differences(earlier)
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        return ", ".join([*found[:_SHOWN], *more])


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of everything in nested dicts and lists; what is empty is a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        yield name, value
    for key, item in inner:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:8]}…"
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
