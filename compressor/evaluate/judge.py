"""Whether an artifact computes what it should, and how good it is: in onnxruntime, beside the original."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from compressor.checkpoints import Checkpoint
from compressor.core.artifact import Artifact
from compressor.core.batch import Batch
from compressor.core.errors import (
    CheckpointError,
    CompressorError,
    VerificationError,
    first_line,
    is_out_of_memory,
)
from compressor.core.log import LoggedProgress
from compressor.core.memory import give_back
from compressor.core.options import RunOptions
from compressor.core.progress import Progress, Task
from compressor.core.sizes import GRAPH, graph_file
from compressor.core.tensors import EncodedTensors
from compressor.data.arrays import Arrays
from compressor.data.batches import evaluation_windows, sentence_batches
from compressor.data.samples import Samples
from compressor.data.text import Text
from compressor.evaluate.again import Given, open_original, recipe_of, refuse_unreadable, samples_again
from compressor.evaluate.comparison import evaluate_outputs
from compressor.evaluate.language import evaluate_language
from compressor.evaluate.pair_session import PairSession, Predictions, is_pair
from compressor.evaluate.proof import compare_all
from compressor.evaluate.reference import original_logits, original_outputs
from compressor.evaluate.session import DecoderSession, EncoderSession, ModuleSession, open_session
from compressor.plan.recipe import Recipe

Counted = TypeVar("Counted")
LARGEST_ERROR = 1e-3
_PROOF_TOKENS, _PROOF_STEPS = 112, 8
"""Tokens of a text that are compared, and how many of them are read one at a time where there is a cache."""
_BEYOND_WINDOW = 32
"""Of attention, where the text is long enough."""
_OTHER_LENGTH = 600
"""Tokens of a decoder without a cache: other than what was traced, and beyond chunks that a forward may have."""
_LARGEST_GRAPH = 2**31 - 2**24
"""Bytes of weights that a single .onnx file can hold."""


def prove(
    checkpoint: Any, tensors: EncodedTensors, directory: Path, options: RunOptions,
    batches: list[Batch], file: str = GRAPH,
) -> dict[str, Any] | None:  # fmt: skip
    """Compares every output of the graph `file`, with exact activations and as shipped, with torch on the decoded
    weights.

    A decoder with a cache reads the last tokens one at a time, too. What came as an ONNX graph is compared with that
    graph on the decoded weights, in onnxruntime.

    Raises:
        VerificationError: One differs by more than 1e-3 of its largest value: the lowering is wrong.
    """
    if options.format != "onnx" or not batches:
        return None
    from compressor.export.writing import export_graph

    inputs = {name or "input": tensor[:1].numpy() for name, tensor in batches[0].items()}
    if "input_ids" in inputs:
        n = max(_PROOF_TOKENS, _window(checkpoint.config or {}) + _BEYOND_WINDOW)
        inputs = {name: array[:, :n] for name, array in inputs.items()}
    inputs, given = _as_shipped(checkpoint, directory / file, inputs)
    give_back()  # what opening the graph has left
    expected = _expected(checkpoint, tensors, inputs, directory)
    config = checkpoint.config
    shipped = compare_all(given, expected, inputs, config)
    graph = directory / file
    paired = is_pair(directory) and "decoder_input_ids" in inputs
    pair = {"paired": _compared_pair(directory, expected, inputs, False)} if paired else {}
    patterns = ("*.onnx", "*.repacked.bin") if file == GRAPH else (file,)
    files = [path for pattern in patterns for path in directory.glob(pattern)]
    copies = [(path, path.with_name(path.name + ".shipped")) for path in files]
    for path, copy in copies:
        shutil.copy2(path, copy)
    try:
        export_graph(checkpoint, tensors, directory, options.mode, True, batches, file=file)
        session = open_session(graph, exact=True, apart=True)
        exact = compare_all(session.outputs_of(inputs), expected, inputs, config)
        stepped = _in_steps(session, expected, inputs)
        if paired:
            stepped = _compared_pair(directory, expected, inputs, True)
    finally:
        for path, copy in copies:
            shutil.move(copy, path)
    for how, found in (("", exact), (", one token at a time,", stepped)):
        if found is not None and found["max_relative_error"] > LARGEST_ERROR:
            error = found["max_relative_error"]
            raise VerificationError(
                f"{graph}: '{found['output']}'{how} differs from its own encodings by {error:.2g} of its largest "
                f"value; expected less than {LARGEST_ERROR}; please report this with the recipe and the model's config"
            )
    return {"exact": exact, "as_shipped": shipped} | ({} if stepped is None else {"in_steps": stepped}) | pair


def _as_shipped(
    checkpoint: Any, graph: Path, inputs: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # fmt: skip
    """(inputs, what the artifact makes of them); the inputs of a decoder without a cache are longer texts.

    Raises:
        CheckpointError: Such texts do not go through the graph, whose sizes are those of the text that was traced.
    """
    session = open_session(graph, apart=True)
    if checkpoint.family != "decoder" or "input_ids" not in inputs or isinstance(session, DecoderSession):
        return inputs, session.outputs_of(inputs)
    inputs = _lengthened(inputs, min(checkpoint.positions or _OTHER_LENGTH, _OTHER_LENGTH))
    try:
        return inputs, session.outputs_of(inputs)
    except Exception as error:  # onnxruntime's own errors share no narrower class
        if isinstance(error, CompressorError) or is_out_of_memory(error):
            raise
        shapes = ", ".join(f"'{name}' {array.shape}" for name, array in inputs.items())
        raise CheckpointError(
            f"{graph}: what torch.onnx makes of the network cannot be run on {shapes}; "
            f"{first_line(error)}; a size of its forward is fixed there; --format safetensors packs the weights alone"
        ) from error


def _lengthened(inputs: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """Texts of `n` tokens, of what is there again and again; longer ones as they are."""
    return {
        name: array if array.shape[1] >= n else np.tile(array, (1, -(-n // array.shape[1])))[:, :n]
        for name, array in inputs.items()
    }


def _in_steps(
    session: ModuleSession, expected: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> dict[str, Any] | None:  # fmt: skip
    """The comparison where a decoder's cache is used; None where there is none."""
    if not isinstance(session, DecoderSession) or inputs["input_ids"].shape[1] <= _PROOF_STEPS:
        return None
    logits = session.logits_in_steps(inputs["input_ids"], _PROOF_STEPS)
    return compare_all({"logits": logits}, {"logits": expected["logits"]}, inputs)


def _compared_pair(
    directory: Path, expected: dict[str, np.ndarray], inputs: dict[str, np.ndarray], exact: bool
) -> dict[str, Any]:  # fmt: skip
    """The comparison of an encoder-decoder's own two graphs, whose decoder reads the last tokens one at a time."""
    session = PairSession(directory, exact=exact, apart=True)
    real = np.asarray(inputs.get("decoder_attention_mask", np.ones(inputs["decoder_input_ids"].shape))) != 0
    logits = session.logits(inputs, _PROOF_STEPS)
    return compare_all({"logits": logits[real]}, {"logits": expected["logits"][real]}, {})


def _window(config: Mapping[str, Any]) -> int:
    """The longest window of attention that a config speaks of; 0 where it speaks of none."""
    found = (config.get(name) for name in ("sliding_window", "attention_chunk_size", "window_size", "local_attention"))
    return max((size for size in found if isinstance(size, int)), default=0)


def _expected(
    checkpoint: Any, tensors: EncodedTensors, inputs: dict[str, np.ndarray], directory: Path
) -> dict[str, np.ndarray]:  # fmt: skip
    """What the network gives that computes with the decoded weights, by output."""
    if checkpoint.kind == "onnx" and checkpoint.describe()["tensor_bytes"] < _LARGEST_GRAPH:
        from compressor.export.onnx_graph import decoded_graph

        path = directory / "decoded.onnx"
        try:
            return open_session(decoded_graph(checkpoint.source, tensors, path), apart=True).outputs_of(inputs)
        finally:
            path.unlink(missing_ok=True)
    from compressor.export.loading import decoded_checkpoint

    return next(iter(original_outputs(decoded_checkpoint(checkpoint, tensors), [inputs])))


def judge(
    checkpoint: Any, samples: Samples, recipe: Recipe, directory: Path, format: str, progress: Progress,
    file: str = GRAPH,
) -> dict[str, Any] | None:  # fmt: skip
    """Quality of the graph `file` on the evaluation data; None where there is none to measure on."""
    source = samples.evaluation
    if source is None or format != "onnx" or recipe.evaluation.skipped:
        return None
    session = open_session(directory / file, apart=True)
    if isinstance(source, Text) and checkpoint.family == "decoder" and "logits" in session.outputs:
        assert isinstance(session, (DecoderSession, EncoderSession))
        windows = evaluation_windows(source, recipe, directory)
        with progress.task("evaluating", len(windows)) as task:
            original = _counted(original_logits(checkpoint, windows), task)
            return evaluate_language(session, original, windows).as_dict()
    if isinstance(source, Text):
        sentences = sentence_batches(source, directory, checkpoint.positions)
        batches = [_accepted(session, batch) for batch in sentences]
        with progress.task("evaluating", len(batches)) as task:
            return evaluate_outputs(session, _counted(original_outputs(checkpoint, batches), task), batches)
    assert isinstance(source, Arrays)
    chosen = source.take(slice(0, recipe.evaluation.samples))
    batches = list(chosen.batches(chosen.at_once))
    with progress.task("evaluating", len(batches)) as task:
        original = _counted(original_outputs(checkpoint, batches), task)
        if not is_pair(directory) or "decoder_input_ids" not in chosen.inputs:
            return evaluate_outputs(session, original, batches, chosen.labels)
        padding = (checkpoint.config or {}).get("pad_token_id")
        predictions = Predictions(PairSession(directory, apart=True), padding)
        found = evaluate_outputs(session, predictions.watched(original, batches), batches, chosen.labels)
    language = predictions.quality()
    return found if language is None else found | language.as_dict()


def evaluate(directory: Path | str, given: Given | None = None, size: str | None = None) -> dict[str, Any]:
    """Measures an artifact's quality again, beside the original's: the figures of its report's "quality".

    Nothing is run that only the artifact names; which files were read for it is logged.

    Args:
        directory: The artifact's.
        given: The original, its architecture and data, where they are not what and where they were.
        size: Of an artifact of several sizes, which one; by default the largest.

    Raises:
        UsageError: The artifact has no such size.
        CheckpointError: It is no artifact, its original is gone, or is built by code that is not `given`.
        DataError: The data of the run are gone or are code; give others.
    """
    artifact, given = Artifact.open(directory), given or Given()
    refuse_unreadable(given)
    file = graph_file(artifact.directory, size)
    checkpoint, recipe = open_original(artifact, given), recipe_of(artifact)
    if given.tokens is not None:
        more = recipe.evaluation.model_copy(update={"tokens": given.tokens})
        recipe = recipe.model_copy(update={"evaluation": more})
    samples = samples_again(artifact, checkpoint, recipe, given)
    return evaluate_on(artifact, checkpoint, samples, recipe, file)


def evaluate_on(
    artifact: Artifact, checkpoint: Checkpoint, samples: Samples, recipe: Recipe, file: str = GRAPH
) -> dict[str, Any]:  # fmt: skip
    """The quality of an artifact's graph `file` on the evaluation data of samples."""
    format = "onnx" if (artifact.directory / "model.onnx").exists() else "safetensors"
    return judge(checkpoint, samples, recipe, artifact.directory, format, LoggedProgress(), file) or {}


def _accepted(session: ModuleSession, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in batch.items() if name in session.inputs or name == "attention_mask"}


def _counted(arrays: Iterable[Counted], task: Task) -> Iterator[Counted]:
    """The arrays; none is held while the next is made."""

    def counted(array: Counted) -> Counted:
        task.advance()
        return array

    return map(counted, arrays)
