"""What a run from Python tells, through the logger "compressor" of the standard library.

    logging.basicConfig(level="INFO")  # each stage with its time and memory, long ones every 15 seconds
    compressor.compress("smollm2", "llm-2bit", output="small")

The libraries that a run uses tell much at that level. To hear of this package alone: `logging.basicConfig()`, and
`logging.getLogger("compressor").setLevel("INFO")`.

At the level WARNING only what a caller may have missed: that no quality was measured, for example. Without a handler of
one's own nothing is printed, as of any library. The command logs nothing that it shows by itself: it hands a run its
own `core.progress.Progress`.
"""

from __future__ import annotations

import logging

from compressor.core.progress import LineProgress

LOGGER = logging.getLogger("compressor")
LOGGER.addHandler(logging.NullHandler())  # whoever uses the package says where its lines go


class LoggedProgress(LineProgress):
    """Progress as log lines at INFO: at most one per task every 15 seconds, and one when it is done."""

    def say(self, text: str) -> None:
        LOGGER.info("%s", text)
