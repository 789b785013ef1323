"""`python -m compressor` and `compress`: the command, and what is said where not even that can be loaded."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command; status 4 where there is too little memory to load it. Status 1 would say that a gate failed."""
    try:
        from compressor.cli.commands import main as command
    except (MemoryError, ImportError, OSError) as error:
        print(f"Error: the command cannot be loaded; {type(error).__name__}: {error}; free some memory, or install "
              "the package again", file=sys.stderr)  # fmt: skip
        sys.exit(4)
    command()


if __name__ == "__main__":
    main()
