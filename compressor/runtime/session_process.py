"""The process that a session of its own runs in: questions come on stdin, answers go out on stdout."""

from __future__ import annotations

import os
import sys

from compressor.runtime.sessions import serve

if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else prints must not come between
    serve(sys.stdin.buffer, channel)
