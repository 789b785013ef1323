"""Which workshop a network's students come from, and where they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from compressor.core.batch import Batch, Examples
from compressor.core.errors import RecipeError
from compressor.core.machine import cores
from compressor.graph.blocks import block_names
from compressor.passes.settings.n2n import N2nSettings
from compressor.runtime.torchrun import n_processes
from compressor.structure.students.blocks import BlockWorkshop
from compressor.structure.students.laboratory import Laboratory
from compressor.structure.students.layers import LayerWorkshop
from compressor.structure.students.pool import Here, Pool, Processes, RayPool

SEARCHING = 0.9
"""Of the pass's work, for the progress."""


def students_of(
    module: nn.Module, batches: Sequence[Batch], labels: Sequence[Tensor] | None, settings: N2nSettings,
    examples: Callable[[], Examples], seed: int, folder: Path | None, advance: Callable[[float, str], None],
) -> Laboratory:  # fmt: skip
    """The students of a teacher.

    Raises:
        RecipeError: It was started under torchrun.
        CheckpointError: The network is not made of such units.
    """
    if n_processes() > 1:
        raise RecipeError(
            "n2n: trains its students in processes of its own, not under torchrun; start it without, and write jobs: 4 "
            "or engine: ray"
        )
    units = settings.units if settings.units != "auto" else unit_of(module)
    settings = settings.model_copy(update={"units": units})
    training = None if folder is None else folder / "final"

    def finishing(share: float, note: str) -> None:
        advance((1 - SEARCHING) * share, note)

    if units == "layer":
        workshop = LayerWorkshop(module, examples(), settings, seed, training, finishing)
    else:
        workshop = BlockWorkshop(module, batches, labels, settings, examples, seed, training, finishing)
    jobs = settings.jobs or cores()

    def start() -> Pool:
        if settings.engine == "ray":
            return RayPool(workshop.evaluator, _needed(folder), settings.address)
        if jobs == 1 or folder is None:
            return Here(workshop.evaluator)
        return Processes(workshop.evaluator, folder, jobs)

    share = SEARCHING / expected(settings, len(workshop.layers))
    return Laboratory(workshop, start, folder, lambda note: advance(share, f"a student: {note}"))


def unit_of(module: nn.Module) -> str:
    """block where there are repeated blocks without convolutions of images."""
    names = block_names(module)
    if names == [""]:
        return "layer"
    blocks = [module.get_submodule(name) for name in names]
    return "layer" if any(isinstance(child, nn.Conv2d) for block in blocks for child in block.modules()) else "block"


def expected(settings: N2nSettings, n_layers: int) -> int:
    """How many students will be judged, at most."""
    greedy = sum(n_layers - i for i in range(settings.remove or 0))
    if settings.policy == "influence":
        return 2
    if settings.policy == "greedy":
        return 1 + greedy
    rollouts = settings.rollouts * (settings.search_epochs + settings.shrink_epochs)
    return 1 + min(settings.max_students or rollouts, rollouts) + (greedy if settings.start == "greedy" else 0)


def _needed(folder: Path | None) -> Path:
    if folder is None:
        raise RecipeError("n2n: engine ray needs a working folder that all machines see")
    return folder
