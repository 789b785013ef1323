"""The working folder of a run in its place: of this very run, or of another that is replaced.

`work` holds what is finished, and `run.json` whose it is. Everything else beside it is made again on `--resume`.
"""

from __future__ import annotations

import json
from pathlib import Path

from compressor.core.artifact import Artifact, failed_directory, is_artifact
from compressor.core.errors import CheckpointError, UsageError
from compressor.core.files import remove, write_text
from compressor.core.identity import Identity
from compressor.core.locking import LOCK
from compressor.core.work import Work
from compressor.run.place import CLEARED, NOTE, SOURCES, WORK, Place, written_again

ARTIFACT_KEPT = ("finished", "replaced", "replaced.failed", "outdated")
"""Folders in `work` that are of a delivery, which is made again."""


def delivered(place: Place, identity: Identity) -> Path | None:
    """Where this very run has already delivered its artifact, where it was ended after that."""
    if not place.resume or (place.force and not place.had_delivered):
        return None
    found = [each for each in (place.output, failed_directory(place.output)) if is_artifact(each)]
    return next((each for each in found if _identity_in(each) == identity), None)


def _identity_in(directory: Path) -> Identity | None:
    """That of the run that an artifact is of; None where it does not say."""
    try:
        return Identity.model_validate(Artifact.open(directory).report.get("identity"))
    except (ValueError, CheckpointError):
        return None


def open_work(place: Place, identity: Identity) -> Work:
    """The working folder of this very run; an older one of another run is replaced, or refused with --resume.

    Raises:
        UsageError: There is nothing to resume, it is another run's, or an artifact is in the way.
    """
    if place.resume and not place.force and is_artifact(place.output):
        raise UsageError(
            f"{place.output}: holds an artifact of another run; replace it with --force, or give another with -o"
        )
    note, again = place.work / NOTE, written_again(place)
    left = note.read_text(encoding="utf-8", errors="replace") if note.exists() else CLEARED
    if place.resume and left == identity.model_dump_json() and not again:
        _keep_work(place)
        if not (place.work / SOURCES).exists():  # it was ended between the two notes, before any work
            write_text(place.work / SOURCES, json.dumps(place.sources.as_json()))
    else:
        if place.resume:
            _refuse_another(place, left, identity, again)
        place.clear()
        place.work.mkdir(exist_ok=True)
        write_text(note, identity.model_dump_json())
        write_text(place.work / SOURCES, json.dumps(place.sources.as_json()))
    return Work(place.work, identity.seed)


def _refuse_another(place: Place, left: str, identity: Identity, again: list[str]) -> None:
    """Refuses to go on with what another run began; says what is not the same, or why this one begins anew."""
    if left == identity.model_dump_json():
        place.say(
            f"{again[0]}: was written again since; what was finished may be of another content, and is made again"
        )
        return
    if left == CLEARED and not place.existed:
        raise UsageError(f"{place.partial}: no interrupted run to resume; leave --resume out")
    if left == CLEARED:
        place.say(f"{place.partial}: a run was ended there before anything was finished; starts from the beginning")
        return
    try:
        earlier = Identity.model_validate_json(left)
    except ValueError as error:
        raise UsageError(
            f"{place.partial}: was begun by another version of compressor, or is damaged; leave --resume out"
        ) from error
    raise UsageError(
        f"{place.partial}: belongs to another run: {identity.difference(earlier)}; leave --resume out, or ask for the "
        "same"
    )


def _keep_work(place: Place) -> None:
    """Takes away what is made again."""
    for path in place.partial.iterdir():
        if path.name not in (WORK, LOCK):
            remove(path)
    for name in ARTIFACT_KEPT:
        remove(place.work / name)
