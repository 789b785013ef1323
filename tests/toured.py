"""docs/tour.md's run, told by what it does on the disk: `python -m tests.toured FOLDER` prints {file: bytes} as JSON.

In a process of its own, since Python's audit hooks stay for as long as the process lives. A file's bytes are those that
it had when it got its name, or when it was removed; null where neither is seen.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "tour.md"


def command() -> list[str]:
    """What the page tells people to run, after `compress`."""
    block = re.search(r"^compress (.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert block
    return shlex.split(block[1].replace("\\\n", " "))


def main(folder: Path) -> None:
    """Runs it in `folder`."""
    from tests import pico

    os.chdir(folder)
    pico.llama(Path("model"))
    Path("words.txt").write_text(pico.text(1, 12000), encoding="utf-8")
    seen: dict[str, int | None] = {}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove") or not isinstance(arguments[0], str | Path):
            return
        before = Path(arguments[0])
        path = (Path(arguments[1]) if event == "os.rename" else before).absolute()
        if path.is_relative_to(folder):
            named = event in ("os.rename", "os.remove") and before.is_file()
            name = path.relative_to(folder).as_posix()
            seen[name] = before.stat().st_size if named else seen.get(name)

    from compressor.cli.commands import app

    sys.addaudithook(watch)
    app(command(), prog_name="compress", standalone_mode=False)
    for path in Path("small").iterdir():
        seen[path.as_posix()] = path.stat().st_size
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
