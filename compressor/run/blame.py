"""Where a loss came in: which tensors the outputs suffer from.

Asked when a gate has failed. Groups of alike tensors (those of one pass, with one name but for the
numbers in it) are put back to the original's, one group at a time, and the outputs on a few calibration samples are
compared with the original's again. The shares need not add up to one: errors meet in the outputs, and may cancel there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoints import Checkpoint
from compressor.core.batch import Batch
from compressor.core.progress import Progress
from compressor.core.report import Blame
from compressor.core.roles import folded
from compressor.core.tensors import EncodedTensors
from compressor.plan.plan import Plan
from compressor.widths.losses import Judge, Kind, outputs, probe

NAMED = 3


def blame(
    checkpoint: Checkpoint, tensors: EncodedTensors, plan: Plan, batches: list[Batch], kind: Kind, labelled: bool,
    progress: Progress,
) -> list[Blame]:  # fmt: skip
    """Groups of tensors, worst first."""
    if not batches:
        return []
    samples = probe(batches, kind)
    judge = Judge.of(checkpoint, samples, kind, labelled)
    changes = _changes(checkpoint, tensors)
    groups = _groups(plan, changes)
    with progress.task("finding where the loss came in", len(groups) + 1) as task:

        def rise(changed: Mapping[str, Any]) -> float:
            found = judge.judge(list(outputs(checkpoint, samples, changed))).rise
            task.advance()
            return found

        whole = rise(changes)
        if not whole:
            return []
        found = []
        for (pattern, by), names in groups.items():
            rest = rise({name: change for name, change in changes.items() if name not in names})
            found.append(Blame(tensors=pattern, by=by, share=round(1 - rest / whole, 4)))
    return sorted(found, key=lambda each: (-each.share, each.tensors))


def blamed(found: list[Blame]) -> str:
    """The worst of `blame` as a sentence; nothing where nothing helps."""
    worst = [each for each in found[:NAMED] if each.share > 0]
    parts = [f"{each.share:.0%} by {each.by} at {each.tensors}" for each in worst]
    return f"the loss came in {', '.join(parts)}" if parts else ""


def _changes(checkpoint: Checkpoint, tensors: EncodedTensors) -> dict[str, Any]:
    """What the artifact computes with, where shapes are still the original's."""
    floats = [name for name in tensors if name in checkpoint.tensors]
    alike = [name for name in floats if checkpoint.tensors[name].shape == tuple(tensors.describe(name)["tensor_shape"])]
    return {name: partial(_decoded, tensors, name) for name in alike}


def _decoded(tensors: EncodedTensors, name: str) -> Tensor:
    with torch.no_grad():
        return tensors[name].decode()


def _groups(plan: Plan, changes: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """(names with * for numbers, what changed them) -> names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for tensor in plan.tensors:
        if tensor.name in changes and tensor.by:
            groups.setdefault((folded(tensor.name), tensor.by), []).append(tensor.name)
    tuned = [tensor.name for tensor in plan.tensors if tensor.name in changes and not tensor.by]
    return groups | ({("what is not encoded", "learning"): tuned} if tuned else {})
