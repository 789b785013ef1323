"""Peak memory of a run, estimated from headers: per stage, the large arrays that are there at once.

Anonymous memory, in bytes. The processes that open the artifact in onnxruntime, and mapped files, are not in it.
Held against what was measured: scripts/bench_memory.py. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compressor.core.errors import ResourceError
from compressor.core.machine import multiplies_bfloat16
from compressor.core.memory import LEARNING_SLACK, SLACK
from compressor.core.roles import block_of
from compressor.core.spec import CodebookSpec
from compressor.core.training import Training
from compressor.plan.plan import Plan, PlannedTensor
from compressor.plan.recipe import TOKENS_PER_BATCH, WINDOWS_AT_ONCE, Recipe, learning_window
from compressor.plan.workload import Workload

BASE = 320_000_000
"""Python, torch and transformers, imported; the texts; the network without weights."""
LIGHT = 400_000_000
"""The same where the network is no transformer, with the pages of libraries' files that are in use."""
FLOAT = 4
_FORMS, _BATCHES, _GATHERED, _OBSERVED = 8.0, 4.0, 2.5, 3.0
"""Of a network on arrays: copies of its weights, the graph's own, the module's, the decoded, onnxruntime's; arrays of a
batch's largest layer; more of them where moments are gathered of layers; values that are seen at once where ranges are
taken. Measured on six networks."""
_CHUNK, _COPIES = 2048 * 576, 36
"""Values of a table that are encoded at a time, and arrays of that many floats meanwhile."""
_PARTS = 1.5
"""Bytes of a table's value while it is encoded: its code, and what its group has of scale and zero."""
_POSITIONS = 128
"""Whose logits are held at a time where gradients are asked for, in four arrays."""
_JUDGED = 64
"""Positions whose logits are compared at a time, in four arrays of float64."""
_PROVED = 112
"""Tokens of the proof, whose logits are there from the artifact, from torch, and centred in float64."""
_KEYS_AND_VALUES, _FEWEST_DOCUMENTS = 384_000_000, 8
"""Bytes of keys and values that are held while the original writes, and how many documents it writes at least."""
_SAVED = 3.5
"""Values that a backward pass keeps per output of a linear: it, its neighbours, what norms computed in floats."""
COMPARED = 2**25
"""Values of a tensor up to which what is stored of it is held against it."""
_MATRICES = 5
"""Of a layer's size, while it is encoded: weight, what is left of it, chosen values, points, decoded."""
_EXPLAINED = 6
"""As many where a pass explains outputs: a layer's, that of the norm behind it and of the activation, each with what
carries relevance through it."""
_CHOSEN, _TRAINED, _SCORED = 2, 5, 3
"""Weights of a whole network that is made smaller: itself, and as it was; where it trains, gradients, two moments and
the teacher. Logits of a batch: themselves, their gradient, and that once more as a layer's."""
_CORRECTING = 4
"""Of a layer's size, while drift is made up for: weight, the right side, the solution, what is left."""
_PASSING = 2
"""Of the widest input's size, in a forward besides what layers give: what activations make of them, and their
product."""


def peak_memory(
    tensors: Sequence[PlannedTensor], config: dict[str, Any], recipe: Recipe, load: Workload | None = None,
    workers: int = 0,
) -> int:  # fmt: skip
    """The largest of the stages' peaks, about; of all processes, where `workers` encode blocks beside this one."""
    if load is not None and load.layers and not config:
        return _of_arrays(tensors, recipe, load) + workers * (of_a_worker(tensors, config, recipe) + _data(load))
    width = int(config.get("hidden_size") or config.get("n_embd") or 0)
    states = FLOAT * width * recipe.calibration.tokens
    kept = 4 if recipe.learns_blocks else 3 if _wants_gradients(recipe) else 2  # inputs, outputs; targets; upstream
    kept += 2 * recipe.corrects_drift  # the original's
    streamed = max(_outside(tensors, config, recipe), _largest_block(tensors, config, recipe))
    peak = max(_tables(tensors) + _head_states(tensors, config, recipe) * states, streamed + kept * states)
    peak = max(peak, _judging(tensors, config, recipe), _distances(tensors))
    if recipe.early:
        peak = max(peak, _restructuring(tensors, config, recipe) + LEARNING_SLACK - SLACK)
    if workers:
        peak = max(peak, _beside(tensors, config) + kept * states + workers * of_a_worker(tensors, config, recipe))
    if any(block_of(tensor.name, config) for tensor in tensors):
        if recipe.distill.steps:
            peak = max(peak, _distillation(tensors, config, width, recipe) + LEARNING_SLACK - SLACK)
        if recipe.writes_text:
            peak = max(peak, _generation(tensors, config, recipe))
    return BASE + SLACK + int(peak)


def of_a_worker(tensors: Sequence[PlannedTensor], config: dict[str, Any], recipe: Recipe) -> int:
    """Of a process that encodes blocks on the original's inputs, one after the other."""
    width = int(config.get("hidden_size") or config.get("n_embd") or 0)
    calibration = recipe.calibration.model_copy(update={"token_importance": False})
    encoding = recipe.model_copy(update={"calibration": calibration})  # no backward pass
    return BASE + SLACK + int(_largest_block(tensors, config, encoding) + 2 * FLOAT * width * recipe.calibration.tokens)


def _beside(tensors: Sequence[PlannedTensor], config: dict[str, Any]) -> float:
    """The block that the original is run forwards through meanwhile."""
    blocks: dict[str, int] = {}
    for tensor in tensors:
        block = block_of(tensor.name, config)
        blocks[block] = blocks.get(block, 0) + _count([tensor])
    return FLOAT * max((n for name, n in blocks.items() if name), default=0)


def _of_arrays(tensors: Sequence[PlannedTensor], recipe: Recipe, load: Workload) -> int:
    """Of a network that is one block and reads arrays: those, the weights in several forms, and a batch on its way."""
    data = _data(load)
    batch = FLOAT * load.at_once * load.held
    found = data + _FORMS * FLOAT * _count(tensors) + _BATCHES * batch
    if any(tensor.method is not None and "data" in tensor.method.needs for tensor in tensors):
        largest = max((2 * FLOAT * tensor.matrix[1] ** 2 for tensor in tensors if tensor.by), default=0)
        found += _GATHERED * batch + 2 * FLOAT * load.unfolded + largest
    if recipe.export.activations == "static_int8":
        found += _OBSERVED * FLOAT * load.written
    if recipe.early:
        found = max(found, data + _restructuring_arrays(tensors, recipe, load) + LEARNING_SLACK)
    return LIGHT + int(found)


def _restructuring_arrays(tensors: Sequence[PlannedTensor], recipe: Recipe, load: Workload) -> float:
    """The same of a network that is one block: what all layers give a batch, as often as it is kept until gradients
    come back. Passes that choose see batches as the calibration has them, those that train as they ask for them."""
    found = 0.0
    for step in recipe.early:
        settings, copies, n, kept = step.settings, _CHOSEN, load.at_once, float(_EXPLAINED)
        if isinstance(settings, Training) and settings.epochs:
            copies, n, kept = _TRAINED, min(settings.batch, load.n_loaded), _SAVED
        elif "gradients" not in settings.needs:
            kept = 0.0
        found = max(found, copies * FLOAT * _count(tensors) + kept * FLOAT * n * load.written)
    return found


def _data(load: Workload) -> int:
    return int(FLOAT * load.given * load.n_loaded)


def refuse_beyond(
    limit: int, plan: Plan, config: dict[str, Any], recipe: Recipe, load: Workload | None = None, workers: int = 0
) -> None:  # fmt: skip
    """Raises ResourceError where the plan's peak memory exceeds `limit` bytes, and says what would stay within it."""
    if plan.peak_memory <= limit:
        return
    tried: list[str] = []
    least = plan.peak_memory
    if workers and (alone := peak_memory(plan.tensors, config, recipe, load)) < least:
        tried, least, workers = ["--workers 1"], alone, 0
    for section, key, value in () if least <= limit else (
        ("distill", "steps", 0), ("calibration", "tokens", max(TOKENS_PER_BATCH, recipe.calibration.tokens // 4)),
        ("calibration", "generated", 0.0), ("calibration", "token_importance", False),
    ):  # fmt: skip
        changed = getattr(recipe, section).model_copy(update={key: value})
        candidate = recipe.model_copy(update={section: changed})
        found = peak_memory(plan.tensors, config, candidate, load, workers)
        if found < least:
            tried.append(f"--set {section}.{key}={str(value).lower()}")
            recipe, least = candidate, found
        if least <= limit:
            break
    advice = f"about {least / 1e9:.2g} GB with {' '.join(tried)}" if tried else "no setting lowers that"
    more = "" if least <= limit else "; for less give another recipe, a smaller model or a higher --max-ram"
    raise ResourceError(
        f"--max-ram: {plan.recipe} needs about {plan.peak_memory / 1e9:.2g} GB for {plan.model}; found "
        f"{limit / 1e9:.2g} GB; {advice}{more}"
    )


def _count(tensors: Sequence[PlannedTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _stored_beside(tensor: PlannedTensor) -> int:
    """Of a tensor as it is read, beside its floats; none where these are what is read."""
    return 0 if tensor.bytes_before == FLOAT * _count([tensor]) else tensor.bytes_before


def _wants_gradients(recipe: Recipe) -> bool:
    return recipe.calibration.token_importance and "data" in recipe.required


def _gives_logits(config: dict[str, Any]) -> bool:
    """Whether a transformer has an output head: those without are called after their kind alone, as BertModel."""
    names = config.get("architectures") or [""]
    return not str(names[0]).endswith("Model") or str(names[0]).endswith("LMHeadModel")


def _restructuring(tensors: Sequence[PlannedTensor], config: dict[str, Any], recipe: Recipe) -> float:
    """The whole network in the hands of a structure pass: its weights in several copies, of a batch what a backward
    pass through all layers keeps and what it gives them, and the logits in a few copies."""
    outputs = sum(tensor.matrix[0] for tensor in tensors if tensor.role == "linear")
    found = 0.0
    for step in recipe.early:
        settings, copies, tokens, kept = step.settings, _CHOSEN, TOKENS_PER_BATCH, 0.0
        if isinstance(settings, Training) and settings.epochs:
            copies, tokens = _TRAINED, settings.batch * recipe.calibration.window
        if "gradients" in settings.needs or copies == _TRAINED:
            kept = (_SAVED + 1) * outputs
        values = kept + _SCORED * _vocabulary(tensors) * _gives_logits(config)
        found = max(found, copies * FLOAT * _count(tensors) + FLOAT * tokens * values)
    return found


def _tables(tensors: Sequence[PlannedTensor]) -> float:
    """The largest table, while it is loaded: in its stored precision as well; and while it is encoded: as it is, its
    parts, and the arrays of what is encoded at a time."""
    tables = [tensor for tensor in tensors if tensor.role == "embedding"]
    loading = [FLOAT * _count([tensor]) + _stored_beside(tensor) for tensor in tables]
    encoding = [
        (FLOAT + _PARTS) * _count([tensor]) + _COPIES * FLOAT * min(_count([tensor]), _CHUNK)
        for tensor in tables
        if tensor.by
    ]
    return max([0.0, *loading, *encoding])


def _head_states(tensors: Sequence[PlannedTensor], config: dict[str, Any], recipe: Recipe) -> int:
    """How many hidden states there are while a table is encoded: of a head of its own, which comes behind the blocks,
    those that it is given."""
    tables = [tensor for tensor in tensors if tensor.role == "embedding" and not block_of(tensor.name, config)]
    return int(len(tables) > 1 and "data" in recipe.required)


def _distances(tensors: Sequence[PlannedTensor]) -> float:
    """The largest tensor that is held against what is stored of it: as it was, and its parts unpacked."""
    counts = [_count([tensor]) for tensor in tensors if tensor.by]
    return (FLOAT + _PARTS + 1) * max((n for n in counts if n <= COMPARED), default=0)


def _judging(tensors: Sequence[PlannedTensor], config: dict[str, Any], recipe: Recipe) -> float:
    """What lies in no block, loaded, and logits: of the proof's tokens, or of a window that is evaluated on, both the
    artifact's and the original's; some positions of them in float64."""
    outside = [tensor for tensor in tensors if not block_of(tensor.name, config)]
    if len(outside) == len(tensors):
        return 0
    found, vocabulary = FLOAT * _count(outside), _vocabulary(tensors) * _gives_logits(config)
    logits = 4 * FLOAT * _PROVED * vocabulary
    if not recipe.evaluation.skipped:
        logits = max(logits, (2 * FLOAT * recipe.evaluation.window + 4 * 2 * FLOAT * _JUDGED) * vocabulary)
    return found + logits


def _outside(tensors: Sequence[PlannedTensor], config: dict[str, Any], recipe: Recipe) -> float:
    """What lies in no block, loaded: the last in its stored precision as well, or the head's logits and matrix.

    Logits are there for gradients.
    """
    outside = [tensor for tensor in tensors if not block_of(tensor.name, config)]
    if len(outside) == len(tensors):
        return 0
    logits = 4 * FLOAT * _POSITIONS * max((t.shape[0] for t in outside if t.role == "embedding"), default=0)
    stored = max(map(_stored_beside, outside), default=0)
    if not _wants_gradients(recipe):
        logits = 0
    else:
        logits += (
            2 * max(map(_count, ([tensor] for tensor in outside)), default=0) * multiplies_bfloat16()
        )  # the head's
    return FLOAT * _count(outside) + max(stored, logits)


def _largest_block(tensors: Sequence[PlannedTensor], config: dict[str, Any], recipe: Recipe) -> float:
    """A block's weights and codes, the original's beside it where drift is made up for; and the largest of what comes
    of it: second moments are gathered of a batch, weights corrected by them, a layer encoded, or gradients taken."""
    blocks: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        blocks.setdefault(block_of(tensor.name, config), []).append(tensor)
    if len(blocks) > 1:
        blocks.pop("", None)
    peaks = []
    for block in blocks.values():
        layers = [tensor for tensor in block if tensor.by and tensor.role != "embedding"]
        drift = bool(recipe.corrects_drift)
        gathered = [tensor for tensor in layers if tensor.method and tensor.method.needs]
        moments = _moments(gathered, recipe)
        passing = _passing(layers) + 2 * drift * FLOAT * TOKENS_PER_BATCH * _widest(gathered)  # its rows, and how far
        encoding = max(
            (_MATRICES * FLOAT * _count([each]) + _path_costs(each) + moments.get(each.name, 0) + _square(each)
             for each in layers), default=0,
        )  # fmt: skip
        correcting = max(
            (_CORRECTING * FLOAT * _count([each]) + moments[each.name] + _square(each) for each in gathered), default=0
        )
        learning = 0
        if _wants_gradients(recipe) or recipe.learns_blocks:
            learning = 2 * FLOAT * _count(layers) * bool(recipe.learns_blocks) + _activations(layers, FLOAT)
        gathering = (1 + drift) * max(moments.values(), default=0) + passing
        largest = max(gathering, encoding, drift * correcting, learning)
        peaks.append((FLOAT + 1) * _count(block) + drift * FLOAT * _count(block) + largest)
    return max(peaks, default=0)


def _square(tensor: PlannedTensor) -> int:
    """A second moment of a layer's inputs, or its factor; none where nothing is asked of them."""
    return FLOAT * tensor.matrix[1] ** 2 if tensor.method and tensor.method.needs else 0


def _moments(layers: Sequence[PlannedTensor], recipe: Recipe) -> dict[str, float]:
    """By a layer's name the bytes of second moments that are there with its own: of all that share its input, which
    have one each where tokens are weighed for each."""
    sharing: dict[tuple[str, int], int] = {}
    for tensor in layers:
        key = tensor.name.rsplit(".", 2)[0], tensor.matrix[1]
        sharing[key] = sharing.get(key, 0) + 1
    several = recipe.calibration.token_importance
    return {
        tensor.name: float(
            _square(tensor) * (sharing[tensor.name.rsplit(".", 2)[0], tensor.matrix[1]] if several else 1)
        )
        for tensor in layers
    }


def _passing(layers: Sequence[PlannedTensor]) -> float:
    """What a forward of a batch has at once: what every layer gives, and what comes of that before the widest."""
    outputs = sum(tensor.matrix[0] for tensor in layers if tensor.role == "linear")
    return FLOAT * TOKENS_PER_BATCH * (outputs + _PASSING * _widest(layers))


def _widest(layers: Sequence[PlannedTensor]) -> int:
    """The inputs of the layer that has most."""
    return max((tensor.matrix[1] for tensor in layers if tensor.role == "linear"), default=0)


def _path_costs(tensor: PlannedTensor) -> int:
    """Of what a state hands on to the next, in every row, where a trellis is searched."""
    spec = tensor.spec
    if not isinstance(spec, CodebookSpec) or not spec.window:
        return 0
    return FLOAT * tensor.matrix[0] * 2 ** (spec.window - spec.width)


def _activations(layers: Sequence[PlannedTensor], size: int) -> float:
    """What a backward pass through these layers keeps of one batch, in values of `size` bytes."""
    outputs = sum(tensor.matrix[0] for tensor in layers if tensor.role == "linear")
    return _SAVED * size * TOKENS_PER_BATCH * outputs


def _distillation(tensors: Sequence[PlannedTensor], config: dict[str, Any], width: int, recipe: Recipe) -> float:
    """What is learned, with its gradients and moments; the tables, decoded, and their gradients; one block's weights
    and activations, and what each was given; the logits of a few positions."""
    size = 2 if multiplies_bfloat16() else FLOAT
    blocks: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        if tensor.by and tensor.role == "linear":
            blocks.setdefault(block_of(tensor.name, config), []).append(tensor)
    learned = sum(_open_bytes(tensor, recipe) for tensor in tensors if tensor.by)
    tables = [_count([tensor]) for tensor in tensors if tensor.role == "embedding"]
    resident = size * sum(tables) + (FLOAT + 3 * size) * max(tables, default=0)
    given = size * width * TOKENS_PER_BATCH * len(blocks)
    due = max((_decoded_block(block, size) for block in blocks.values()), default=0)
    logits = 5 * FLOAT * _POSITIONS * _vocabulary(tensors)
    return learned + resident + given + max(due, logits)


def _vocabulary(tensors: Sequence[PlannedTensor]) -> int:
    """Rows of the longest table."""
    return max((tensor.shape[0] for tensor in tensors if tensor.role == "embedding"), default=0)


def _decoded_block(layers: Sequence[PlannedTensor], size: int) -> float:
    """Weights, codewords and their places, activations; the gradients of the largest matrix."""
    largest = max(_count([tensor]) for tensor in layers)
    return (size + 3) * _count(layers) + 3 * FLOAT * largest + _activations(layers, size)


def _generation(tensors: Sequence[PlannedTensor], config: dict[str, Any], recipe: Recipe) -> float:
    """The keys and values of what the original writes at once, and the logits of a token; its weights are mapped."""
    at_once = documents_at_once(config, learning_window(recipe))
    loaded = max((tensor.bytes_before for tensor in tensors), default=0)
    cache = _document_bytes(config, learning_window(recipe)) * at_once
    return max(cache + 4 * FLOAT * at_once * _vocabulary(tensors), 1.5 * loaded)


def documents_at_once(config: dict[str, Any], length: int) -> int:
    """How many documents of so many tokens the original writes side by side: as their keys and values have room."""
    return max(_FEWEST_DOCUMENTS, min(WINDOWS_AT_ONCE, _KEYS_AND_VALUES // max(1, _document_bytes(config, length))))


def _document_bytes(config: dict[str, Any], length: int) -> int:
    """Of the keys and values of a document of so many tokens."""
    size = 2 if multiplies_bfloat16() else FLOAT
    width = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    cached = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or width // heads)
    return 2 * size * layers * cached * length


def _open_bytes(tensor: PlannedTensor, recipe: Recipe) -> float:
    """What learns of a matrix: scales, their gradients and moments; and where codes move, these and what moves them."""
    spec, n = tensor.spec, _count([tensor])
    parts = spec.parts(*tensor.matrix).items()
    found = 4.0 * FLOAT * sum(math.prod(shape) for name, (_, shape) in parts if name.rpartition(".")[2] == "scales")
    if isinstance(spec, CodebookSpec) and not spec.window and recipe.distill.mapping_rate and tensor.prune is None:
        found += n * (FLOAT / spec.dim + 2)
    return found
