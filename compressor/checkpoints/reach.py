"""What a folder of a model must not reach: code to run, a hub to ask, or files elsewhere.

Configs of Hugging Face may name all three (`auto_map`, `backbone`, kernels as implementations of attention), and a
folder may hold links. Nothing of that is followed: what names code is left out, what would be fetched is refused by
name, and a link is followed within the folder alone, or into the blobs of the hub's own cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.core.errors import CheckpointError

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
