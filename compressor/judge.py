"""Whether an artifact computes what it should, and how good it is: in onnxruntime, beside the original."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compressor.allocate import Target
from compressor.core.errors import VerificationError
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensors
from compressor.data.arrays import Arrays
from compressor.data.text import Text
from compressor.evaluate.embedding import evaluate_embedding
from compressor.evaluate.language import evaluate_language
from compressor.evaluate.modules import evaluate_module
from compressor.evaluate.proof import compare_logits
from compressor.evaluate.reference import original_logits, original_outputs
from compressor.evaluate.session import DecoderSession, EncoderSession, ModuleSession, open_session
from compressor.losses import Kind
from compressor.progress import Progress
from compressor.recipe import Gates, Recipe
from compressor.samples import Samples, evaluation_windows, sentence_batches
from compressor.streaming import Batch

LARGEST_ERROR = 1e-3
_PROOF_TOKENS = 96


def prove(
    checkpoint: Any, tensors: EncodedTensors, offsets: dict[str, tuple[int, int]], directory: Path, options: RunOptions,
    batches: list[Batch],
) -> dict[str, Any] | None:  # fmt: skip
    """Compares the graph, with exact activations and as shipped, with torch on the decoded weights.

    Raises:
        VerificationError: They differ by more than 1e-3 of the largest output: the lowering is wrong.
    """
    if options.format != "onnx" or not batches:
        return None
    from compressor.export.loading import decoded_checkpoint
    from compressor.export.writing import export_graph

    decoded = decoded_checkpoint(checkpoint, tensors)
    inputs = {name or "input": tensor[:1].numpy() for name, tensor in batches[0].items()}
    if "input_ids" in inputs:
        inputs = {name: array[:, :_PROOF_TOKENS] for name, array in inputs.items()}
    expected = next(iter(original_outputs(decoded, [inputs])))
    shipped = compare_logits(_outputs(open_session(directory, apart=True), inputs), expected)
    graph = directory / "model.onnx"
    kept = graph.with_suffix(".shipped")
    extra = list(directory.glob("model.repacked*"))
    copies = [(path, path.with_name(path.name + ".shipped")) for path in extra]
    shutil.move(graph, kept)
    for path, copy in copies:
        shutil.copy2(path, copy)
    try:
        export_graph(checkpoint, tensors, offsets, directory, options.mode, True, batches)
        exact = compare_logits(_outputs(open_session(directory, exact=True, apart=True), inputs), expected)
    finally:
        shutil.move(kept, graph)
        for path, copy in copies:
            shutil.move(copy, path)
    if exact.max_relative_error > LARGEST_ERROR:
        raise VerificationError(
            f"{graph}: differs from its own encodings by {exact.max_relative_error:.2g} of the largest output; "
            f"expected less than {LARGEST_ERROR}; please report this with the recipe and the model's config"
        )
    return {"exact": exact.as_dict(), "as_shipped": shipped.as_dict()}


def _outputs(session: ModuleSession, inputs: dict[str, np.ndarray]) -> np.ndarray:
    if isinstance(session, DecoderSession):
        return session.logits(inputs["input_ids"])
    if isinstance(session, EncoderSession):
        return session.hidden(inputs)
    return session.run(inputs, session.outputs[:1])[session.outputs[0]]


def judge(
    checkpoint: Any, samples: Samples, recipe: Recipe, directory: Path, format: str, progress: Progress
) -> dict[str, Any] | None:
    """Quality on the evaluation data; None where there is none to measure on."""
    source = samples.evaluation
    if source is None or format != "onnx" or not recipe.evaluation.tokens:
        return None
    session = open_session(directory, apart=True)
    if isinstance(source, Text) and isinstance(session, DecoderSession):
        windows = evaluation_windows(source, recipe, directory)
        with progress.task("evaluating", len(windows)) as task:
            original = _counted(original_logits(checkpoint, windows), task)
            return evaluate_language(session, original, windows).as_dict()
    if isinstance(source, Text):
        sentences = sentence_batches(source, directory)
        wanted = [_accepted(session, batch) for batch in sentences]
        return evaluate_embedding(session, original_outputs(checkpoint, wanted), wanted).as_dict()  # type: ignore[arg-type]
    assert isinstance(source, Arrays)
    chosen = source.take(slice(0, recipe.evaluation.samples))
    return evaluate_module(session, original_outputs(checkpoint, chosen.batches(32)), chosen).as_dict()


def _accepted(session: ModuleSession, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in batch.items() if name in session.inputs or name == "attention_mask"}


def _counted(arrays: Iterable[np.ndarray], task: Any) -> Iterator[np.ndarray]:
    for array in arrays:
        yield array
        task.advance()


def promised(gates: Gates, target: Target) -> Gates:
    """The gates, and what a target promises of the loss: the stricter of both."""
    loss = target.loss
    if loss is None:
        return gates
    if target.kind == "perplexity":
        return gates.model_copy(update={"max_perplexity_ratio": min(1 + loss, gates.max_perplexity_ratio or math.inf)})
    if target.kind == "accuracy" and target.labelled:
        drop = 1.0 if gates.max_accuracy_drop is None else gates.max_accuracy_drop
        return gates.model_copy(update={"max_accuracy_drop": min(loss, drop)})
    least = "min_cosine" if target.kind == "cosine" else "min_agreement"
    return gates.model_copy(update={least: max(1 - loss, getattr(gates, least) or 0.0)})


def came_true(kind: Kind, quality: dict[str, Any] | None) -> float | None:
    """The loss that was predicted, as it was measured on the evaluation data; None where it was not."""
    if not quality:
        return None
    if kind == "perplexity":
        return None if quality.get("ratio") is None else quality["ratio"] - 1
    if kind == "cosine":
        return 1 - quality["cosine"] if "cosine" in quality else None
    if quality.get("accuracy") is not None:
        return quality["original_accuracy"] - quality["accuracy"]
    return 1 - quality["top1_agreement"] if "top1_agreement" in quality else None


def failed_gates(gates: Gates, quality: dict[str, Any] | None) -> list[str]:
    """A sentence for each limit that the artifact does not keep."""
    quality = quality or {}
    drop = None
    if quality.get("accuracy") is not None:
        drop = quality["original_accuracy"] - quality["accuracy"]
    agreement = quality.get("top1_agreement")
    limits = (
        ("perplexity ratio", quality.get("ratio"), gates.max_perplexity_ratio, 1),
        ("KL divergence", quality.get("kl_divergence"), gates.max_kl_divergence, 1),
        ("top-1 agreement", agreement, gates.min_agreement, -1),
        ("cosine", quality.get("cosine"), gates.min_cosine, -1),
        ("accuracy drop", drop, gates.max_accuracy_drop, 1),
    )
    failures = []
    for name, value, limit, sign in limits:
        if limit is not None and (value is None or sign * value > sign * limit):
            found = "was not measured" if value is None else f"is {value:.4g}"
            failures.append(f"{name} {found}, the gate is {limit:g}")
    return failures
