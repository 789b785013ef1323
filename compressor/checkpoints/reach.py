"""What a folder of a model must not reach: code to run, a hub to ask, or files elsewhere.

Configs of Hugging Face may name all three (`auto_map`, `backbone`, kernels as implementations of attention), and a
folder may hold links. Nothing of that is followed: what names code is left out, what would be fetched is refused by
name, and a link is followed within the folder alone, or into the blobs of the hub's own cache.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.core.errors import CheckpointError
from compressor.core.files import resolved

CODE = ("auto_map", "custom_pipelines", "custom_generate")
"""Keys under which a config names modules in Python that lie beside it, or on a hub."""
NAMES = ("_name_or_path", "name_or_path", "_commit_hash")
"""Where a model came from; some of transformers' classes go back there for more."""
FETCHED = (
    "backbone", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "kernel_config",
    "architecture",
)  # fmt: skip
"""Keys whose value may be the name of a repository."""


def without_code(config: Any) -> Any:
    """The same, at any depth without what names code."""
    return _without(config, CODE)


def to_build(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config that a network is built by.

    Raises:
        CheckpointError: It names something to be fetched.
    """
    for key, value in _entries(config):
        if key in FETCHED and (name := _repository(value)):
            raise CheckpointError(
                f"{path}: config.json names {key} '{name[:60]}', which would be fetched; nothing is ever fetched or "
                "run for a config; take the key out, or give --arch module:callable"
            )
    return _without(config, (*CODE, *NAMES))


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within it no library asks a hub; what would have is an OSError."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def refuse_outside(file: Path, folder: Path) -> Path:
    """The file, which `folder` holds; links to elsewhere are refused before anything is read.

    A hub's cache keeps `snapshots/<revision>/<name>` as links into `blobs` beside `snapshots`: those are followed.

    Raises:
        CheckpointError: It leads out of the folder, or to what is no file.
    """
    try:
        found = file.resolve(strict=True)
        is_file = stat.S_ISREG(found.stat().st_mode)
    except (OSError, RuntimeError) as error:  # nowhere, or in a circle
        raise CheckpointError(f"{file}: is a link that leads nowhere; fetch the file") from error
    if not is_file:
        raise CheckpointError(f"{file}: is no regular file; put the file itself there")
    if not is_inside(file, folder):
        raise CheckpointError(
            f"{file}: is a link to {found}, which is outside of the model's folder; nothing was read there; put the "
            "file itself into the folder if it belongs to the model"
        )
    return file


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file, wherever links lead, is in a folder or in the blobs of the hub's cache that the folder is of."""
    return any(resolved(file).is_relative_to(place) for place in _places(resolved(folder)))


def _places(folder: Path) -> Iterator[Path]:
    """The folder itself, and the blobs of a hub's cache that it is a snapshot in."""
    yield folder
    for each in (folder, *folder.parents):
        if each.parent.name == "snapshots" and each.parent.parent.name.count("--"):
            yield each.parent.parent / "blobs"


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield str(key), value
            yield from _entries(value)
    elif isinstance(config, list):
        for value in config:
            yield from _entries(value)


def _repository(value: Any) -> str:
    """A name in a value that no part of transformers itself has: repositories have a slash, timm's sources a colon."""
    texts = [value] if isinstance(value, str) else [text for _, text in _entries(value) if isinstance(text, str)]
    return next((text for text in texts if "/" in text or ":" in text), "")


def _without(config: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(config, dict):
        return {key: _without(value, keys) for key, value in config.items() if key not in keys}
    return [_without(each, keys) for each in config] if isinstance(config, list) else config
