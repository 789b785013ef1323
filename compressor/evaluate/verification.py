"""Is an artifact still what its compression.json says: files, provenance, and what onnxruntime makes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoints import open_checkpoint
from compressor.core.artifact import NOT_NEEDED, REPORT, WEIGHTS, Artifact, damaged_files
from compressor.core.errors import CompressorError
from compressor.core.packed import packed_tensors
from compressor.plan.recipe_file import restore_recipe

TOLERANCE = 0.01
"""Of a measure beside the recorded one, relative: kernels of other processors round otherwise."""
_MEASURES = ("perplexity", "kl_divergence", "top1_agreement", "cosine", "accuracy", "mean_relative_error")
_SMALLEST = 1e-3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `passed` is None where it could not be."""

    name: str
    passed: bool | None
    found: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(directory: Path, measure: bool = True) -> list[Check]:
    """All checks of an artifact; `measure` says whether quality is measured again.

    Raises:
        CheckpointError: There is no artifact, or its compression.json is damaged.
    """
    artifact = Artifact.open(directory)
    checks = [_hashes(artifact), _files(artifact), _provenance(artifact), _source(artifact), _opens(artifact)]
    if measure and all(check.passed is not False for check in checks):
        checks.append(_quality(artifact))
    return checks


def failures(checks: list[Check]) -> str:
    """What does not hold, as a sentence; empty where all of it does."""
    return "; ".join(f"{check.name}: {check.found}" for check in checks if check.passed is False)


def _hashes(artifact: Artifact) -> Check:
    damaged = damaged_files(artifact)
    n = len(artifact.report.get("sha256") or {})
    return Check("hashes", not damaged, "; ".join(damaged) or f"{n} files are as they were written")


def _files(artifact: Artifact) -> Check:
    known = {*(artifact.report.get("sha256") or {}), *NOT_NEEDED}
    names = {str(path.relative_to(artifact.directory)) for path in artifact.directory.rglob("*") if path.is_file()}
    unknown = sorted(names - known)
    return Check("files", not unknown, f"not of the artifact: {', '.join(unknown)}" if unknown else "no others")


def _provenance(artifact: Artifact) -> Check:
    missing = [key for key in ("compressor", "source", "recipe", "seed", "versions") if key not in artifact.report]
    if missing:
        return Check("provenance", False, f"{REPORT} has no {', '.join(missing)}")
    try:
        recipe = restore_recipe(artifact.report["recipe"], str(artifact.directory / REPORT))
    except CompressorError as error:
        return Check("provenance", False, str(error))
    gates = artifact.report.get("gates") or {}
    verdict = "" if gates.get("passed", True) else "; marked as failed: " + "; ".join(gates.get("failures", []))
    return Check("provenance", True, f"recipe {recipe.name}, seed {artifact.report['seed']}{verdict}")


def _source(artifact: Artifact) -> Check:
    source = artifact.report.get("source") or {}
    path = Path(str(source.get("path", "")))
    if not source.get("path") or not path.exists():
        return Check("original", None, f"{path} is not here; not compared")
    try:
        found = open_checkpoint(path, arch=source.get("arch")).digest()
    except CompressorError as error:
        return Check("original", None, f"cannot be opened: {error}")
    same = found == source.get("sha256")
    return Check("original", same, str(path) if same else f"{path} is not what it was compressed from")


def _opens(artifact: Artifact) -> Check:
    if packed_tensors(artifact.directory / WEIGHTS) is None:
        return Check("opens", False, f"{WEIGHTS} is no file of packed tensors")
    if not (artifact.directory / "model.onnx").exists():
        return Check("opens", True, f"{WEIGHTS}; there is no graph")
    from compressor.evaluate.session import open_session

    try:
        session = open_session(artifact.directory)
    except CompressorError as error:
        return Check("opens", False, str(error))
    return Check("opens", True, f"in onnxruntime, as {type(session).__name__.removesuffix('Session').lower()}")


def _quality(artifact: Artifact) -> Check:
    recorded = artifact.report.get("quality")
    if not recorded:
        return Check("quality", None, "none was measured when it was made")
    from compressor.evaluate.judge import evaluate

    try:
        found = evaluate(artifact.directory)
    except CompressorError as error:
        return Check("quality", None, f"not measured again: {error}")
    shown, wrong = [], []
    for key in _MEASURES:
        if recorded.get(key) is None or found.get(key) is None:
            continue
        shown.append(f"{key.replace('_', ' ')} {found[key]:.4g}")
        if abs(found[key] - recorded[key]) > TOLERANCE * max(abs(recorded[key]), _SMALLEST):
            wrong.append(f"{key.replace('_', ' ')} is {found[key]:.4g}, was {recorded[key]:.4g}")
    return Check("quality", not wrong, "; ".join(wrong) or ", ".join(shown))
