"""The original and the data of an artifact, opened again: what the artifact names is data, and is never run.

compression.json may come from anybody. Paths in it are read, as networks and data are, and only where they are files
or folders; each that is read is told. `module:callable` in it is text: whoever wants it called gives it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.checkpoints.opening import parse_arch
from compressor.core.artifact import REPORT, Artifact
from compressor.core.errors import CheckpointError, DataError, RecipeError
from compressor.core.options import RunOptions
from compressor.data import is_reference, load
from compressor.data.samples import Samples, load_samples
from compressor.plan.recipe import Recipe
from compressor.plan.recipe_file import restore_recipe


@dataclass(frozen=True)
class Given:
    """What the user gives beside an artifact, in place of what it names.

    original      the network that it was made from
    arch          a folder with a config, or module:callable
    data          what it was calibrated on
    evaluation    what it is evaluated on
    tokens        of a text, how many are measured
    """

    original: str | None = None
    arch: str | None = None
    data: str | None = None
    evaluation: str | None = None
    tokens: int | None = None


def refuse_unreadable(given: Given) -> None:
    """Refuses what the user gives and cannot be read, before anything is done with the rest.

    Raises:
        CheckpointError: The original or the folder of its architecture is not there.
        DataError: The data cannot be read.
    """
    parse_arch(given.arch)
    if given.original is not None and not (Path(given.original).is_file() or Path(given.original).is_dir()):
        what = "is no file and no folder" if Path(given.original).exists() else "is not there"
        raise CheckpointError(f"{given.original}: {what}; give the original with --original PATH")
    for source in (given.data, given.evaluation):
        if source is not None and not is_reference(source):
            load(source)


def original_of(artifact: Artifact, given: Given) -> Path:
    """Where the original lies.

    Raises:
        CheckpointError: It is not there, or is no file and no folder.
    """
    named = given.original or (artifact.report.get("source") or {}).get("path")
    path = Path(named or "")
    if not named or not path.exists():
        raise CheckpointError(f"{path}: the original is not here; it is needed to compare with; give --original PATH")
    if not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path}: is no file and no folder; give the original with --original PATH")
    return path


def open_original(artifact: Artifact, given: Given) -> Checkpoint:
    """The original.

    Raises:
        CheckpointError: It is not there, cannot be read, or is built by code that only the artifact names.
    """
    path = original_of(artifact, given)
    recorded = (artifact.report.get("source") or {}).get("arch")
    arch = given.arch or (recorded if recorded and Path(recorded).is_dir() else None)
    if recorded and arch is None and not is_reference(recorded):
        raise CheckpointError(f"{recorded}: the folder with its config is not here; give it with --arch DIR")
    if recorded and arch is None:
        raise CheckpointError(
            f"{path}: its network is built by '{recorded}', which {REPORT} names; what an artifact names is not run; "
            f"give --arch {recorded} if you trust it"
        )
    return open_checkpoint(path, arch=arch)


def open_weights(artifact: Artifact, given: Given) -> Checkpoint:
    """The original's tensors, by the names that the network has where it can be built, else by those in its files.

    Raises:
        CheckpointError: It is not there, or cannot be read.
    """
    recorded = (artifact.report.get("source") or {}).get("arch")
    if given.arch or not (recorded and is_reference(recorded)):
        checkpoint = open_original(artifact, given)
        checkpoint.check()
        return checkpoint
    return open_checkpoint(original_of(artifact, given))


def samples_again(artifact: Artifact, checkpoint: Checkpoint, recipe: Recipe, given: Given) -> Samples:
    """The data of the run, or those that are given instead.

    What is evaluated on is held against the calibration data where those are there.

    Raises:
        DataError: They are not there, or are code that only the artifact names.
    """
    recorded = (artifact.report.get("data") or {}).get("arguments") or {}
    evaluation = given.evaluation or _plain(recorded.get("eval"), "--data")
    if evaluation is None:  # a part of the calibration data, or of the built-in sample
        data = given.data or _plain(recorded.get("data"), "--calibration")
        return load_samples(checkpoint, recipe, RunOptions(model=str(checkpoint.path), data=data))
    data = given.data or recorded.get("data")
    if data is None and checkpoint.family not in ("decoder", "encoder"):
        return Samples(None, load(evaluation, "evaluation"))
    if data is not None and not given.data and not _is_there(data):
        return Samples(None, load(evaluation, "evaluation"))
    return load_samples(checkpoint, recipe, RunOptions(model=str(checkpoint.path), data=data, eval=evaluation))


def recipe_of(artifact: Artifact) -> Recipe:
    """The recipe that the artifact was made by.

    Raises:
        CheckpointError: It is none that can be.
    """
    try:
        return restore_recipe(artifact.report.get("recipe") or {}, str(artifact.directory / REPORT))
    except RecipeError as error:
        raise CheckpointError(str(error)) from error


def named_paths(artifact: Artifact, given: Given) -> list[str]:
    """The files that are read because the artifact names them."""
    recorded = (artifact.report.get("data") or {}).get("arguments") or {}
    original = None if given.original else (artifact.report.get("source") or {}).get("path")
    data = None if given.evaluation else recorded.get("eval") or (None if given.data else recorded.get("data"))
    return [str(path) for path in (original, data) if path]


def _plain(named: Any, option: str) -> str | None:
    """A path that an artifact names, None where it names nothing."""
    if named is None:
        return None
    if not isinstance(named, str) or is_reference(named):
        raise DataError(
            f"{named}: is code, which {REPORT} names; what an artifact names is not run; give {option} {named} if you "
            "trust it"
        )
    if not _is_there(named):
        raise DataError(f"{named}: the data of the run are not here; give others with {option}")
    return named


def _is_there(named: Any) -> bool:
    return isinstance(named, str) and (Path(named).is_file() or Path(named).is_dir())
