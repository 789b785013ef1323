"""What a file of packed tensors holds, from its header alone; no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.core.reading import refuse_special

METADATA_KEY = "compressor"
_ALIGNMENT = 64
LARGEST_HEADER = 100_000_000
Spans = dict[tuple[str, str], tuple[int, int]]
"""By (tensor, part), the first byte and the one behind the last."""
_PROJECTION = re.compile(r"\b([qkv])_proj\b")


def part_name(tensor: str, part: str) -> str:
    """What a part of a tensor is called in the file."""
    return tensor if part == "weight" else f"{tensor}.{part}"


def spans(sizes: Mapping[tuple[str, str], int]) -> Spans:
    """Where the parts of tensors lie: by (tensor, part), the first of their bytes and the one behind them.

    The same parts of all tensors lie side by side, and those of layers that are made one product follow each other: a
    graph that joins them takes them for one.
    """
    found, position = {}, 0
    for key in sorted(sizes, key=lambda each: (each[1], _in_turn(each[0]))):
        found[key] = position, position + sizes[key]
        position += sizes[key]
    return found


def _in_turn(tensor: str) -> str:
    """A name to sort by, which has query, key and value in this order."""
    return _PROJECTION.sub(lambda found: f"q_proj.{'qkv'.index(found[1])}", tensor)


@dataclass(frozen=True)
class StoredPart:
    """A part as the file says it is: `dtype` by safetensors' name, shape, and bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def packed_header(
    descriptions: dict[str, dict[str, Any]],
    stored: Mapping[tuple[str, str], StoredPart],
    tied: dict[str, str],
    own: Sequence[str] = (),
) -> tuple[bytes, Spans]:
    """All bytes before the first part, and where the parts lie from there on.

    Args:
        descriptions: Of tensors by name, with the names of their `parts`.
        stored: The parts by (tensor, part).
        tied: Alias to name.
        own: Tensors that only networks of other sizes have.
    """
    found, header = spans({key: part.nbytes for key, part in stored.items()}), {}
    for name, description in descriptions.items():
        for part in description["parts"]:
            each = stored[name, part]
            header[part_name(name, part)] = {
                "dtype": each.dtype, "shape": list(each.shape), "data_offsets": list(found[name, part]),
            }  # fmt: skip
    said = {"tensors": descriptions, "tied": tied} | ({"own": list(own)} if own else {})
    metadata = json.dumps(said, separators=(",", ":"))
    text = json.dumps({"__metadata__": {METADATA_KEY: metadata}, **header}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, found


def packed_tensors(path: Path) -> dict[str, dict[str, Any]] | None:
    """The tensors of a file that compress wrote: description and bytes by name; None for another or a damaged file.

    Raises:
        CheckpointError: It is no regular file.
    """
    refuse_special(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < min(size, LARGEST_HEADER) else {}
        described = json.loads(header["__metadata__"][METADATA_KEY])["tensors"]
        found = {name: each | {"bytes": _bytes(header, name, each["parts"], size)} for name, each in described.items()}
        return found if all(_is_sound(each) for each in found.values()) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _is_sound(description: dict[str, Any]) -> bool:
    shape = description["tensor_shape"]
    return isinstance(description["kind"], str) and all(type(size) is int and 0 <= size < 2**40 for size in shape)


def _bytes(header: dict[str, Any], name: str, parts: list[str], size: int) -> int:
    found = [header[part_name(name, part)]["data_offsets"] for part in parts]
    if not all(0 <= begin <= end <= size for begin, end in found):
        raise ValueError("beyond the file's end")
    return sum(end - begin for begin, end in found)


def encoding_label(description: dict[str, Any]) -> str:
    """A few words about an encoding: "codebook width 9 dim 4 group 64"; "group row" is a scale for each row."""
    if description["kind"] == "refined":
        inner, extra = description["inner"], description["extra"]
        return f"{encoding_label(inner)}, {extra['shape'][0]} rows + bits {extra['bits']}"
    known = dict(description)
    if known.get("group") and known.get("group") == (known.get("shape") or [0])[-1]:
        known["group"] = "row"
    shown = [f"{key} {known[key]}" for key in ("bits", "width", "dim", "group", "grid") if key in known]
    return " ".join([str(description["kind"]), *shown])
