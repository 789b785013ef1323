"""The files of a tokenizer, found beside the weights and copied; tokenizer.json in the fewest bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compressor.checkpoints.reach import without_code
from compressor.core.reading import read_json, refuse_outside

COMPACTED = "tokenizer.json"
CONFIGS = ("tokenizer_config.json", "generation_config.json")
PATTERNS = (
    COMPACTED,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "generation_config.json",
    "added_tokens.json",
)


def find_tokenizer(directory: Path) -> list[Path]:
    """The tokenizer's files in a directory, sorted.

    Raises:
        CheckpointError: One is a link to elsewhere: what it points to would become part of an artifact.
    """
    found = {path for pattern in PATTERNS for path in directory.glob(pattern) if path.is_file() or path.is_symlink()}
    return [refuse_outside(path, directory) for path in sorted(found)]


def copy_tokenizer(files: list[Path], directory: Path) -> list[Path]:
    """Copy the files; tokenizer.json is written compactly, since every byte counts in an artifact.

    What a config of theirs says of code that would be run with them is left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in files:
        if path.name == COMPACTED:
            write_compact(read_json(path), directory / path.name)
        elif path.name in CONFIGS and _names_code(path):
            (directory / path.name).write_text(json.dumps(without_code(read_json(path)), indent=2) + "\n")
        else:
            shutil.copyfile(path, directory / path.name)
    return [directory / path.name for path in files]


def copied_size(path: Path) -> int:
    """Bytes that `copy_tokenizer` will write for a file."""
    return len(_compact(read_json(path))) if path.name == COMPACTED else path.stat().st_size


def _names_code(path: Path) -> bool:
    content = read_json(path)
    return without_code(content) != content


def write_compact(content: dict, path: Path) -> None:
    """JSON in the same order without indentation; a tokenizer's merges as texts where that says the same."""
    path.write_bytes(_compact(content))


def _compact(content: dict) -> bytes:
    model = content.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(merges, list) and all(_joins(pair) for pair in merges):
        content = content | {"model": model | {"merges": [" ".join(pair) for pair in merges]}}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _joins(pair: Any) -> bool:
    """Whether a merge is a pair of texts without spaces, which "a b" stands for as well as ["a", "b"]."""
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and " " not in part for part in pair)
