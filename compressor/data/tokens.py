"""Text as tokens: tokenised once, kept on disk, cut into windows with what the tokenizer puts around a text.

Running text has no special tokens of its own. A network that was trained on texts after a <bos> is not itself without:
Gemma 3's perplexity is three times as high, and what its layers see is of another size.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.checkpoints.reach import offline
from compressor.core.errors import CompressorError, DataError
from compressor.core.files import whole
from compressor.core.resources import refuse_shortage

if TYPE_CHECKING:
    from compressor.data.text import Text

_WORD = "word"
"""Around which a tokenizer puts what it puts around a text."""
PIECE = 1 << 24
"""Characters that are tokenised at a time: texts beyond it are cut at line ends or spaces."""


def cache_directory() -> Path:
    """Where tokens are kept: $COMPRESSOR_HOME, else compressor/ in $XDG_CACHE_HOME or ~/.cache."""
    if home := os.environ.get("COMPRESSOR_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compressor"


def tokenize(text: Text | str, tokenizer: str | Path, cache_dir: str | Path | None = None) -> np.ndarray:
    """The tokens of a text, int32 (n,), without special tokens.

    Args:
        tokenizer: A tokenizer.json, or a directory with the files of a tokenizer.
        cache_dir: Where tokens are kept between runs; the user's cache by default.

    Raises:
        DataError: There is no tokenizer, or it cannot be read.
    """
    content = text if isinstance(text, str) else text.content
    files = _tokenizer_files(Path(tokenizer))
    digest = hashlib.sha256(content.encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    kept = Path(cache_dir or cache_directory()) / "tokens" / f"{digest.hexdigest()[:40]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent or damaged: tokenised again
        return np.load(kept)
    with explained(files[0]):
        tokens = _tokenize(content, files)
    with contextlib.suppress(OSError):  # a cache that cannot be written is only slower
        _keep(tokens, kept)
    return tokens


@dataclass(frozen=True)
class Frame:
    """What stands around the text of a window: ids (n,) before it and after it, int64."""

    before: np.ndarray
    after: np.ndarray

    def room(self, length: int) -> int:
        """How many tokens of text a window of `length` tokens holds.

        Raises:
            DataError: None.
        """
        taken = len(self.before) + len(self.after)
        if length <= taken:
            raise DataError(
                f"text: a window of {length} tokens has no room for text; the tokenizer puts {taken} tokens around "
                "each one; ask for longer windows"
            )
        return length - taken

    def around(self, parts: np.ndarray) -> np.ndarray:
        """Text (n, tokens) with the frame around each row: int64 (n, tokens before + tokens + tokens after)."""
        sides = (np.broadcast_to(side, (len(parts), len(side))) for side in (self.before, self.after))
        return np.concatenate([next(sides), parts, next(sides)], axis=1)


def frame_of(tokenizer: str | Path, family: str) -> Frame:
    """What a tokenizer puts around a text by itself, such as [CLS] and [SEP]; often nothing.

    Args:
        tokenizer: A tokenizer.json, or a directory with the files of a tokenizer.
        family: Of the network that reads it. An "encoder" reads whole texts; for a "decoder" a window is a piece of
            one, which begins as texts do, with <bos> perhaps, and goes on.

    Raises:
        DataError: There is no tokenizer, or it cannot be read.
    """
    files = _tokenizer_files(Path(tokenizer))
    with explained(files[0]):
        before, after = _put_around(tuple(files), tuple(file.stat().st_mtime_ns for file in files))
    return Frame(*(np.array(side, dtype=np.int64) for side in (before, after if family == "encoder" else ())))


@functools.lru_cache(maxsize=8)
def _put_around(files: tuple[Path, ...], stamps: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The ids before and after a text; a run asks several times, and a large tokenizer takes a second to read."""
    encode = _encode(files)
    alone, whole = (list(encode(_WORD, add_special_tokens=each)) for each in (False, True))
    at = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), None)
    return ([], []) if at is None else (whole[:at], whole[at + len(alone) :])


def encode_sentences(sentences: Sequence[str], tokenizer: str | Path, length: int) -> dict[str, np.ndarray]:
    """Sentences as an encoder takes them: special tokens, padded to the longest, at most `length` tokens.

    Returns:
        input_ids, attention_mask and token_type_ids, int64 (sentences, tokens).
    """
    files = _tokenizer_files(Path(tokenizer))
    if files[0].name != "tokenizer.json":
        slow = auto_tokenizer(files[0].parent)
        with explained(files[0].parent):
            encoded = slow(list(sentences), padding=True, truncation=True, max_length=length, return_tensors="np")
            return {name: np.asarray(value, dtype=np.int64) for name, value in encoded.items()}
    with explained(files[0]):
        return _encoded_fast(sentences, files[0], length)


def _encoded_fast(sentences: Sequence[str], file: Path, length: int) -> dict[str, np.ndarray]:
    fast = fast_tokenizer(file)
    padding = fast.padding or {}
    fast.enable_truncation(length)
    fast.enable_padding(pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]"))
    rows = fast.encode_batch(list(sentences))
    return {
        "input_ids": np.array([row.ids for row in rows], dtype=np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], dtype=np.int64),
        "token_type_ids": np.array([row.type_ids for row in rows], dtype=np.int64),
    }


def windows(
    tokens: np.ndarray, length: int, n: int | None = None, seed: int | None = None, frame: Frame | None = None
) -> np.ndarray:
    """Windows of consecutive tokens, int64 (n, length), the frame's counted.

    Without a seed, the first `n` (all, by default) side by side from the start. With one, `n` at random places; they
    may overlap unless there is room for all, where they are drawn from the side-by-side ones.

    Raises:
        DataError: The text is too short for one window, or for `n` side by side; a window has room for no text.
    """
    if frame is not None:
        return frame.around(windows(tokens, frame.room(length), n, seed))
    available = len(tokens) // length
    if available == 0:
        raise DataError(
            f"text: is too short for one window; found {len(tokens)} tokens, needed {length}; "
            f"give more text or shorter windows"
        )
    side_by_side = np.asarray(tokens[: available * length], dtype=np.int64).reshape(available, length)
    if seed is None:
        if n is not None and n > available:
            raise DataError(
                f"text: is too short for {n} windows of {length} tokens; found {len(tokens)} tokens, needed "
                f"{n * length}; give more text or ask for at most {available} windows"
            )
        return side_by_side[:n]
    generator = np.random.default_rng(seed)
    n = available if n is None else n
    if n <= available:
        return side_by_side[generator.permutation(available)[:n]]
    starts = generator.integers(0, len(tokens) - length + 1, size=n)
    return np.stack([np.asarray(tokens[start : start + length], dtype=np.int64) for start in starts])


def refuse_tokens(text: Text, tokenizer: str | Path, family: str, window: int, vocabulary: int | None) -> None:
    """Refuses a text of fewer tokens than a window, and one with tokens that the network has no entry for.

    Raises:
        DataError: It is such a text.
    """
    ids = tokenize(text, tokenizer)
    windows(ids, window, 1, frame=frame_of(tokenizer, family))
    if vocabulary is not None and ids.max() >= vocabulary:
        raise DataError(
            f"{text.source}: the tokenizer makes token {ids.max()} of it, and the network's table has {vocabulary} "
            "entries; put the tokenizer beside the model that belongs to it"
        )


def _tokenizer_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "tokenizer.json").is_file():
        return [path / "tokenizer.json"]
    patterns = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
    found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if not found:
        raise DataError(
            f"{path}: has no tokenizer; expected tokenizer.json, or vocab and merges; put the model's tokenizer "
            f"files beside its weights"
        )
    return found


def _encode(files: Sequence[Path]) -> Callable[..., Sequence[int]]:
    """What makes ids of a text, and takes `add_special_tokens`."""
    if files[0].suffix == ".json" and len(files) == 1:
        fast = fast_tokenizer(files[0])
        fast.no_padding()
        return lambda text, **options: fast.encode(text, **options).ids
    return auto_tokenizer(files[0].parent).encode


def _tokenize(content: str, files: list[Path]) -> np.ndarray:
    encode = _encode(files)
    parts = (encode(piece, add_special_tokens=False) for piece in _pieces(content))
    return np.concatenate([np.array(part, dtype=np.int32) for part in parts])


def _pieces(content: str) -> list[str]:
    pieces = []
    while len(content) > PIECE:
        cut = max(content.rfind("\n", 0, PIECE), content.rfind(" ", 0, PIECE))
        cut = cut if cut > 0 else PIECE
        pieces.append(content[:cut])
        content = content[cut:]
    return [*pieces, content]


def fast_tokenizer(file: Path) -> Any:
    """The tokenizer of a tokenizer.json, which cuts off nothing.

    Raises:
        DataError: It cannot be read.
    """
    from tokenizers import Tokenizer

    with explained(file, "is not a tokenizer that `tokenizers` reads"):
        fast = Tokenizer.from_file(str(file))
    fast.no_truncation()
    return fast


def auto_tokenizer(directory: Path) -> Any:
    """The tokenizer of a folder as transformers reads it; nothing of it is run, nothing fetched.

    Raises:
        DataError: It cannot be read.
    """
    from transformers import AutoTokenizer

    with offline(), explained(directory, "its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def explained(place: Path, what: str = "its tokenizer cannot be used") -> Iterator[None]:
    """Whatever the libraries raise over somebody's tokenizer is the tokenizer's fault, unless memory is too little.

    They raise bare Exception, what Python raises where a setting has another type, and panics of Rust, which are none.

    Raises:
        DataError: They did.
    """
    try:
        yield
    except (CompressorError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        refuse_shortage(error)
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise DataError(f"{place}: {what}; {first}; add the tokenizer.json of the model") from error


def _keep(tokens: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open("wb") as file:
        np.save(file, tokens)
