"""A model by its name on Hugging Face's hub: `org/name`, or `org/name@revision` of a branch, tag or commit.

What is fetched are weights as safetensors, the config, the tokenizer and the model card, of one commit, into the hub's
own cache: files with other names, and so all code, stay where they are. A cached commit serves where no hub is reached.
`HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` mean what they mean to the hub's own tools.
"""

from __future__ import annotations

import functools
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoints.card import FILE
from compressor.checkpoints.tokenizer import PATTERNS
from compressor.core.artifact import file_digest
from compressor.core.errors import CheckpointError, is_out_of_memory
from compressor.core.log import LOGGER
from compressor.core.model_names import SUFFIXES, hub_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_SHARDS = "model-*-of-*.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def local(model: str | os.PathLike[str]) -> Path:
    """The folder of a model that is named as on a hub, fetched if need be; any other path as it is.

    Raises:
        CheckpointError: The hub has no such model, or none as safetensors, or cannot be reached, or what comes is
            something else than it says.
    """
    return Path(model) if hub_name(model) is None else _fetched(str(model))


def revision_of(path: Path) -> str | None:
    """The commit that a folder in a hub's cache holds."""
    return path.name if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name) else None


@functools.cache
def _fetched(model: str) -> Path:
    """Once in a process, so that all of a run is of one commit."""
    from huggingface_hub import HfApi, errors, snapshot_download

    name, _, revision = model.partition("@")
    revision = revision or None
    endpoint = os.environ.get("HF_ENDPOINT") or None
    api, began = HfApi(endpoint=endpoint), time.time()
    try:
        patterns = _wanted(api, name, revision)
        LOGGER.info("%s: fetching it from %s", model, api.endpoint)
        folder = Path(snapshot_download(name, revision=revision, endpoint=endpoint, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "no such revision" if isinstance(error, errors.RevisionNotFoundError) else "no such model"
        raise CheckpointError(
            f"{model}: no such path, and {what} on {api.endpoint}, or one that needs a token (HF_TOKEN); give a "
            "Hugging Face directory, a file of weights, or org/name[@revision]"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # what answers there need not be a hub; anything may come out of it
        if is_out_of_memory(error):
            raise
        return _cached(model, name, revision, error)
    _refuse_damaged(model, folder, began)
    return folder


def _refuse_damaged(model: str, folder: Path, began: float) -> None:
    """Refuses, and removes, what was fetched since and is not what the hub says: in its cache, weights are called by
    their SHA-256.

    Raises:
        CheckpointError: A file has another one.
    """
    damaged: list[str] = []
    for file in sorted(folder.iterdir()):
        stored = file.resolve()
        if not _DIGEST.fullmatch(stored.name) or stored.stat().st_mtime < began - 1:
            continue
        if file_digest(stored) != stored.name:
            stored.unlink()
            file.unlink(missing_ok=True)
            damaged.append(file.name)
    if damaged:
        raise CheckpointError(
            f"{model}: {', '.join(damaged)} came with another SHA-256 than the hub says; fetch it again"
        )


def _cached(model: str, name: str, revision: str | None, error: Exception) -> Path:
    """What the cache has of it."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[_WEIGHTS]))
    except (errors.LocalEntryNotFoundError, OSError):
        known = isinstance(error, (OSError, errors.HTTPError))  # pyright: ignore[reportPrivateImportUsage]
        said = str(error) if known else f"no answer of a hub: {type(error).__name__}: {error}"
        first = (said.splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{model}: no such path, and the hub cannot be reached for it ({first[:120]}); where there is a network, "
            f"write `hf download {name}`, and give the folder that it names"
        ) from error


def _wanted(api: HfApi, name: str, revision: str | None) -> list[str]:
    """Which files of a revision are fetched."""
    info = api.model_info(name, revision=revision)
    if not _COMMIT.fullmatch(info.sha or ""):
        raise CheckpointError(f"{name}: {api.endpoint} names no commit of it, and is no hub; found {info.sha!r}")
    files = {each.rfilename for each in info.siblings or ()}
    weights = [_WEIGHTS] if _WEIGHTS in files else [_INDEX, _SHARDS] if _INDEX in files else []
    if not weights:
        others = ", ".join(sorted(file for file in files if Path(file).suffix in SUFFIXES)[:4]) or "none"
        raise CheckpointError(
            f"{name}: has no {_WEIGHTS} on {api.endpoint}, nor an index of its shards; of weights and configs it has "
            f"{others}; fetch what you trust, and give its path"
        )
    return [*weights, "config.json", FILE, *PATTERNS]
