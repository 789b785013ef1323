"""Where a run's time and memory went, stage by stage."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from compressor.core.log import LOGGER
from compressor.core.machine import memory_of
from compressor.core.memory import give_back
from compressor.core.quantities import size


@dataclass
class Clock:
    """`stages` has for each its CPU and wall seconds, and the process's largest resident memory until its end."""

    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.monotonic()
        try:
            yield
        finally:
            spent = {"cpu_seconds": time.process_time() - cpu, "seconds": time.monotonic() - wall}
            self.stages[name] = {key: round(value, 2) for key, value in spent.items()}
            peak = memory_of()["peak_resident"]
            if peak is not None:
                self.stages[name]["peak_memory"] = peak
            LOGGER.info("%s: %s", name, _told(self.stages[name]))
            gc.collect()  # networks hold themselves in cycles
            give_back()


def _told(stage: dict[str, float]) -> str:
    told = f"{stage['seconds']:.1f} s, {stage['cpu_seconds']:.1f} s of CPU time"
    return f"{told}, {size(stage['peak_memory'])} at most so far" if "peak_memory" in stage else told
