"""A text that a decoder reads piece by piece, and what it keeps of it between: its KV cache.

    reader = reader_of(session, longest)
    logits = reader.read(ids)                 # after the last of them: float32 (vocabulary,)
    logits = reader.read(np.array([token]))

Where the graph can, keys and values lie in buffers that onnxruntime reads and writes in place, and a long prompt is
read in pieces: what attention takes for a moment grows with a piece and not with the prompt. Elsewhere each run makes
a cache that is longer by what is new, or there is none, and each reads the whole text. Never imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
import onnxruntime

from compressor.core.artifact import KEPT

PIECE = 128
"""Tokens of a prompt that are read at a time."""
_ROOM = 1024
"""Tokens that a buffer has room for at first. Memory that nothing was written to takes none."""


class Decoder(Protocol):
    """What a reader must know of an open decoder; see `evaluate.session.DecoderSession`."""

    session: Any
    past: list[str]
    present: list[str]
    keeps_last: bool
    in_place: bool

    def feed(self, ids: np.ndarray, seen: int) -> dict[str, np.ndarray]: ...
    def empty(self, name: str, batch: int, room: int) -> np.ndarray: ...


class Reader(ABC):
    """One sequence; `seen` counts its tokens."""

    def __init__(self, session: Decoder) -> None:
        self.session, self.seen = session, 0
        self._last = {KEPT: np.array(1, np.int64)} if session.keeps_last else {}

    @abstractmethod
    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits (vocabulary,) after the last of further ids (n,)."""

    def _feed(self, ids: np.ndarray, before: int) -> dict[str, onnxruntime.OrtValue]:
        feed = self.session.feed(np.asarray(ids, np.int64).reshape(1, -1), before) | self._last
        return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}


class WholeText(Reader):
    """Without a cache every token is read again each time."""

    def __init__(self, session: Decoder) -> None:
        super().__init__(session)
        self._ids = np.zeros(0, np.int64)

    def read(self, ids: np.ndarray) -> np.ndarray:
        self._ids = np.append(self._ids, ids)
        self.seen = len(self._ids)
        (logits,) = self.session.session.run_with_ort_values(["logits"], self._feed(self._ids, 0))
        return logits.numpy()[0, -1]


class GrowingCache(Reader):
    """Each run gives the cache of the next one."""

    def __init__(self, session: Decoder) -> None:
        super().__init__(session)
        empty = onnxruntime.OrtValue.ortvalue_from_numpy
        self._past = {name: empty(session.empty(name, 1, 0)) for name in session.past}

    def read(self, ids: np.ndarray) -> np.ndarray:
        feed = self._feed(ids, self.seen) | self._past
        logits, *present = self.session.session.run_with_ort_values(["logits", *self.session.present], feed)
        self._past = dict(zip(self.session.past, present, strict=True))
        self.seen += len(ids)
        return logits.numpy()[0, -1]


class CacheInPlace(Reader):
    """Buffers that are bound as past and as present, longer than what they hold; `longest` tokens at most."""

    def __init__(self, session: Decoder, longest: int) -> None:
        super().__init__(session)
        self._longest, self._room, self._binding = longest, 0, session.session.io_binding()
        self._buffers: dict[str, np.ndarray] = {}

    def read(self, ids: np.ndarray) -> np.ndarray:
        for start in range(0, len(ids), PIECE):
            self._read(ids[start : start + PIECE])
        return self._binding.get_outputs()[0].numpy()[0, -1]

    def _read(self, ids: np.ndarray) -> None:
        if self.seen + len(ids) > self._room:
            self._make_room(self.seen + len(ids))
        for name, value in self._feed(ids, self.seen).items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output("logits")  # anew: what it is bound to after a run has that run's size
        self.session.session.run_with_iobinding(self._binding)
        self.seen += len(ids)

    def _make_room(self, needed: int) -> None:
        self._room = max(needed, min(self._longest, max(_ROOM, 2 * self._room)))
        self._binding = self.session.session.io_binding()
        self._binding.bind_output("logits")
        for past, present in zip(self.session.past, self.session.present, strict=True):
            buffer = self.session.empty(past, 1, self._room)
            if self.seen:
                buffer[:, :, : self.seen] = self._buffers[past][:, :, : self.seen]
            self._buffers[past] = buffer
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)


def reader_of(session: Decoder, longest: int) -> Reader:
    """A reader of one sequence of at most `longest` tokens, by what the session's graph can do."""
    if not session.past:
        return WholeText(session)
    return CacheInPlace(session, longest) if session.in_place else GrowingCache(session)
