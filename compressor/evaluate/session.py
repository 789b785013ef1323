"""Artifacts opened in onnxruntime: decoders with their KV cache, encoders, and any other graph. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from compressor.core.artifact import CACHE, IN_PLACE, INSTALLED_GRAPH, KEPT
from compressor.core.errors import CheckpointError, first_line
from compressor.core.options import refuse_seed
from compressor.core.reading import read_json
from compressor.evaluate.reader import reader_of
from compressor.runtime.sessions import Settings, filled, in_pieces, open_inference

GRAPH = "model.onnx"
DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8, "tensor(int8)": np.int8,
}  # fmt: skip


class ModuleSession:
    """A graph whose inputs are fed by name."""

    def __init__(
        self, path: str | Path, threads: int | None = None, exact: bool = False, apart: bool = False,
        opened: Any = None,
    ) -> None:  # fmt: skip
        """Opens an artifact's directory, or an .onnx file.

        Args:
            exact: Activations of products that onnxruntime fuses itself (DequantizeLinear and MatMul) stay float32; by
                its own default they become int8.
            apart: A large artifact is run in a process of its own; it cannot `generate`.
            opened: onnxruntime's session of this graph, if there is one already.

        Raises:
            CheckpointError: There is no graph, or this onnxruntime cannot load it.
        """
        self.path = graph_path(Path(path))
        self.config = _config(self.path.parent)
        self.session = opened or _open(self.path, threads, exact, apart)
        self.inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def run(self, inputs: dict[str, Any], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Outputs by name. Unknown inputs are left out; one input is matched whatever its name."""
        if len(self.inputs) == 1 and len(inputs) == 1:
            inputs = {next(iter(self.inputs)): next(iter(inputs.values()))}
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise CheckpointError(
                f"{self.path}: needs input '{missing[0]}'; found {', '.join(inputs)}; name the data's arrays so"
            )
        feed = {name: np.asarray(inputs[name], dtype=DTYPES[entry.type]) for name, entry in self.inputs.items()}
        names = list(outputs or self.outputs)
        first = next((entry.shape for entry in self.inputs.values()), None)
        fixed = first[0] if first and isinstance(first[0], int) else None
        return dict(zip(names, in_pieces(feed, fixed, lambda part: self.session.run(names, part)), strict=True))

    def outputs_of(self, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        """Every output that the network is judged by, floats as float32."""
        return {name: _single(array) for name, array in self.run(inputs).items()}


class EncoderSession(ModuleSession):
    """A graph of input_ids and attention_mask; token_type_ids and position_ids are made up where it asks for them."""

    def run(self, inputs: dict[str, Any], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """As any graph, from input_ids alone if need be."""
        return super().run(filled(inputs, {}), outputs)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """The logits of a language model without a cache: float32 (batch, n, vocabulary) of ids (batch, n)."""
        return _single(self.run({"input_ids": ids}, ["logits"])["logits"])


class DecoderSession(ModuleSession):
    """A causal language model: input_ids, attention_mask, past_key_values.{i}.key and .value → logits, present.…

    Without a KV cache, of inputs and outputs that have none, it reads the whole text for each token.
    """

    def __init__(
        self, path: str | Path, threads: int | None = None, exact: bool = False, apart: bool = False,
        opened: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(path, threads, exact, apart, opened)
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.present = [name.replace("past_key_values", "present") for name in self.past]
        self.keeps_last, self.in_place = _abilities(self.session)
        if "logits" not in self.outputs or not set(self.present) <= set(self.outputs):
            raise CheckpointError(
                f"{self.path}: is not a decoder; found outputs {', '.join(self.outputs[:4])}; "
                f"expected logits and present.…"
            )
        for name, entry in self.inputs.items():
            axes = 4 if name in self.past else 2
            if len(entry.shape) != axes:
                raise CheckpointError(
                    f"{self.path}: input '{name}' has {len(entry.shape)} axes; a decoder's has {axes}; export it again"
                )

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of ids (batch, n), with nothing before them: float32 (batch, n, vocabulary)."""
        ids = np.asarray(ids, dtype=np.int64)
        feed = self.feed(ids, 0) | {name: self.empty(name, len(ids), 0) for name in self.past}
        return self.session.run(["logits"], feed)[0].astype(np.float32, copy=False)

    def logits_in_steps(self, ids: np.ndarray, n_steps: int) -> np.ndarray:
        """The same, of which the last `n_steps` tokens are read one at a time, with what was read before in the cache.

        Raises:
            CheckpointError: There is no cache.
        """
        if not self.past:
            raise CheckpointError(f"{self.path}: has no KV cache to read step by step with")
        ids = np.asarray(ids, dtype=np.int64)
        first, past, found = ids.shape[1] - n_steps, {name: self.empty(name, len(ids), 0) for name in self.past}, []
        for start, stop in pairwise([0, *range(first, ids.shape[1] + 1)]):
            feed = self.feed(ids[:, start:stop], start) | past
            logits, *present = self.session.run(["logits", *self.present], feed)
            past = dict(zip(self.past, present, strict=True))
            found.append(logits.astype(np.float32, copy=False))
        return np.concatenate(found, axis=1)

    def outputs_of(self, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        """The logits; what goes into the next step's cache follows from the same."""
        return {"logits": self.logits(inputs["input_ids"])}

    def generate(
        self, ids: np.ndarray, n: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        stop: Container[int] | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Up to `n` further tokens of one sequence `ids` (length,), with the KV cache where there is one.

        Args:
            temperature: 0 takes the likeliest token each time.
            top_p: Sample among the likeliest tokens that together hold this probability.
            stop: Tokens that end the text and are not yielded; by default those of the config.
        """
        refuse_seed(seed)
        stop = self.stop_tokens if stop is None else stop
        generator = np.random.default_rng(seed)
        step = np.asarray(ids, dtype=np.int64).reshape(-1)
        reader = reader_of(self, len(step) + n)
        for _ in range(n):
            token = sample(reader.read(step), temperature, top_p, generator)
            if token in stop:
                return
            yield token
            step = np.array([token], np.int64)

    @property
    def stop_tokens(self) -> set[int]:
        """The end-of-text tokens of the config."""
        return end_tokens(self.config)

    def feed(self, ids: np.ndarray, seen: int) -> dict[str, np.ndarray]:
        """What a run is fed beside the cache, for ids (batch, n) after `seen` others."""
        batch, n = ids.shape
        whole = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, seen + n), np.int64),
            "position_ids": np.tile(np.arange(seen, seen + n), (batch, 1)),
        }
        return {
            name: array.astype(DTYPES[self.inputs[name].type], copy=False)
            for name, array in whole.items()
            if name in self.inputs
        }

    def empty(self, name: str, batch: int, room: int) -> np.ndarray:
        """Room for the keys or values of so many tokens: (batch, KV heads, room, head size), not set to anything."""
        entry = self.inputs[name]
        heads, size = entry.shape[1], entry.shape[3]
        if not (isinstance(heads, int) and isinstance(size, int)):
            heads, size = _heads(self.config, self.path)
        return np.empty((batch, heads, room, size), DTYPES[entry.type])


def open_session(
    path: str | Path, threads: int | None = None, exact: bool = False, apart: bool = False
) -> ModuleSession:  # fmt: skip
    """A DecoderSession, EncoderSession or ModuleSession, as the graph's inputs say."""
    opened = _open(graph_path(Path(path)), threads, exact, apart)
    inputs = [entry.name for entry in opened.get_inputs()]
    kind = EncoderSession if "input_ids" in inputs else ModuleSession
    if any(name.startswith("past_key_values.") for name in inputs):
        kind = DecoderSession
    return kind(path, opened=opened)


def graph_path(path: Path) -> Path:
    """The graph of an artifact's directory, or the .onnx file itself."""
    graph = path / GRAPH if path.is_dir() else path
    if not graph.is_file():
        found = ", ".join(sorted(file.name for file in path.iterdir())[:6]) if path.is_dir() else "no such file"
        raise CheckpointError(
            f"{path}: holds no {GRAPH}; found {found or 'nothing'}; give a directory that compress wrote"
        )
    return graph


def end_tokens(config: dict[str, Any]) -> set[int]:
    """The tokens that end a text, as a config has them: one, a list, or none."""
    found = config.get("eos_token_id")
    return {each for each in (found if isinstance(found, list) else [found]) if isinstance(each, int)}


def sample(logits: np.ndarray, temperature: float, top_p: float, generator: np.random.Generator) -> int:
    """A token from logits (vocabulary,): the likeliest at temperature 0; of equal ones the first."""
    if temperature <= 0:
        return int(logits.argmax())
    exact = logits.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # a difference over nearly nothing is infinite, and rightly so
        probability = np.exp((exact - exact.max()) / temperature)
    if not math.isfinite(probability.sum()):
        raise CheckpointError("the graph gives logits that are not finite; see `compress verify`")
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    before = np.cumsum(probability[order]) - probability[order]
    kept = order[: max(1, int((before < top_p).sum()))]
    return int(generator.choice(kept, p=probability[kept] / probability[kept].sum()))


def _open(path: Path, threads: int | None, exact: bool, apart: bool) -> Any:
    entries = {"session.qdq_matmulnbits_accuracy_level": "1"} if exact else {}
    try:
        return open_inference(path, Settings(threads, entries, as_it_is=path.name == INSTALLED_GRAPH), apart)
    except Exception as error:  # onnxruntime's own errors share no narrower class
        raise unloadable(path, error) from error


def unloadable(path: Path, error: Exception) -> CheckpointError:
    """Says of a graph that onnxruntime does not load it, and why."""
    return CheckpointError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it; {first_line(error)}")


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return read_json(path) if path.is_file() else {}


def _heads(config: dict[str, Any], path: Path) -> tuple[int, int]:
    heads = config.get("num_attention_heads", config.get("n_head"))
    width = config.get("hidden_size", config.get("n_embd"))
    if not heads or not width:
        raise CheckpointError(
            f"{path}: the cache's shape is open; config.json beside it must state heads and hidden size"
        )
    return config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads


def _single(array: np.ndarray) -> np.ndarray:
    """Floats of any precision as float32."""
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def _abilities(session: Any) -> tuple[bool, bool]:
    """Whether a decoder gives the last logits alone where asked to, and whether its cache may be written in place."""
    if not isinstance(session, onnxruntime.InferenceSession):
        return False, False  # in a process of its own it reads whole texts
    optional = {entry.name for entry in session.get_overridable_initializers()}
    return KEPT in optional, session.get_modelmeta().custom_metadata_map.get(CACHE) == IN_PLACE
