"""An artifact: a directory that compress wrote, and what compression.json says of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from compressor.core.errors import CheckpointError, UsageError
from compressor.core.files import resolved, write_text
from compressor.core.reading import read_json, refuse_special

REPORT = "compression.json"
PAGE = "report.html"
CARD = "README.md"
FRONT, FRONT_PICTURE = "front.json", "front.svg"
"""What a search for a fast network measured."""
WEIGHTS = "model.safetensors"
NOT_NEEDED = (REPORT, PAGE, CARD, FRONT, FRONT_PICTURE)
"""Files of an artifact that say what it is; it runs without them."""
INSTALLED_RECORD, INSTALLED_GRAPH = "model.installed.json", "model.installed.onnx"
INSTALLED = (INSTALLED_RECORD, INSTALLED_GRAPH, "model.installed.data")
"""Files that `compress install` makes of an artifact for one machine, the one that says so first; not of it."""
PAIRED_ENCODER, PAIRED_DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
"""The graphs of an encoder-decoder, beside model.onnx, which computes both at once."""
CACHE, IN_PLACE = "cache", "in place"
"""A decoder's graph has this among its metadata where past and present may be one buffer, longer than what it holds."""
KEPT = "num_logits_to_keep"
"""An input of decoders that need not be fed: how many positions get logits, the last ones; 0 is all."""
SEAL = "seal"
"""Key of compression.json with the SHA-256 of the page and the card, and of all else that compression.json says."""
_WRITTEN = (
    "model.*", "model-*.onnx", "sizes.json", PAIRED_ENCODER, PAIRED_DECODER,
    "config.json", "genai_config.json", "generation_config.json", "structure.json", "tokenizer*", "vocab*",
    "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""Names of files that an artifact may have."""


@dataclass(frozen=True)
class Artifact:
    """A `directory` that compress wrote; `report` is the content of its compression.json."""

    directory: Path
    report: dict[str, Any]

    @classmethod
    def open(cls, directory: Path | str) -> Artifact:
        """The artifact in a `directory`.

        Raises:
            CheckpointError: It holds none, or a damaged one.
        """
        path = Path(directory) / REPORT
        if not path.exists():
            raise CheckpointError(
                f"{directory}: is no artifact, it has no {REPORT}; give a directory that compress wrote"
            )
        report = read_json(path, measured=True)
        from compressor.core.report import misshapen

        wrong = misshapen(report)
        if wrong:
            raise CheckpointError(f"{path}: is damaged; {wrong}; compress again")
        return cls(Path(directory), report)


def damaged_files(artifact: Artifact) -> list[str]:
    """The files of an `artifact` whose SHA-256 is not that in compression.json, or that are gone; each with what is
    wrong."""
    recorded = artifact.report.get("sha256")
    if not isinstance(recorded, dict) or not recorded:
        return [f"{REPORT} holds no hashes"]
    found = []
    for name, digest in recorded.items():
        path = artifact.directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            found.append(f"{name} is no file of the artifact")
        elif not path.is_file():
            found.append(f"{name} is gone")
        elif file_digest(path) != digest:
            found.append(f"{name} has changed")
    return found + _unsealed(artifact)


def _unsealed(artifact: Artifact) -> list[str]:
    """Of the two files that say what the artifact is; older artifacts have no seal."""
    seal = artifact.report.get(SEAL)
    if not isinstance(seal, dict):
        return []
    page = artifact.directory / PAGE
    found = [f"{PAGE} has changed"] if page.is_file() and file_digest(page) != seal.get(PAGE) else []
    return found + ([f"{REPORT} has changed"] if _content_digest(artifact.report) != seal.get(REPORT) else [])


def sealed(report: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """What compression.json will hold, with the digests of page and card, and of all else in it."""
    found = {key: value for key, value in report.items() if key != SEAL} | {SEAL: digests}
    return found | {SEAL: digests | {REPORT: _content_digest(found)}}


def refuse_unsealed(artifact: Artifact) -> None:
    """Refuses to seal again what is not what was written: that must not be covered up.

    Raises:
        CheckpointError: compression.json has changed.
    """
    seal = artifact.report.get(SEAL)
    if isinstance(seal, dict) and _content_digest(artifact.report) != seal.get(REPORT):
        raise CheckpointError(f"{artifact.directory / REPORT}: has changed since it was written; see `compress verify`")


def reseal(artifact: Artifact) -> None:
    """Notes a page that was made again; an artifact of before there were seals stays without one."""
    seal = artifact.report.get(SEAL)
    if not isinstance(seal, dict):
        return
    # That of the card stays: a card that was written on is not ours because a page was made.
    digests = {name: digest for name, digest in seal.items() if name != REPORT}
    report = sealed(artifact.report, digests | {PAGE: file_digest(artifact.directory / PAGE)})
    write_text(artifact.directory / REPORT, text_of(report))


def text_of(report: dict[str, Any]) -> str:
    """compression.json's text."""
    return json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"


def _content_digest(report: dict[str, Any]) -> str:
    """Of all that a report says, but for this digest."""
    seal = {key: value for key, value in report[SEAL].items() if key != REPORT}
    return hashlib.sha256(json.dumps(report | {SEAL: seal}, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file."""
    refuse_special(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_installed(directory: Path) -> bool:
    """Whether anything lies there that `compress install` makes."""
    return any((directory / name).exists() for name in INSTALLED)


def is_artifact(directory: Path) -> bool:
    """Whether compress wrote this directory."""
    return (directory / REPORT).is_file()


def failed_directory(directory: Path) -> Path:
    """Where an artifact that was to become `directory` and misses a gate is kept."""
    return beside(directory, ".failed")


def beside(directory: Path, suffix: str) -> Path:
    """The directory's sibling whose name has a suffix."""
    named = directory if directory.name not in ("", "..") else resolved(directory)
    return named.with_name(named.name + suffix)


def refuse_target(directory: Path, force: bool = False, resume: bool = False) -> None:
    """Refuses to write over anything but an artifact, and over an artifact only by `force`.

    With `resume` it may be the very artifact that was to be made, which is told later.

    Raises:
        UsageError: Something stands there, or it cannot get its name by a rename.
    """
    if directory.name in ("", "..") and not resolved(directory).name:
        raise UsageError(f"{directory}: is the root of a disk; give a folder on it with -o")
    failed = failed_directory(directory)
    for path in (directory, failed):
        if path.is_symlink():
            raise UsageError(f"{path}: is a link, and nothing is written through one; give the folder itself with -o")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; give a directory with -o")
    if directory.name == ".." or (directory.exists() and _holds_this_process(directory)):
        raise UsageError(f"{directory}: is the folder that you are in; give another directory with -o")
    if os.path.ismount(directory):
        raise UsageError(
            f"{directory}: is a disk of its own, and artifacts are renamed; give a directory on it with -o"
        )
    if failed.exists() and (not is_artifact(failed) or foreign_files(failed)):
        raise UsageError(f"{failed}: is in the way and not ours; move it, or give another directory with -o")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not is_artifact(directory):
        raise UsageError(f"{directory}: is not empty and no artifact of ours; give another directory with -o")
    if not (force or resume):
        raise UsageError(f"{directory}: holds an artifact already; replace it with --force, or give another with -o")
    others = [*foreign_files(directory), *_written_on(directory)] if force else []
    if others:
        raise UsageError(
            f"{directory}: holds {others[0]}, which is not of the artifact and would be lost; move it, or give another "
            "directory with -o"
        )


def foreign_files(directory: Path) -> list[str]:
    """What is in an artifact's folder and not of it: other files, folders and links."""
    try:
        report = Artifact.open(directory).report
    except CheckpointError:
        report = {}
    known = {*(report.get("sha256") or {}), *((report.get("size") or {}).get("files") or {}), *NOT_NEEDED}
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        of_it = name in known or any(fnmatch(name, pattern) and "/" not in name for pattern in _WRITTEN)
        if path.is_symlink() or not of_it or not path.is_file():
            found.append(name)
    return found


def _written_on(directory: Path) -> list[str]:
    """The card, where it is no longer as compress wrote it."""
    try:
        seal = Artifact.open(directory).report.get(SEAL)
    except CheckpointError:
        return []
    card = directory / CARD
    ours = not card.is_file() or (isinstance(seal, dict) and file_digest(card) == seal.get(CARD))
    return [] if ours else [CARD]


def _holds_this_process(directory: Path) -> bool:
    """Whether the working folder is this one, or within it."""
    try:
        return Path.cwd().is_relative_to(resolved(directory))
    except OSError:  # the working folder is gone
        return False
