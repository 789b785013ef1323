"""The two graphs of an encoder-decoder in onnxruntime: a text is read once, another written with a cache. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from compressor.core.artifact import PAIRED_DECODER, PAIRED_ENCODER
from compressor.core.errors import CheckpointError
from compressor.core.options import refuse_seed
from compressor.core.reading import read_json
from compressor.evaluate.language import LanguageQuality, Sums, quality_of
from compressor.evaluate.session import DTYPES, EncoderSession, ModuleSession, end_tokens, sample

Cache = dict[str, np.ndarray]


def is_pair(directory: Path) -> bool:
    """Whether a directory holds the two graphs."""
    return all((directory / name).is_file() for name in (PAIRED_ENCODER, PAIRED_DECODER))


class PairSession:
    """What the encoder reads and the decoder's tokens → logits."""

    def __init__(self, directory: Path, threads: int | None = None, exact: bool = False, apart: bool = False) -> None:
        """Opens an artifact's directory; the arguments are those of `session.ModuleSession`.

        Raises:
            CheckpointError: There are no two graphs, or this onnxruntime cannot load them.
        """
        self.directory = directory
        self.encoder = EncoderSession(directory / PAIRED_ENCODER, threads, exact, apart)
        self.decoder = ModuleSession(directory / PAIRED_DECODER, threads, exact, apart)
        self.past = [name for name in self.decoder.inputs if name.startswith("past_key_values.")]

    def states(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the decoder is given of what the encoder reads: its states, and which are padding."""
        given = {name: inputs[name] for name in self.encoder.inputs if name in inputs}
        found = {"encoder_hidden_states": self.encoder.run(given, ["last_hidden_state"])["last_hidden_state"]}
        if "encoder_attention_mask" in self.decoder.inputs:
            shape = found["encoder_hidden_states"].shape[:2]
            found["encoder_attention_mask"] = inputs.get("attention_mask", np.ones(shape, np.int64))
        return found

    def step(
        self, states: Mapping[str, np.ndarray], ids: np.ndarray, past: Cache | None
    ) -> tuple[np.ndarray, Cache]:  # fmt: skip
        """(logits (batch, length, vocabulary), cache) of further tokens (batch, length); `past` is None at first."""
        empty = {name: self._empty(name, len(ids)) for name in self.past} if past is None else past
        feed = {"input_ids": ids, **states, **empty}
        presents = [name.replace("past_key_values", "present") for name in self.past]
        found = self.decoder.run(feed, ["logits", *presents])
        kept = {name: found[present] for name, present in zip(self.past, presents, strict=True)}
        return found["logits"].astype(np.float32, copy=False), kept

    def logits(self, inputs: Mapping[str, np.ndarray], n_steps: int = 0) -> np.ndarray:
        """The logits of `decoder_input_ids`, of which the last `n_steps` tokens are read one at a time."""
        ids = np.asarray(inputs["decoder_input_ids"], np.int64)
        states, past, found = self.states(inputs), None, []
        first = max(1, ids.shape[1] - n_steps)
        for start, stop in pairwise([0, *range(first, ids.shape[1]), ids.shape[1]]):
            logits, past = self.step(states, ids[:, start:stop], past)
            found.append(logits)
        return np.concatenate(found, axis=1)

    def generate(
        self, inputs: Mapping[str, np.ndarray], n: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        stop: Container[int] | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Up to `n` tokens that answer one example of what the encoder reads; as `session.DecoderSession.generate`.

        The config says what the decoder begins with, which token comes first, and which never.
        """
        refuse_seed(seed)
        settings = generation_settings(self.directory)
        stop = end_tokens(settings) if stop is None else stop
        never = [each[0] for each in settings.get("bad_words_ids") or [] if len(each) == 1]
        generator = np.random.default_rng(seed)
        states, past = self.states(inputs), None
        step = np.array([[start_token(settings, self.directory)]], np.int64)
        forced = settings.get("forced_bos_token_id")
        for at in range(n):
            logits, past = self.step(states, step, past)
            last = logits[0, -1]
            last[never] = np.finfo(np.float32).min
            token = forced if at == 0 and isinstance(forced, int) else sample(last, temperature, top_p, generator)
            if token in stop:
                return
            yield token
            step = np.array([[token]], np.int64)

    def _empty(self, name: str, batch: int) -> np.ndarray:
        entry = self.decoder.inputs[name]
        return np.zeros((batch, entry.shape[1], 0, entry.shape[3]), DTYPES[entry.type])


def generation_settings(directory: Path) -> dict[str, Any]:
    """What the config says of writing text; generation_config.json says it last."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            found |= read_json(directory / name)
    return found


def start_token(settings: Mapping[str, Any], directory: Path) -> int:
    """The token that the decoder begins with."""
    for key in ("decoder_start_token_id", "bos_token_id"):
        found = settings.get(key)
        if isinstance(found, int):
            return found
    raise CheckpointError(
        f"{directory}: config.json does not say what its decoder begins with; write decoder_start_token_id into it"
    )


class Predictions:
    """Adds up, batch by batch, how likely the artifact and the original hold each next token of the decoder's text."""

    def __init__(self, session: PairSession, padding: int | None) -> None:
        self.session, self.padding, self.sums, self.n = session, padding, Sums(), 0

    def watched(
        self, outputs: Iterable[dict[str, np.ndarray]], batches: Iterable[dict[str, np.ndarray]]
    ) -> Iterator[dict[str, np.ndarray]]:
        """The original's outputs of these batches, counted on their way."""
        for found, batch in zip(outputs, batches, strict=True):
            self._add(found["logits"], batch)
            yield found

    def _add(self, original: np.ndarray, batch: Mapping[str, np.ndarray]) -> None:
        ids = np.asarray(batch["decoder_input_ids"], np.int64)
        logits = self.session.logits(batch)
        for row, target in enumerate(ids[:, 1:]):
            real = target != self.padding
            self.sums.add(logits[row, :-1][real], original[row, :-1][real], target[real])
        self.n += len(ids)

    def quality(self) -> LanguageQuality | None:
        """Means over all tokens that are no padding; None where there is none."""
        return quality_of(self.sums, self.n, True) if self.sums.tokens else None
