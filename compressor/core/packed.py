"""What a file of packed tensors holds, from its header alone; no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METADATA_KEY = "compressor"
LARGEST_HEADER = 100_000_000


def packed_tensors(path: Path) -> dict[str, dict[str, Any]] | None:
    """The tensors of a file that compress wrote: description and bytes by name; None for another or a damaged file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < min(size, LARGEST_HEADER) else {}
        described = json.loads(header["__metadata__"][METADATA_KEY])["tensors"]
        found = {name: each | {"bytes": _bytes(header, name, each["parts"])} for name, each in described.items()}
        return found if all(_is_sound(each) for each in found.values()) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _is_sound(description: dict[str, Any]) -> bool:
    shape = description["tensor_shape"]
    return isinstance(description["kind"], str) and all(type(size) is int and 0 <= size < 2**40 for size in shape)


def _bytes(header: dict[str, Any], name: str, parts: list[str]) -> int:
    spans = [header[name if part == "weight" else f"{name}.{part}"]["data_offsets"] for part in parts]
    return sum(end - begin for begin, end in spans)


def encoding_label(description: dict[str, Any]) -> str:
    """A few words about an encoding: "codebook width 9 dim 4 group 64"."""
    if description["kind"] == "refined":
        inner, extra = description["inner"], description["extra"]
        return f"{encoding_label(inner)}, {extra['shape'][0]} rows + bits {extra['bits']}"
    shown = [f"{key} {description[key]}" for key in ("bits", "width", "dim", "group", "grid") if key in description]
    return " ".join([str(description["kind"]), *shown])
