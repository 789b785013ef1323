"""A model by its name on Hugging Face's hub: `org/name`, or `org/name@revision` of a branch, tag or commit.

What is fetched are weights as safetensors, the config, the tokenizer and the model card, of one commit, into the hub's
own cache: files with other names, and so all code, stay where they are. A cached commit serves where no hub is reached.
`HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` mean what they mean to the hub's own tools.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoints.card import FILE
from compressor.checkpoints.tokenizer import PATTERNS
from compressor.core.errors import CheckpointError
from compressor.core.log import LOGGER
from compressor.core.model_names import SUFFIXES, hub_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_SHARDS = "model-*-of-*.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def local(model: str | os.PathLike[str]) -> Path:
    """The folder of a model that is named as on a hub, fetched if need be; any other path as it is.

    Raises:
        CheckpointError: The hub has no such model, or none as safetensors, or cannot be reached.
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
    api = HfApi(endpoint=endpoint)
    try:
        patterns = _wanted(api, name, revision)
        LOGGER.info("%s: fetching it from %s", model, api.endpoint)
        return Path(snapshot_download(name, revision=revision, endpoint=endpoint, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "no such revision" if isinstance(error, errors.RevisionNotFoundError) else "no such model"
        raise CheckpointError(
            f"{model}: no such path, and {what} on {api.endpoint}, or one that needs a token (HF_TOKEN); give a "
            "Hugging Face directory, a file of weights, or org/name[@revision]"
        ) from error
    except (OSError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        return _cached(model, name, revision, error)


def _cached(model: str, name: str, revision: str | None, error: Exception) -> Path:
    """What the cache has of it."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[_WEIGHTS]))
    except (errors.LocalEntryNotFoundError, OSError):
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{model}: no such path, and the hub cannot be reached for it ({first[:120]}); where there is a network, "
            f"write `hf download {name}`, and give the folder that it names"
        ) from error


def _wanted(api: HfApi, name: str, revision: str | None) -> list[str]:
    """Which files of a revision are fetched."""
    files = {each.rfilename for each in api.model_info(name, revision=revision).siblings or ()}
    weights = [_WEIGHTS] if _WEIGHTS in files else [_INDEX, _SHARDS] if _INDEX in files else []
    if not weights:
        others = ", ".join(sorted(file for file in files if Path(file).suffix in SUFFIXES)[:4]) or "none"
        raise CheckpointError(
            f"{name}: has no {_WEIGHTS} on {api.endpoint}, nor an index of its shards; of weights and configs it has "
            f"{others}; fetch what you trust, and give its path"
        )
    return [*weights, "config.json", FILE, *PATTERNS]
