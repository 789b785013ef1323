"""What the model card of a source says that a copy of the model must say too: its licence, its language, its name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FILE = "README.md"
LONGEST = 1 << 16
"""Bytes of a card that are read: what is sought stands at its head."""
_KEYS = ("license", "license_name", "license_link", "language")
_LINE = re.compile(rf"^({'|'.join(_KEYS)}):[ \t]*([\"']?)([\w./:-]{{1,200}})\2[ \t]*$", re.ASCII)
_HUB_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_HUB_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)


def card_of(path: Path, config: dict[str, Any] | None) -> dict[str, str]:
    """`license`, `license_name`, `license_link`, `language` and `base_model` (the hub's name), those that are known.

    Only plain words are taken; the card of a stranger is text, and nothing else of it is read.
    """
    found = _head(path if path.is_dir() else path.parent)
    stated = (config or {}).get("_name_or_path")
    folders = [match for part in path.absolute().parts if (match := _HUB_FOLDER.fullmatch(part))]
    if folders:
        found["base_model"] = "/".join(folders[-1].groups())
    elif isinstance(stated, str) and _HUB_NAME.fullmatch(stated):
        found["base_model"] = stated
    return found


def _head(folder: Path) -> dict[str, str]:
    card = folder / FILE
    try:
        if not card.is_file():
            return {}
        with card.open("rb") as file:
            lines = file.read(LONGEST).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    matches = filter(None, map(_LINE.match, lines[1 : lines.index("---", 1)]))
    return {match[1]: match[3] for match in matches}
