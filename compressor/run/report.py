"""What compression.json says of a run, but for what is measured on the artifact."""

from __future__ import annotations

import platform
from pathlib import Path

from compressor.checkpoints import Checkpoint
from compressor.checkpoints.hub import local, revision_of
from compressor.core.files import resolved
from compressor.core.identity import Identity
from compressor.core.report import Data, Facts, Report, Source
from compressor.core.work import Work
from compressor.data.samples import Samples
from compressor.plan.plan import Plan
from compressor.plan.recipe import Recipe
from compressor.run.prepare import Prepared


def report_of(
    start: Prepared, identity: Identity, recipe: Recipe, plan: Plan, structure: list[Facts], work: Work
) -> Report:
    """Of what an artifact was made, and how.

    Args:
        recipe: With the gates as they are held.
        plan: As it was carried out.
        structure: What each pass says that made the network another.
    """
    options, checkpoint, samples = start.options, start.checkpoint, start.samples
    report = Report(
        compressor=identity.versions["compressor"],
        source=_source(checkpoint, identity, options.model, options.arch),
        recipe=recipe.to_dict(),
        seed=identity.seed,
        mode=identity.mode,
        identity=identity,
        data=_data(samples, identity, {"data": options.data, "eval": options.eval}),
        versions={**identity.versions, "python": platform.python_version()},
        skipped={tensor.name: tensor.reason for tensor in plan.tensors if tensor.reason},
        learning=work.log,
    )
    if structure:
        report.structure = structure
    return report


def _source(checkpoint: Checkpoint, identity: Identity, model: str, arch: str | None) -> Source:
    path = local(model)
    described = checkpoint.describe() | {"path": str(resolved(path)), "revision": revision_of(path)}
    return Source.model_validate(described | {"sha256": identity.model["weights"], "arch": arch})


def _data(samples: Samples, identity: Identity, arguments: dict[str, str | None]) -> Data:
    return Data(
        calibration=None if samples.calibration is None else samples.calibration.source,
        evaluation=None if samples.evaluation is None else samples.evaluation.source,
        sha256={name: identity.data[name] for name in ("calibration", "evaluation")},
        overlap=samples.overlap,
        arguments={name: _found_again(argument) for name, argument in arguments.items()},
    )


def _found_again(argument: str | None) -> str | None:
    """A path that holds in any folder; module:callable as it is."""
    return str(resolved(Path(argument))) if argument is not None and Path(argument).exists() else argument
