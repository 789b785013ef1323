"""What is said to people: a stranger's text made harmless, and streams whose end or limits no work depends on.

Names come from files of other people: they may hold terminal escapes, markup, letters that the console has no sign
for. All that is printed goes through `printable`, and through streams that `open_streams` has put in place: one that
nobody reads any more, or a full disk behind one, ends nothing half way.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import select
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, ESC and CSI among them
    "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"  # what turns a line around, or ends it
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"  # what no file of text and no XML can hold
)
_STAND_INS: Mapping[str, str] = {
    "×": "x", "→": "->", "−": "-", "–": "-", "—": "-", "·": "|", "…": "...", "≤": "<=", "≥": ">=", "α": "a", "‖": "|",
    "’": "'", "“": '"', "”": '"', "\u00a0": " ",
}  # fmt: skip
STAND_IN = "compressor.stand-in"


def printable(text: str) -> str:
    """The text without what a terminal, a page or XML would take for more than a letter: � stands in its place."""
    return _HARMFUL.sub("�", text)


def _stood_in(error: UnicodeError) -> tuple[str, int]:
    """Letters that the console's encoding lacks, in ASCII."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(_STAND_INS.get(letter, "?") for letter in letters), error.end


codecs.register_error(STAND_IN, _stood_in)


class _Descriptor(io.FileIO):
    """A descriptor that keeps its first failure, and then takes whatever it is given."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        while self.failure is None:
            try:
                written = super().write(data)
            except OSError as error:
                self.failure = error
            else:
                if written is not None:
                    return written
                select.select([], [self.fileno()], [])  # somebody made it one that does not wait
        return memoryview(data).nbytes


def occupy_descriptors() -> None:
    """Opens what is closed of stdin, stdout and stderr: the next file would get its number, and be written to."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def open_streams() -> None:
    """Puts streams in the place of stdout and stderr that never raise."""
    occupy_descriptors()
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not None and before is not getattr(sys, f"__{name}__"):
            continue  # somebody has put their own there
        encoding = getattr(before, "encoding", None) or "utf-8"
        binary = io.BufferedWriter(_Descriptor(number, "w", closefd=False))
        if before is not None:
            before.flush()
        stream = io.TextIOWrapper(binary, encoding, STAND_IN, line_buffering=True, write_through=number == 2)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def failure_of(stream: TextIO | None) -> OSError | None:
    """Why what was printed did not arrive; None where it did, or where nobody wanted it any more."""
    descriptor = getattr(getattr(stream, "buffer", None), "raw", None)
    if stream is None or not isinstance(descriptor, _Descriptor):
        return None
    stream.flush()
    failure = descriptor.failure
    return None if failure is None or failure.errno in (errno.EPIPE, errno.ECONNRESET) else failure


def make_console(stderr: bool = False, width: int | None = None) -> Console:
    """rich's console for strangers' texts: nothing in them is markup, an emoji's name or an escape."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **settings: Any) -> Text:  # every text in a table comes by here
            settings |= {"markup": False, "emoji": False}
            return super().render_str(printable(text), **settings)

        def on_broken_pipe(self) -> None:
            """Nobody reads on: that ends nothing."""

    return PlainConsole(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)
