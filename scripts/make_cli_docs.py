#!/usr/bin/env python3
"""Writes docs/cli.md: the help of every command, as it prints it. A test checks that the file is current."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"


def help_text(*command: str) -> str:
    """What `compress COMMAND --help` prints, 100 columns wide."""
    from compressor.cli.commands import app

    printed = io.StringIO()
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    try:
        with contextlib.redirect_stdout(printed):
            app([*command, "--help"], prog_name="compress", standalone_mode=False)
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())


def page() -> str:
    """The whole page."""
    from compressor.cli.help_examples import COMMANDS

    parts = ["# The command", "Made by scripts/make_cli_docs.py from the help texts; do not edit."]
    for command in ("", *COMMANDS):
        title = f"compress {command}".strip()
        parts += [f"## {title}", f"```text\n{help_text(*command.split())}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
