"""Is an artifact still what its compression.json says: files, figures, provenance, weights, and what it computes.

Hashes that lie beside the files that they are of show damage, not intent: whoever changes one can change the other.
What cannot be made up is held against the original: how far the weights are from its weights, and how good what
onnxruntime computes is beside it. Where neither could be, nothing was verified, and that is a failure.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoints.opening import model_digests
from compressor.core.artifact import (
    INSTALLED,
    NOT_NEEDED,
    REPORT,
    SEAL,
    WEIGHTS,
    Artifact,
    damaged_files,
    foreign_files,
    is_installed,
)  # fmt: skip
from compressor.core.errors import CompressorError, DataError, ResourceError
from compressor.core.packed import packed_tensors
from compressor.core.sizes import GRAPH, chosen_size, graph_file
from compressor.evaluate.again import (
    Given,
    named_paths,
    open_original,
    open_weights,
    original_of,
    recipe_of,
    refuse_unreadable,
    samples_again,
)

TOLERANCE = 0.01
"""Of a measure beside the recorded one, relative: kernels of other processors round otherwise."""
_MEASURES = ("perplexity", "kl_divergence", "top1_agreement", "cosine", "accuracy", "mean_relative_error")
_SMALLEST = 1e-3
_ROUNDED = 1e-5
"""How far errors of weights may be from the recorded ones, which have six places."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, by its `name`, and what was `found`: `passed` is None where it could not be."""

    name: str
    passed: bool | None
    found: str

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def verify(
    directory: Path, measure: bool = True, given: Given | None = None, size: str | None = None
) -> list[Check]:  # fmt: skip
    """All checks of the artifact in `directory`.

    Args:
        directory: The artifact's.
        measure: Whether its weights and its quality are held against the original.
        given: The original, its architecture and data, where they are not what and where they were.
        size: Of an artifact of several sizes, whose graph and quality are looked at; by default the largest's.

    Raises:
        UsageError: It has no such size.
        CheckpointError: There is no artifact, or its compression.json is damaged; or the original that is given cannot
            be read.
        DataError: The data that are given cannot be read, or do not fit.
        ResourceError: There is too little memory to look.
    """
    artifact, given = Artifact.open(directory), given or Given()
    refuse_unreadable(given)
    file = graph_file(artifact.directory, size)
    checks = [
        _hashes(artifact), _files(artifact), _figures(artifact), _provenance(artifact), _original(artifact, given),
        _opens(artifact, file),
    ]  # fmt: skip
    if is_installed(artifact.directory):
        checks.append(_installed(artifact))
    if measure and all(check.passed is not False for check in checks):
        recorded = artifact.report.get("quality")
        if file != GRAPH and size is not None:
            recorded = chosen_size(artifact.directory, size)[1].quality
        against = [_weights(artifact, given), _quality(artifact, given, recorded, file)]
        checks += [*against, _conclusion(against, named_paths(artifact, given))]
    return checks


def _reason(error: CompressorError, *given: str | None) -> str:
    """Why something was not looked at; raised where that lies with the machine, or with what the user has `given`."""
    if isinstance(error, ResourceError) or any(given):
        raise error
    return str(error)


def failures(checks: list[Check]) -> str:
    """What of the `checks` does not hold, as a sentence; empty where all of it does."""
    return "; ".join(f"{check.name}: {check.found}" for check in checks if check.passed is False)


def _hashes(artifact: Artifact) -> Check:
    damaged = damaged_files(artifact)
    n = len(artifact.report.get("sha256") or {})
    said = "" if SEAL in artifact.report else f"; {REPORT} and the page have none, as before there were seals"
    return Check("hashes", not damaged, "; ".join(damaged) or f"{n} files are as they were written{said}")


def _files(artifact: Artifact) -> Check:
    others = foreign_files(artifact.directory)
    unknown = [name for name in others if not (artifact.directory / name).is_symlink()]
    links = [name for name in others if name not in unknown]
    recorded = {*(artifact.report.get("sha256") or {}), *NOT_NEEDED, *INSTALLED}
    present = {path.relative_to(artifact.directory).as_posix() for path in artifact.directory.rglob("*")}
    unknown += sorted(present - recorded - set(others))
    wrong = [f"not of the artifact: {', '.join(unknown)}"] if unknown else []
    wrong += [f"a link: {', '.join(links)}"] if links else []
    return Check("files", not wrong, "; ".join(wrong) or "no others, no links")


def _figures(artifact: Artifact) -> Check:
    """What compression.json says in sum, against the files and against itself."""
    report, wrong = artifact.report, []
    size, quality = report.get("size") or {}, report.get("quality") or {}
    files = {name: n for name, n in (size.get("files") or {}).items() if (artifact.directory / name).is_file()}
    wrong += [f"size of {name} is {n}" for name, n in files.items() if (artifact.directory / name).stat().st_size != n]
    if size and size.get("bytes") != sum((size.get("files") or {}).values()):
        wrong.append(f"size is {size.get('bytes')}, its files have {sum((size.get('files') or {}).values())}")
    ratio, before, after = (quality.get(key) for key in ("ratio", "original_perplexity", "perplexity"))
    if ratio is not None and before and after is not None and not math.isclose(ratio, after / before, rel_tol=1e-6):
        wrong.append(f"ratio of perplexities is {ratio:.4g}, should be {after / before:.4g}")
    gates = report.get("gates") or {}
    if gates and gates.get("passed", True) is bool(gates.get("failures")):
        wrong.append("gates passed and failed")
    return Check("figures", not wrong, "; ".join(wrong) or "as the files and each other; speed is of its machine")


def _provenance(artifact: Artifact) -> Check:
    missing = [key for key in ("compressor", "source", "recipe", "seed", "versions") if key not in artifact.report]
    if missing:
        return Check("provenance", False, f"{REPORT} has no {', '.join(missing)}")
    try:
        recipe = recipe_of(artifact)
    except CompressorError as error:
        return Check("provenance", False, _reason(error))
    gates = artifact.report.get("gates") or {}
    verdict = "" if gates.get("passed", True) else "; marked as failed: " + "; ".join(gates.get("failures", []))
    return Check("provenance", True, f"recipe {recipe.name}, seed {artifact.report['seed']}{verdict}")


def _original(artifact: Artifact, given: Given) -> Check:
    try:
        path = original_of(artifact, given)
    except CompressorError as error:
        return Check("original", None, f"not compared: {_reason(error)}")
    try:
        same = model_digests(path)["weights"] == (artifact.report.get("source") or {}).get("sha256")
    except CompressorError as error:
        return Check("original", None, f"cannot be opened: {_reason(error, given.original)}")
    return Check("original", same, str(path) if same else f"{path} is not what it was compressed from")


def _opens(artifact: Artifact, file: str) -> Check:
    if packed_tensors(artifact.directory / WEIGHTS) is None:
        return Check("opens", False, f"{WEIGHTS} is no file of packed tensors")
    if not (artifact.directory / file).exists():
        return Check("opens", True, f"{WEIGHTS}; there is no graph")
    from compressor.evaluate.session import open_session

    try:
        session = open_session(artifact.directory / file)
    except CompressorError as error:
        return Check("opens", False, _reason(error))
    return Check("opens", True, f"in onnxruntime, as {type(session).__name__.removesuffix('Session').lower()}")


def _installed(artifact: Artifact) -> Check:
    """Of what `compress install` has made: it computes whatever is in it, whatever the artifact's own files say."""
    from compressor.evaluate.installation import installation_state

    try:
        return Check("installed", *installation_state(artifact))
    except CompressorError as error:
        return Check("installed", False, _reason(error))


def _weights(artifact: Artifact, given: Given) -> Check:
    """Whether each tensor is as far from the original's as it was when it was made."""
    recorded = artifact.report.get("errors")
    if not recorded:
        return Check("weights", None, f"{REPORT} does not say how far they are from the original's")
    if artifact.report.get("structure"):
        return Check("weights", None, "not compared: they are of a smaller network than the original's")
    from compressor.core.tensors import EncodedTensors
    from compressor.evaluate.distances import weight_errors

    try:
        checkpoint = open_weights(artifact, given)
        found = weight_errors(checkpoint, EncodedTensors([artifact.directory / WEIGHTS]))
    except CompressorError as error:
        return Check("weights", None, f"not compared: {_reason(error)}")
    if not found:
        return Check("weights", None, "not compared: none is another than the original's, by the names in its files")
    wrong = [
        f"{name} is {found.get(name, 0):.4g} from the original's, was {recorded.get(name, 0):.4g}"
        for name in sorted({*found, *recorded})
        if abs(found.get(name, 0) - recorded.get(name, 0)) > _ROUNDED + 1e-3 * recorded.get(name, 0)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Check("weights", False, "; ".join(wrong[:3]) + more)
    worst = max(found, key=lambda name: found[name])
    return Check(
        "weights", True, f"{len(found)} are as far from the original's as they were; {worst}: {found[worst]:.3g}"
    )


def _quality(artifact: Artifact, given: Given, recorded: dict[str, Any] | None, file: str) -> Check:
    recipe, data = recipe_of(artifact), artifact.report.get("data") or {}
    if not recorded:
        has_graph = (artifact.directory / "model.onnx").is_file()
        if has_graph and data.get("evaluation") and not recipe.evaluation.skipped:
            return Check(
                "quality", False, f"{REPORT} holds none, though its recipe and its data say that it was measured"
            )
        return Check("quality", None, "none was measured when it was made")
    from compressor.evaluate.judge import evaluate_on

    try:
        checkpoint = open_original(artifact, given)
        samples = samples_again(artifact, checkpoint, recipe, given)
        if samples.digest()["evaluation"] != (data.get("sha256") or {}).get("evaluation"):
            return Check("quality", None, "not measured again: the data are not those that it was evaluated on")
        return _beside(recorded, evaluate_on(artifact, checkpoint, samples, recipe, file))
    except DataError as error:
        return Check("quality", None, f"not measured again: {_reason(error, given.data, given.evaluation)}")
    except CompressorError as error:
        return Check("quality", None, f"not measured again: {_reason(error)}")


def _beside(recorded: dict[str, Any], found: dict[str, Any]) -> Check:
    shown, wrong = [], []
    for key in _MEASURES:
        if recorded.get(key) is None or found.get(key) is None:
            continue
        shown.append(f"{key.replace('_', ' ')} {found[key]:.4g}")
        if not abs(found[key] - recorded[key]) <= TOLERANCE * max(abs(recorded[key]), _SMALLEST):
            wrong.append(f"{key.replace('_', ' ')} is {found[key]:.4g}, was {recorded[key]:.4g}")
    if not shown:
        return Check("quality", None, "not measured again: nothing that was recorded is measured now")
    return Check("quality", not wrong, "; ".join(wrong) or ", ".join(shown))


def _conclusion(against: list[Check], named: list[str]) -> Check:
    """Whether anything was found that a stranger cannot have written into the folder."""
    done = [check.name for check in against if check.passed is not None]
    if not done:
        return Check(
            "verified", False, "only that the artifact agrees with itself, as what a stranger made would; see what was "
            "not compared above, or check files alone with --quick"
        )  # fmt: skip
    said = f"; read as {REPORT} names them: {', '.join(named)}" if named else ""
    return Check("verified", True, f"{' and '.join(done)}, against the original{said}")
