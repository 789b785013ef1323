"""The folder that an artifact grows in, `<output>.partial`: one run's at a time, resumable, and renamed at the end.

`work` in it holds what is finished, and `run.json` whose it is. Everything else in it is made again on `--resume`. At
the end the artifact is gathered in `work/finished`, which then gets its name at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from compressor.checkpoints import Checkpoint
from compressor.core.artifact import WEIGHTS
from compressor.core.errors import CheckpointError, DataError, ResourceError, UsageError
from compressor.core.files import write_text
from compressor.core.locking import LOCK, locked
from compressor.core.options import RunOptions
from compressor.core.work import Work
from compressor.data.samples import Samples
from compressor.plan.recipe import Recipe

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


def open_work(partial: Path, recipe: Recipe, checkpoint: Checkpoint, samples: Samples, options: RunOptions) -> Work:
    """The working folder of this very run; an older one of another run is replaced, or refused with --resume.

    Raises:
        UsageError: There is nothing to resume, it is another run's, or the folder is not ours.
    """
    identity = {
        "recipe": recipe.to_dict(), "seed": options.seed, "source": checkpoint.digest(), "data": samples.digest(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "target": [options.target_size, options.max_loss],
    }  # fmt: skip
    note = partial / WORK / NOTE
    text = json.dumps(identity, sort_keys=True)
    found = [path for path in partial.iterdir() if path.name != LOCK]
    if options.resume and not note.exists():
        raise UsageError(f"{partial}: no interrupted run to resume; leave --resume out")
    if options.resume and note.read_text() != text:
        raise UsageError(f"{partial}: belongs to another run (model, recipe, seed or data differ); leave --resume out")
    if any(not _is_empty(path) for path in found) and not note.exists():
        raise UsageError(f"{partial}: is in the way and not ours; move it, or give another directory with -o")
    for path in found:
        if path.name != WORK or not options.resume:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    note.parent.mkdir(exist_ok=True)
    shutil.rmtree(note.parent / FINISHED, ignore_errors=True)  # of a delivery that did not come to its end
    write_text(note, text)
    return Work(note.parent, options.seed)


def remove(partial: Path) -> None:
    """Takes the folder away. The note goes late: what is left, should the process end meanwhile, is known for ours."""
    for path in (partial / WORK).iterdir():
        if path.name != NOTE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(partial)


def _is_empty(path: Path) -> bool:
    return path.name == WORK and path.is_dir() and not any(path.iterdir())
