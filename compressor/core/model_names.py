"""How a model is given: as a path of a folder or of a file of weights, or by its name on a hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".th", ".safetensors", ".gguf", ".pt2", ".onnx")
"""How files of weights end."""
_WORD = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_ON_HUB = re.compile(rf"(?![^@]*(?:--|\.\.|\.git(?:@|$))){_WORD}/({_WORD})(@[\w-][\w.-]*(?:/[\w-][\w.-]*)*)?", re.ASCII)
"""As the hub has names; no part of a revision, which becomes a path in its cache, begins with a dot."""


def hub_name(model: str | os.PathLike[str]) -> str | None:
    """The model's own name where it is given as on a hub, `org/name` or `org/name@revision`; None where it is a path.

    A path is what exists, and what ends like a file of weights.
    """
    match = _ON_HUB.fullmatch(str(model))
    if match is None or Path(match[1]).suffix in (*SUFFIXES, ".json") or os.path.lexists(model):
        return None
    return match[1]
