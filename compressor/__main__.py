"""`python -m compressor` and `compress`: the command, in a process that is watched.

Without -P, Python puts the folder that it runs in first on the path of `python -m`; that goes before all imports.
"""

from __future__ import annotations

import os
import sys

if not sys.flags.safe_path and sys.path and sys.path[0] == os.getcwd():
    del sys.path[0]

# MKL divides long products among its threads, and the last bits with them, unless it is told not to before its first.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from compressor.runtime.supervisor import HELP_OPTIONS, RESOURCES, end_with_stdin, supervised


def main() -> None:
    """Runs the command; whatever ends it, the status says why."""
    if HELP_OPTIONS & set(sys.argv[1:]):
        _command()
    else:
        supervised(_command)


def worker() -> None:
    """As `main`, for a job of a batch: it ends with the batch, whose pipe is its stdin."""

    def command() -> None:
        end_with_stdin()
        _command()

    supervised(command)


def _command() -> None:
    try:
        from compressor.cli.commands import main as command
    except (MemoryError, ImportError, OSError) as error:
        print(f"Error: the command cannot be loaded; {type(error).__name__}: {error}; free some memory, or install "
              "the package again", file=sys.stderr)  # fmt: skip
        sys.exit(RESOURCES)
    command()


if __name__ == "__main__":
    main()
