"""The working folder of a run in its place: of this very run, or of another that is replaced.

`work` holds what is finished, and `run.json` whose it is. Everything else beside it is made again on `--resume`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from compressor.checkpoints import Checkpoint
from compressor.core.artifact import Artifact, failed_directory, is_artifact
from compressor.core.errors import UsageError
from compressor.core.files import remove, write_text
from compressor.core.locking import LOCK
from compressor.core.options import RunOptions
from compressor.core.work import Work
from compressor.data.samples import Samples
from compressor.plan.recipe import Recipe
from compressor.run.place import CLEARED, NOTE, SOURCES, WORK, Place, written_again

ARTIFACT_KEPT = ("finished", "replaced", "replaced.failed", "outdated")
"""Folders in `work` that are of a delivery, which is made again."""


def identity_of(recipe: Recipe, checkpoint: Checkpoint, samples: Samples, options: RunOptions) -> str:
    """Everything that the bytes of an artifact come from, as text."""
    identity = {
        "recipe": recipe.to_dict(), "seed": options.seed, "source": checkpoint.digest(), "data": samples.digest(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "target": [options.target_size, options.max_loss],
    }  # fmt: skip
    return json.dumps(identity, sort_keys=True)


def short(identity: str) -> str:
    """A digest of an identity, which compression.json holds."""
    return hashlib.sha256(identity.encode()).hexdigest()


def delivered(place: Place, identity: str) -> Path | None:
    """Where this very run has already delivered its artifact, where it was ended after that."""
    if not place.resume or (place.force and not place.had_delivered):
        return None
    found = [each for each in (place.output, failed_directory(place.output)) if is_artifact(each)]
    return next((each for each in found if Artifact.open(each).report.get("identity") == short(identity)), None)


def open_work(place: Place, identity: str, seed: int) -> Work:
    """The working folder of this very run; an older one of another run is replaced, or refused with --resume.

    Raises:
        UsageError: There is nothing to resume, it is another run's, or an artifact is in the way.
    """
    if place.resume and not place.force and is_artifact(place.output):
        raise UsageError(
            f"{place.output}: holds an artifact of another run; replace it with --force, or give another with -o"
        )
    note = place.work / NOTE
    left = note.read_text(encoding="utf-8", errors="replace") if note.exists() else CLEARED
    again = written_again(place)
    if place.resume and left == identity and not again:
        _keep_work(place)
        if not (place.work / SOURCES).exists():  # it was ended between the two notes, before any work
            write_text(place.work / SOURCES, json.dumps(place.sources.as_json()))
    else:
        if place.resume:
            _say_why_not(place, left, identity, again)
        place.clear()
        place.work.mkdir(exist_ok=True)
        write_text(note, identity)
        write_text(place.work / SOURCES, json.dumps(place.sources.as_json()))
    return Work(place.work, seed)


def _say_why_not(place: Place, left: str, identity: str, again: list[str]) -> None:
    if left == identity:
        place.say(
            f"{again[0]}: was written again since; what was finished may be of another content, and is made again"
        )
    elif left != CLEARED:
        raise UsageError(
            f"{place.partial}: belongs to another run (model, recipe, seed or data differ); leave --resume out"
        )
    elif not place.existed:
        raise UsageError(f"{place.partial}: no interrupted run to resume; leave --resume out")
    else:
        place.say(f"{place.partial}: a run was ended there before anything was finished; starts from the beginning")


def _keep_work(place: Place) -> None:
    """Takes away what is made again."""
    for path in place.partial.iterdir():
        if path.name not in (WORK, LOCK):
            remove(path)
    for name in ARTIFACT_KEPT:
        remove(place.work / name)
