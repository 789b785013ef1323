"""The folder that an artifact grows in, `<output>.partial`: one run's at a time, resumable, and renamed at the end.

`work` in it holds what is finished, and `run.json` whose it is. Everything else in it is made again on `--resume`. At
the end the artifact is gathered in `work/finished`, which then gets its name at once.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from compressor.core.artifact import WEIGHTS
from compressor.core.errors import CheckpointError, DataError, ResourceError, UsageError
from compressor.core.files import write_text
from compressor.core.identity import Identity
from compressor.core.locking import LOCK, locked
from compressor.core.work import Work

WORK, FINISHED, NOTE = "work", "finished", "run.json"


@contextlib.contextmanager
def workplace(partial: Path) -> Iterator[None]:
    """Holds the folder; it goes again where the input was at fault, since there is nothing to resume.

    Raises:
        UsageError: Another run has it, or it cannot be written.
        ResourceError: The disk was full.
    """
    with locked(partial, "run"):
        try:
            yield
        except (CheckpointError, DataError):
            if not (partial / WEIGHTS).exists():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(f"{partial}: the disk is full; free some space, then --resume goes on") from error
            raise


def open_work(partial: Path, identity: Identity, resume: bool) -> Work:
    """The working folder of this very run; an older one of another run is replaced, or refused with --resume.

    Raises:
        UsageError: There is nothing to resume, it is another run's, or the folder is not ours.
    """
    note = partial / WORK / NOTE
    found = [path for path in partial.iterdir() if path.name != LOCK]
    if resume and not note.exists():
        raise UsageError(f"{partial}: no interrupted run to resume; leave --resume out")
    if resume:
        _refuse_another(note, identity, partial)
    if any(not _is_empty(path) for path in found) and not note.exists():
        raise UsageError(f"{partial}: is in the way and not ours; move it, or give another directory with -o")
    for path in found:
        if path.name != WORK or not resume:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    note.parent.mkdir(exist_ok=True)
    shutil.rmtree(note.parent / FINISHED, ignore_errors=True)  # of a delivery that did not come to its end
    write_text(note, identity.model_dump_json())
    return Work(note.parent, identity.seed)


def _refuse_another(note: Path, identity: Identity, partial: Path) -> None:
    """Refuses to go on with what another run began; says what is not the same."""
    try:
        earlier = Identity.model_validate_json(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{partial}: was begun by another version of compressor, or is damaged; leave --resume out"
        ) from error
    difference = identity.difference(earlier)
    if difference:
        raise UsageError(f"{partial}: belongs to another run: {difference}; leave --resume out, or ask for the same")


def remove(partial: Path) -> None:
    """Takes the folder away. The note goes late: what is left, should the process end meanwhile, is known for ours."""
    for path in (partial / WORK).iterdir():
        if path.name != NOTE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(partial)


def _is_empty(path: Path) -> bool:
    return path.name == WORK and path.is_dir() and not any(path.iterdir())
