"""Text to calibrate and to evaluate on: plain files, JSONL, directories, data sets on disk, the built-in sample."""

from __future__ import annotations

import codecs
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from compressor.core.errors import DataError, suggestion
from compressor.core.log import LOGGER
from compressor.core.reading import refuse_special

SEPARATOR = "\n\n"
SAMPLE = Path(__file__).parent / "sample_text"
BETWEEN_SAMPLES = "\x1e"
"""Between the documents of the built-in sample, which have empty lines of their own."""
PARTS = ("calibration", "evaluation")
TEXT_SUFFIXES = (".txt", ".text", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
TEXT_FIELDS = ("text", "content", "document")
_HALF = re.compile("[\ud800-\udfff]")
"""Of a character, which JSON can escape alone and no file of text can hold."""


@dataclass(frozen=True)
class Text:
    """Documents in order, and where they came from."""

    source: str
    documents: tuple[str, ...]

    @cached_property
    def content(self) -> str:
        """The documents as one string, an empty line between them."""
        return SEPARATOR.join(self.documents)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, for provenance."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.content)

    def sentences(self) -> list[str]:
        """The sentences, those of a few words left out.

        Raises:
            DataError: There is none.
        """
        parts = [part.strip() for part in self.content.replace("\n", " ").split(". ")]
        found = [part + "." for part in parts if len(part) > 20]
        if not found:
            raise DataError(f"{self.source}: has no sentences; give running text")
        return found

    def split(self, evaluation_fraction: float = 0.15) -> tuple[Text, Text]:
        """The first part to calibrate on and the last to evaluate on, parted where a document or sentence ends."""
        at = int(len(self.content) * (1 - evaluation_fraction))
        ends = (self.content.rfind(end, at // 2, at) for end in (SEPARATOR, "\n", ". "))
        at = next((end + 1 for end in ends if end > 0), at)
        first, last = self.content[:at], self.content[at:].lstrip()
        return Text(f"{self.source} (first part)", (first,)), Text(f"{self.source} (last part)", (last,))


def load_text(source: str | Path | None = None, part: str = "calibration") -> Text:
    """The text of a file or directory; of the built-in sample when `source` is None.

    Args:
        source: .txt or .md; .jsonl with a field "text" or chat "messages" in each line; .parquet or .arrow with
            such a column; or a directory of these.
        part: Of the built-in sample: "calibration" or "evaluation".

    Raises:
        DataError: The source cannot be read, is empty or is not UTF-8.
    """
    if source is None:
        return _sample(part)
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{path}: does not exist; give a text file, JSONL, a directory of them, or nothing for the sample"
        )
    if path.is_dir():
        documents = tuple(_directory(path))
    elif path.suffix.lower() in READERS:
        documents = tuple(READERS[path.suffix.lower()](path))
    else:
        known = ", ".join(READERS)
        raise DataError(f"{path}: files ending in '{path.suffix}' are not text; give one of {known}, or a directory")
    documents = tuple(document for document in documents if document.strip())
    if not documents:
        raise DataError(f"{path}: holds no text; found {_size(path)} bytes without a word; give a file with text")
    return Text(str(path), documents)


def _sample(part: str) -> Text:
    if part not in PARTS:
        raise DataError(f"built-in sample: has no part '{part}'. {suggestion(part, PARTS)}")
    content = lzma.decompress((SAMPLE / f"{part}.txt.xz").read_bytes()).decode("utf-8")
    return Text(f"built-in sample ({part})", tuple(content.split(BETWEEN_SAMPLES)))


def _directory(path: Path) -> Iterator[str]:
    files = sorted(
        file for file in path.rglob("*") if file.suffix.lower() in READERS and file.exists() and not file.is_dir()
    )
    for file in files:
        refuse_special(file, DataError)
    if not files:
        raise DataError(f"{path}: holds no text files; expected files ending in {', '.join(READERS)}")
    return chain.from_iterable(READERS[file.suffix.lower()](file) for file in files)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read; {error.strerror}") from error
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name, encoding = ("UTF-16", "utf-16") if utf16 else ("UTF-8", "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not {name}; found byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            f"convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from error


def _plain(path: Path) -> Iterable[str]:
    return [_read(path)]


def _lines(path: Path) -> Iterator[str]:
    halves = 0
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: is not JSON; {error}; write one JSON object per line") from error
        document = _document(row, f"{path}, line {number}")
        halves += len(_HALF.findall(document))
        yield _HALF.sub("\N{REPLACEMENT CHARACTER}", document)
    if halves:
        LOGGER.warning("%s: holds %d halves of characters (lone surrogates); � stands in their place", path, halves)


def _document(row: Any, where: str) -> str:
    """The text of one row: a string, a field of text, or the turns of a chat."""
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for field in TEXT_FIELDS:
            if isinstance(row.get(field), str):
                return row[field]
        turns = row.get("messages") or row.get("conversations")
        if isinstance(turns, list):
            return "\n".join(_said(turn, where) for turn in turns)
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise DataError(f"{where}: has no text; found {found}; expected a field 'text', or 'messages' with 'content'")


def _said(turn: Any, where: str) -> str:
    """What one turn of a chat says: a string, or a list of parts of which some are text."""
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn
    if content is None:  # a call of a tool
        return ""
    if isinstance(content, list):
        parts = [part.get("text", "") if isinstance(part, dict) else part for part in content]
        content = "\n".join(part for part in parts if part) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise DataError(f"{where}: a turn has no text; expected 'content' of a string, or of parts with 'text'")
    return content


def _table(path: Path) -> Iterator[str]:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise DataError(f"{path}: needs pyarrow to be read, which is absent; `pip install pyarrow`") from error
    yield from (_document(row, f"{path}, row {number}") for number, row in enumerate(_rows(path)))


def _rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".parquet":
            batches: Iterable = pyarrow.parquet.ParquetFile(path).iter_batches()
        else:
            batches = _arrow_batches(path)
        for batch in batches:
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a whole {path.suffix[1:]} file; {error}") from error


def _arrow_batches(path: Path) -> Iterable:
    """An arrow file is one of two formats; only trying tells which."""
    import pyarrow
    import pyarrow.ipc

    source = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_stream(source)
    return (reader.get_batch(i) for i in range(reader.num_record_batches))


READERS: dict[str, Callable[[Path], Iterable[str]]] = {
    **dict.fromkeys(TEXT_SUFFIXES, _plain),
    **dict.fromkeys(LINE_SUFFIXES, _lines),
    **dict.fromkeys(TABLE_SUFFIXES, _table),
}
