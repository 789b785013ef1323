"""A worker ends with whoever started it: killed, a parent cannot end its workers, and they would write on unseen."""

from __future__ import annotations

import os
import signal
import threading
import time

GRACE_SECONDS = 10.0
"""From an interrupt, which a run ends on resumably, to the end by force."""


def end_with_parent() -> None:
    """Interrupts this process once its stdin, a pipe from the parent, is closed; ends it where that does not help."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    try:
        while os.read(0, 1024):
            pass
    except OSError:
        return  # no pipe: nobody to follow
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_SECONDS)
    os._exit(130)
