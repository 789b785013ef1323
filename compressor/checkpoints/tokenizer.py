"""The files of a tokenizer, found beside the weights and copied; tokenizer.json without its spaces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from compressor.checkpoints.source import read_json

COMPACTED = "tokenizer.json"
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
    """The tokenizer's files in a directory, sorted."""
    return sorted({path for pattern in PATTERNS for path in directory.glob(pattern) if path.is_file()})


def copy_tokenizer(files: list[Path], directory: Path) -> list[Path]:
    """Copy the files; tokenizer.json is re-serialised compactly, since every byte counts in an artifact."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in files:
        if path.name == COMPACTED:
            write_compact(read_json(path), directory / path.name)
        else:
            shutil.copyfile(path, directory / path.name)
    return [directory / path.name for path in files]


def copied_size(path: Path) -> int:
    """Bytes that `copy_tokenizer` will write for a file."""
    return len(_compact(read_json(path))) if path.name == COMPACTED else path.stat().st_size


def write_compact(content: dict, path: Path) -> None:
    """JSON in the same order without indentation."""
    path.write_bytes(_compact(content))


def _compact(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
