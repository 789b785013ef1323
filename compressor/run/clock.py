"""Where a run's time and memory went, stage by stage."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from compressor.core.log import LOGGER
from compressor.core.machine import memory_of
from compressor.core.memory import give_back
from compressor.core.quantities import size
from compressor.core.report import Stage


@dataclass
class Clock:
    """`stages` has for each its wall seconds, the CPU seconds of this process and of others that it started, where they
    have ended, and this process's largest resident memory until its end."""

    stages: dict[str, Stage] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        cpu, wall = _cpu_seconds(), time.monotonic()
        try:
            yield
        finally:
            spent = {"cpu_seconds": _cpu_seconds() - cpu, "seconds": time.monotonic() - wall}
            stage = Stage.model_validate({key: round(value, 2) for key, value in spent.items()})
            peak = memory_of()["peak_resident"]
            if peak is not None:
                stage.peak_memory = peak
            self.stages[name] = stage
            LOGGER.info("%s: %s", name, _told(stage))
            gc.collect()  # networks hold themselves in cycles
            give_back()


def _cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


def _told(stage: Stage) -> str:
    told = f"{stage.seconds:.1f} s, {stage.cpu_seconds:.1f} s of CPU time"
    return told if stage.peak_memory is None else f"{told}, {size(stage.peak_memory)} at most so far"
