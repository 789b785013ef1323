"""The place of an artifact: the output, the folder beside it that it grows in, and what a run before may have left.

    <output>                 an artifact, or nothing; never half of one
    <output>.failed          an artifact that missed a gate
    <output>.partial/.lock   held from a run's first moment to its last
    <output>.partial/work    what is finished; run.json says whose it is
        finished             the artifact, whole, before it gets its name
        replaced, replaced.failed   what had that name, on disks that cannot exchange two names in one step
    <output>.partial/…       files of the artifact while they are written; made again on --resume

Whenever a process or a machine ends, the next command finds one of these states, says which, and goes on. Nothing here
imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from compressor.core.artifact import beside, failed_directory, is_artifact, refuse_target
from compressor.core.errors import ChangedError, CheckpointError, DataError, ResourceError, UsageError
from compressor.core.files import links_in, put, remove, sync, write_text
from compressor.core.locking import LOCK, locked
from compressor.core.snapshot import Snapshot

WORK, FINISHED, REPLACED, NOTE, SOURCES = "work", "finished", "replaced", "run.json", "sources.json"
CLEARED, DELIVERED = '{"state": "cleared"}', '{"state": "delivered"}'
"""Notes in place of an identity: what lies there belongs to no run any more."""
SCRATCH = ("hidden-", "original.", ".")
"""How names in `work` begin that no later run goes on from."""


@dataclass
class Place:
    """Where one artifact is made.

    `existed` says that a run before has left a folder, and `had_delivered` that it had come to its end by then.
    """

    output: Path
    force: bool
    resume: bool
    existed: bool
    say: Callable[[str], None]
    had_delivered: bool = False
    sources: Snapshot = field(default_factory=lambda: Snapshot({}))
    _targets: dict[Path, tuple[int, ...] | None] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        return beside(self.output, ".partial")

    @property
    def work(self) -> Path:
        return self.partial / WORK

    def watch(self, sources: Snapshot) -> None:
        """Notes what the artifact will be made of."""
        self.sources = self.sources | sources

    def refuse_changes(self) -> None:
        """Refuses to go on with what was made of files that are no longer what they were.

        What was finished is worthless then, and is marked so.

        Raises:
            ChangedError: One was written again, or is gone.
        """
        changed = self.sources.changed()
        if changed:
            self.forget()
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ChangedError(
                f"{changed[0]}{more}: changed while this run read it; what was made of it would be of two contents, "
                "and is not kept; leave it alone, and give the same command again"
            )

    def put(self, target: Path) -> None:
        """Gives the finished artifact its name, in one step where the disk can.

        Raises:
            ChangedError: Something else has come to stand there since the run began; both are kept.
        """
        finished = self.work / FINISHED
        self._refuse_changed_target(target)
        put(finished, target, self._replaced(target))
        sync(self.work)

    def put_away(self, failed: Path, target: Path) -> None:
        """Takes an earlier attempt that missed a gate out of the way, unless it is the target or has changed."""
        if failed != target and failed.exists() and _state(failed) == self._targets[failed] and is_artifact(failed):
            failed.rename(self.work / "outdated")

    def _replaced(self, target: Path) -> Path:
        return self.work / (REPLACED if target == self.output else f"{REPLACED}.failed")

    def _refuse_changed_target(self, target: Path) -> None:
        if _state(target) == self._targets[target]:
            return
        raise ChangedError(
            f"{target}: was not as it is now when this run began; it is kept, and the new artifact is whole in "
            f"{self.work / FINISHED}; move one of them, or give the same command with --resume once {target.name} is "
            "out of the way"
        )

    def remember(self) -> None:
        """Notes what stands under the names that the artifact may get."""
        self._targets = {path: _state(path) for path in (self.output, failed_directory(self.output))}

    def forget(self) -> None:
        """Marks what is finished as nobody's."""
        if (self.work / NOTE).exists():
            write_text(self.work / NOTE, CLEARED)

    def clear(self) -> None:
        """Takes away what another run has left."""
        self._empty(CLEARED)

    def close(self, note: str = DELIVERED) -> None:
        """Takes the folder's content away, at the end of a run; what it was made of may change from here on."""
        self.sources = Snapshot({})
        self._empty(note)
        remove(self.work)

    def _empty(self, note: str) -> None:
        """The note first says that nothing here counts, and goes last: what is left is known for ours until then."""
        if (self.work / NOTE).exists():
            write_text(self.work / NOTE, note)
        for path in self.partial.iterdir():
            if path.name not in (WORK, LOCK):
                remove(path)
        for path in self.work.iterdir() if self.work.exists() else ():
            if path.name != NOTE:
                remove(path)


@contextlib.contextmanager
def held(output: Path, force: bool, resume: bool, say: Callable[[str], None]) -> Iterator[Place]:
    """Holds an artifact's place from a run's first moment to its last, after what a run before has left is settled.

    Raises:
        UsageError: Another run has it, or what is there is not ours to replace.
        ResourceError: The disk was full.
        ChangedError: A file that was read changed meanwhile, and led to whatever went wrong.
    """
    refuse_target(output, force, resume)
    partial = beside(output, ".partial")
    existed = partial.exists()
    with locked(partial, "run"):
        place = Place(output, force, resume, existed, say)
        _settle(place)
        refuse_target(output, force, resume)
        place.remember()
        try:
            yield place
        except OSError as error:
            place.refuse_changes()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                goes_on = ", then --resume goes on" if resumable(output) else ""
                raise ResourceError(f"{partial}: the disk is full; free some space{goes_on}") from error
            raise
        except (CheckpointError, DataError, UsageError):
            place.refuse_changes()
            if not has_work(partial):
                place.close(CLEARED)
            raise
        except Exception:  # whatever a file that changes while it is read makes its readers raise
            place.refuse_changes()
            raise


def resumable(output: Path) -> bool:
    """Whether a run that was ended left work that --resume goes on from."""
    try:
        note = (beside(output, ".partial") / WORK / NOTE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return note not in (CLEARED, DELIVERED)


def has_work(partial: Path) -> bool:
    """Whether anything is finished in a folder."""
    work = partial / WORK
    names = {path.name for path in work.iterdir()} if work.is_dir() else set()
    return any(name not in (NOTE, SOURCES) and not name.startswith(SCRATCH) for name in names)


def _settle(place: Place) -> None:
    """Brings what a run before has left into order: it was ended at any moment, or it is not ours.

    Raises:
        UsageError: It is not ours.
    """
    partial, work = place.partial, place.work
    if os.path.ismount(partial):
        raise UsageError(f"{partial}: is a disk of its own, and artifacts are renamed; give another directory with -o")
    links = links_in(partial)
    if links:
        raise UsageError(
            f"{links[0]}: is a link, and nothing is written through one; remove it, or give another with -o"
        )
    if not _is_ours(partial):
        raise UsageError(f"{partial}: is in the way and not ours; move it, or give another directory with -o")
    for target in (place.output, failed_directory(place.output)):
        replaced = place._replaced(target)
        if replaced.exists() and not target.exists():
            new = is_artifact(work / FINISHED)
            (work / FINISHED if new else replaced).rename(target)
            sync(target.parent)
            place.say(
                f"{target}: a run before was ended between two names; its {'new' if new else 'old'} artifact is there"
            )
    note = work / NOTE
    if note.exists() and note.read_text(encoding="utf-8", errors="replace") == DELIVERED:
        place.say(f"{partial}: was left by a run that had delivered its artifact; removed")
        place.close()
        place.had_delivered = True


def _is_ours(partial: Path) -> bool:
    """Whether a run has made this folder: it notes whose it is before anything else is in it."""
    if (partial / WORK / NOTE).is_file():
        return True
    others = [path for path in partial.iterdir() if path.name not in (LOCK, WORK)]
    begun = list((partial / WORK).iterdir()) if (partial / WORK).is_dir() else []
    return not others and all(path.name == f".{NOTE}.partial" for path in begun)


def _state(path: Path) -> tuple[int, ...] | None:
    """What stands at a path: None where nothing does or an empty folder; else which, with its content's last change."""
    try:
        found = os.lstat(path)
        names = sorted(os.scandir(path), key=lambda entry: entry.name) if path.is_dir() else []
    except FileNotFoundError:
        return None
    if path.is_dir() and not path.is_symlink() and not names:
        return None
    inner = [entry.stat(follow_symlinks=False) for entry in names]
    return (
        found.st_dev,
        found.st_ino,
        *(value for each in inner for value in (each.st_ino, each.st_size, each.st_mtime_ns)),
    )


def written_again(place: Place) -> list[str]:
    """Sources that were written since the run that is to be resumed noted them, whatever they hold now."""
    try:
        noted = json.loads((place.work / SOURCES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    now = place.sources.as_json()
    return [name for name, seen in now.items() if noted.get(name, seen) != seen]
