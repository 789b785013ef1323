"""Whether evaluation data is other data than calibration data.

Text is compared by shingles: every run of 64 characters, case and spacing aside, whatever the language. Speeches repeat
formulas and quote each other: of 21 State of the Union addresses, each against all others since 1900, twenty share
0–1.2 % of their shingles (the built-in sample's two parts 0.1 %), and one, which quotes the year before at length,
3.8 %. Beyond 2 % two texts share passages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from compressor.core.errors import DataError
from compressor.data.arrays import Arrays
from compressor.data.text import Text

SHINGLE = 64
"""Characters in a run; a power of two."""
TOLERANCE = 0.02
KEPT_MAX = 1 << 23
"""Hashes of the calibration text that are held; of longer texts, the same sample is taken of both sides."""
_CHUNK = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)


def check_disjoint(calibration: Text | Arrays, evaluation: Text | Arrays, tolerance: float = TOLERANCE) -> float:
    """The share of the evaluation data that calibration data holds too.

    Raises:
        DataError: It is beyond `tolerance`; names the share and an example.
    """
    if isinstance(calibration, Text) and isinstance(evaluation, Text):
        share, example = text_overlap(calibration.content, evaluation.content)
    elif isinstance(calibration, Arrays) and isinstance(evaluation, Arrays):
        share, example = array_overlap(calibration, evaluation)
    else:
        return 0.0
    if share > tolerance:
        raise DataError(
            f"{evaluation.source}: overlaps the calibration data {calibration.source}; {share:.1%} of it is in both, "
            f"for example {example}; evaluate on other data (--eval), or not at all (--set evaluation.tokens=0)"
        )
    return share


def text_overlap(calibration: str, evaluation: str) -> tuple[float, str]:
    """The share of evaluation shingles that are in the calibration text, and an excerpt of the first."""
    first, second = _normal(calibration), _normal(evaluation)
    if min(len(first), len(second)) < SHINGLE:
        contained = bool(second) and second in first
        return float(contained), repr(second[:SHINGLE])
    keep_one_in = np.uint64(1 + len(first) // KEPT_MAX)
    known = np.unique(np.concatenate([hashes[hashes % keep_one_in == 0] for _, hashes in _shingles(first)]))
    seen = shared = 0
    example = ""
    for start, hashes in _shingles(second):
        places = np.flatnonzero(hashes % keep_one_in == 0)
        found = places[np.isin(hashes[places], known)]
        seen, shared = seen + len(places), shared + len(found)
        if len(found) and not example:
            example = repr(second[start + found[0] : start + found[0] + SHINGLE])
    return shared / max(seen, 1), example


def array_overlap(calibration: Arrays, evaluation: Arrays) -> tuple[float, str]:
    """The share of evaluation examples whose inputs are, byte for byte, a calibration example's."""
    known = set(_row_hashes(calibration))
    shared = [row for row, digest in enumerate(_row_hashes(evaluation)) if digest in known]
    return len(shared) / len(evaluation), f"row {shared[0]}" if shared else ""


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _shingles(text: str) -> Iterator[tuple[int, np.ndarray]]:
    """(start, uint64 hashes of the shingles from there on), piece by piece.

    h of 2m characters at i is h_m(i)·B^m + h_m(i + m) mod 2^64, so six doublings reach 64; then the bits are mixed.
    """
    for start in range(0, len(text) - SHINGLE + 1, _CHUNK):
        piece = text[start : start + _CHUNK + SHINGLE - 1]
        hashes = np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
        width, power = 1, _BASE
        with np.errstate(over="ignore"):
            while width < SHINGLE:
                hashes = hashes[:-width] * power + hashes[width:]
                width, power = 2 * width, power * power
            hashes = (hashes ^ (hashes >> np.uint64(31))) * _BASE
        yield start, hashes ^ (hashes >> np.uint64(29))


def _row_hashes(arrays: Arrays) -> Iterator[bytes]:
    ordered = [arrays.inputs[name] for name in sorted(arrays.inputs)]
    for row in range(len(arrays)):
        digest = hashlib.blake2b(digest_size=16)
        for array in ordered:
            digest.update(np.ascontiguousarray(array[row]).data)
        yield digest.digest()
