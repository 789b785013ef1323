"""Sizes, shares and times as people write and read them: 60MB, 1.5 GiB, 5 %, 12 min."""

from __future__ import annotations

import re

from compressor.core.errors import UsageError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_SECONDS = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str, option: str) -> int:
    """Bytes: 60MB is 60,000,000, 60MiB is 60 · 2²⁰, a bare number is bytes.

    Raises:
        UsageError: It is no size; `option` names it.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) == 0:
        raise UsageError(f"{option}: '{text}' is no size; write 60MB, 1.5GB, 60MiB, or bytes")
    return round(float(found[1]) * unit)


def parse_share(text: str, option: str) -> float:
    """A share above 0 and below 1: 5% and .05 are the same.

    Raises:
        UsageError: It is no such share; `option` names it.
    """
    found = re.fullmatch(r"(\d*\.?\d+)\s*(%?)", text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < share < 1:
        raise UsageError(f"{option}: '{text}' is no share above 0 and below 1; write 5% or .05")
    return share


def parse_duration(text: str, option: str) -> float:
    """Seconds: 90 and 90s are the same, 30min, 2h, 1.5 h.

    Raises:
        UsageError: It is no time; `option` names it.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _SECONDS.get(found[2].lower()) if found else None
    if found is None or unit is None or not 0 < float(found[1]) * unit < 1e9:
        raise UsageError(f"{option}: '{text}' is no time; write 30min, 2h, or seconds")
    return float(found[1]) * unit


def parse_latency(text: str, option: str) -> float:
    """Seconds: 5ms, 800us, .005s.

    Raises:
        UsageError: It is no such time, or says no unit; `option` names it.
    """
    found = re.fullmatch(r"(\d*\.?\d+)\s*(s|ms|us|µs)", text.strip())
    seconds = float(found[1]) * {"s": 1.0, "ms": 1e-3}.get(found[2], 1e-6) if found else 0.0
    if not 0 < seconds < 1e6:
        raise UsageError(f"{option}: '{text}' is no time of a run; write 5ms, 800us or .5s")
    return seconds


def size(n_bytes: float) -> str:
    """A number of bytes as people say it: decimal units, three digits."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 100 else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def short_duration(seconds: float) -> str:
    """What takes microseconds to seconds, in three digits: 0.226 ms, 172 ms, 1.83 s."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
