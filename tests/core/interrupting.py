"""A progress that ends a run in the middle of one of its stages, as Ctrl-C does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from compressor.core.progress import Progress, Task


class Interrupting(Progress):
    """Raises KeyboardInterrupt once tasks whose description begins with `what` have come `after` steps.

    `seen` are the descriptions of all that began. Without a `what` it only notes them.
    """

    def __init__(self, what: str = "", after: float = 1) -> None:
        self.what, self.left = what, after if what else math.inf
        self.seen: list[str] = []

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        self.seen.append(description)
        yield Ending(self) if description.startswith(self.what) else Task()


class Ending(Task):
    """A task that counts down."""

    def __init__(self, progress: Interrupting) -> None:
        self.progress = progress

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.progress.left -= steps
        if self.progress.left <= 0:
            raise KeyboardInterrupt
