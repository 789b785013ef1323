"""Whether arrays fit a network, found out before any work: by their names, their numbers, and one example.

The network runs on the first example as the artifact will, in float32. Of what a network of 4 GB and more makes of it
only shapes and types are computed. Floats of another width and small integers are cast where it takes no others.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor.core.batch import as_batch, call
from compressor.core.errors import CheckpointError, CompressorError, DataError
from compressor.core.log import LOGGER
from compressor.core.resources import refuse_shortage
from compressor.data.arrays import LABELS, Arrays
from compressor.graph.blocks import layout_of
from compressor.plan.workload import LayerWork, Workload

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint

LARGEST = 1_000_000_000
"""Bytes in float32 of a network that is loaded for one example; of larger ones shapes are computed."""
IGNORED_LABEL = -100
"""The class that torch's losses leave out."""
_CHUNK = 1 << 22


Tables = list[tuple[str, int]]
"""What a network's tables were asked for: (array's name, rows of the table)."""


def fitted(checkpoint: Checkpoint, sources: Iterable[Arrays | None]) -> list[Arrays | None]:
    """The arrays of each source as the network takes them.

    Raises:
        DataError: They do not fit: names, types, shapes, numbers or classes.
    """
    network = _built(checkpoint)
    return [None if source is None else _fitted(checkpoint, network, source) for source in sources]


def _built(checkpoint: Checkpoint) -> nn.Module:
    large = 4 * sum(info.numel for info in checkpoint.tensors.values()) > LARGEST
    network = checkpoint.build("meta" if large else "cpu")
    return (network.to("meta") if large else network.float()).requires_grad_(False)


def _fitted(checkpoint: Checkpoint, network: nn.Module, source: Arrays) -> Arrays:
    source = _named(checkpoint, network, _native(source))
    for name, array in source.inputs.items():
        _refuse_not_finite(source.source, name, array)
    _refuse_axes(checkpoint, source)
    refusals: list[str] = []
    for candidate in (source, *_cast(source)):
        seen: Tables = []
        try:
            with _noting(network) as calls:
                output = _example(network, candidate, seen)
        except CompressorError:
            raise
        except Exception as error:  # a stranger's forward: whatever it raises, it does not take this
            refuse_shortage(error)
            if _knows_no_values(network, error):
                return candidate
            _refuse_beyond_tables(candidate, seen)
            refusals.append(_reason(error))
            continue
        _refuse_beyond_tables(candidate, seen)
        _refuse_random(checkpoint, output, _example(network, candidate, []))
        candidate = _with_classes(replace(candidate, load=_load(candidate, calls)), output)
        _refuse_classes(candidate, output)
        return candidate
    raise DataError(
        f"{source.source}: {checkpoint.architecture} cannot be run on the first example; found {_described(source)}, "
        f"and {refusals[0]}; {_advice(checkpoint, refusals[0])}"
    )


def _refuse_axes(checkpoint: Checkpoint, source: Arrays) -> None:
    """Refuses arrays whose axes are not an ONNX graph's; what it takes as a whole has an axis of examples more."""
    from compressor.onnx.file import OnnxSource

    if not isinstance(checkpoint.source, OnnxSource):
        return
    graph = checkpoint.source.model.graph
    first = next((list(value.shape or ()) for value in graph.inputs), [])
    for value in graph.inputs:
        array = source.inputs.get(str(value.name))
        if array is None or value.shape is None:
            continue
        n_axes, wanted = len(value.shape), ", ".join(str(size) for size in value.shape)
        if array.ndim not in (n_axes, n_axes + 1):
            raise DataError(
                f"{source.source}: array '{value.name}' of shape {array.shape} has {array.ndim} axes; "
                f"{checkpoint.path} takes [{wanted}], an example per row of the first axis"
            )
        inner = list(zip(value.shape[array.ndim == n_axes :], array.shape[1:], strict=True))
        if array.ndim == n_axes and list(value.shape)[:1] != first[:1]:
            inner += [(size, 1) for size in value.shape[:1]]  # one example, which the graph takes as a whole
        if any(isinstance(size, int) and size > 0 and size != found for size, found in inner):
            raise DataError(
                f"{source.source}: array '{value.name}' has shape {array.shape}; {checkpoint.path} takes [{wanted}], "
                "an example per row of the first axis, or, where that is of no examples, of one before it"
            )


def _advice(checkpoint: Checkpoint, refusal: str) -> str:
    """What to write instead; of weights in another width than artifacts compute in, that this is so."""
    widths = {info.dtype for info in checkpoint.tensors.values()} & {"F64", "F16", "BF16"}
    if widths and "dtype" in refusal:
        return (
            f"its weights are stored as {', '.join(sorted(widths))} and artifacts compute in float32: a forward that "
            "casts its inputs has to cast them to its weights' own type (x.to(self.weight.dtype))"
        )
    return "give what its forward takes, an example per row of the first axis"


def _refuse_random(checkpoint: Checkpoint, once: Tensor | None, again: Tensor | None) -> None:
    """Refuses a network that answers otherwise each time, as one does whose dropout is never off."""
    if once is None or again is None or once.device.type == "meta" or not once.is_floating_point():
        return
    if once.shape != again.shape or not torch.allclose(once, again, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise CheckpointError(
            f"{checkpoint.path}: {checkpoint.architecture} gives another output each time for one input: its forward "
            "draws random numbers, as functional.dropout does without training=self.training; make it deterministic "
            "in eval mode"
        )


def _native(source: Arrays) -> Arrays:
    """Numbers in this machine's order of bytes."""
    inputs = {}
    for name, array in source.inputs.items():
        if array.dtype.kind not in "fiub":
            raise DataError(
                f"{source.source}: array '{name}' is of type {array.dtype}; networks take numbers; save it as float32 "
                "or int64"
            )
        order = array.dtype.newbyteorder("=")
        inputs[name] = array if array.dtype == order else array.astype(order)
    return replace(source, inputs=inputs)


def _named(checkpoint: Checkpoint, network: nn.Module, source: Arrays) -> Arrays:
    """The arrays that the network's forward asks for; one of labels is an input where it asks for that."""
    needed, known = _arguments(checkpoint, network)
    inputs, labels = dict(source.inputs), source.labels
    for name in LABELS:
        if labels is not None and name in needed and name not in inputs and _asks_for(needed, inputs):
            inputs[name], labels = np.asarray(labels), None
    if len(inputs) == 1 and len(needed) <= 1:
        return source
    inputs |= _defaults(checkpoint, source, [name for name in needed if name not in inputs])
    missing = [name for name in needed if name not in inputs]
    unknown = [] if known is None else [name for name in inputs if name not in known]
    if missing or unknown:
        wanted = ", ".join(needed or known or ()) or "nothing"
        lacks = f", and lacks {', '.join(missing)}" if missing else ""
        raise DataError(
            f"{source.source}: holds {', '.join(source.inputs)}{lacks}; {checkpoint.architecture} takes {wanted}; name "
            "arrays by what the forward takes, 'labels' what is wanted of it, and leave out the rest"
        )
    return replace(source, inputs=inputs, labels=labels)


def _defaults(checkpoint: Checkpoint, source: Arrays, missing: list[str]) -> dict[str, np.ndarray]:
    """What an ONNX graph takes beside the data that it says itself: zeros as a state, a number that it compares."""
    from compressor.onnx.defaults import default_inputs
    from compressor.onnx.file import OnnxSource

    if not missing or not source.inputs or not isinstance(checkpoint.source, OnnxSource):
        return {}
    known = default_inputs(checkpoint.source.model.graph)
    missing = [name for name in missing if name in known]
    if not missing:
        return {}
    told = [f"{name} = {known[name].max()}" + " everywhere" * (known[name].ndim > 0) for name in missing]
    LOGGER.warning("%s: holds no %s; %s for every example, as the graph itself says", source.source,
                   ", ".join(missing), ", ".join(told))  # fmt: skip
    return {name: np.broadcast_to(known[name], (len(source), *known[name].shape)) for name in missing}


def _asks_for(needed: list[str], inputs: Mapping[str, np.ndarray]) -> bool:
    """Whether what is there is not enough: one array may have any name."""
    return len(needed) > len(inputs)


def _arguments(checkpoint: Checkpoint, network: nn.Module) -> tuple[list[str], list[str] | None]:
    """(arguments that the forward needs, all that it knows; None where it takes any)."""
    from compressor.onnx.file import OnnxSource

    if isinstance(checkpoint.source, OnnxSource):
        names = [str(value.name) for value in checkpoint.source.model.graph.inputs]
        made_up = ("attention_mask", "token_type_ids", "position_ids")
        return [name for name in names if name not in made_up and not name.startswith("past_key_values.")], names
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):
        return [], None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        known = None
    else:
        known = [each.name for each in parameters if each.kind is not each.VAR_POSITIONAL]
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return [], known
    plain = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return [each.name for each in plain if each.default is each.empty], known


def _refuse_not_finite(where: str, name: str, array: np.ndarray) -> None:
    if array.dtype.kind != "f" or not array.size:
        return
    rows = max(1, _CHUNK // max(1, array[0].size))
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        bad = ~np.isfinite(part.reshape(len(part), -1)).all(1)
        if bad.any():
            raise DataError(
                f"{where}: array '{name}' holds NaN or infinite values, first in row {start + int(bad.argmax())}; "
                "leave such rows out"
            )


def _cast(source: Arrays) -> list[Arrays]:
    """The same numbers as float32 and int64, where they are something else."""
    wanted = {"f": np.float32, "i": np.int64, "u": np.int64}
    kinds = {name: np.dtype(wanted.get(array.dtype.kind, array.dtype)) for name, array in source.inputs.items()}
    if all(array.dtype == kinds[name] for name, array in source.inputs.items()):
        return []
    return [replace(source, inputs={name: a.astype(kinds[name], copy=False) for name, a in source.inputs.items()})]


def _example(network: nn.Module, source: Arrays, seen: Tables) -> Tensor | None:
    """The first output for the first example; `seen` takes the tables that are read."""
    batch = as_batch({name: np.array(array[:1]) for name, array in source.inputs.items()})
    device = next((each.device for each in network.parameters()), torch.device("cpu"))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}

    def note(ids: Tensor, table: Tensor) -> None:
        for name, tensor in batch.items():
            if ids.shape == tensor.shape and _alike(ids, tensor):
                seen.append((name or next(iter(source.inputs)), len(table)))

    with torch.no_grad(), _LookUps(note):
        output = call(network, batch)
    return _first(output)


class _LookUps(TorchFunctionMode):
    """Tells `note` of every look-up of ids in a table meanwhile.

    By what is looked up, not by the modules that are called: a table of positions may be given ids for their number.
    """

    def __init__(self, note: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if func is nn.functional.embedding:
            found = inspect.signature(func).bind(*args, **kwargs or {}).arguments
            self.note(found["input"], found["weight"])
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def _noting(network: nn.Module) -> Iterator[list[LayerWork]]:
    """Every call of a layer of the network meanwhile."""
    calls: list[LayerWork] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layout, written = layout_of(module), _first(output)
        if layout is not None and args and isinstance(args[0], Tensor) and written is not None:
            shape = layout.shape[::-1] if layout.transposed else layout.shape
            groups = getattr(module, "groups", 1)
            calls.append(LayerWork(name, tuple(shape), groups, args[0].numel(), written.numel()))

    hooks = [
        each.register_forward_hook(partial(note, name))
        for name, each in network.named_modules() if not isinstance(each, nn.Embedding)
    ]  # fmt: skip
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _load(source: Arrays, calls: list[LayerWork]) -> Workload:
    sizes = [array[0].size for array in source.inputs.values()]
    return Workload(tuple(calls), sum(sizes), max(sizes))


def _alike(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.device.type != "meta" and torch.equal(one.long(), other.long()))


def _first(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _knows_no_values(network: nn.Module, error: Exception) -> bool:
    """Whether it failed only since shapes alone were computed."""
    on_meta = any(each.device.type == "meta" for each in network.parameters())
    return on_meta and (isinstance(error, NotImplementedError) or "meta" in str(error).lower())


def _refuse_beyond_tables(source: Arrays, seen: Tables) -> None:
    for name, n_rows in seen:
        array = source.inputs[name]
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= n_rows:
            row = int(
                np.argmax((array.reshape(len(array), -1) < 0).any(1) | (array >= n_rows).reshape(len(array), -1).any(1))
            )
            raise DataError(
                f"{source.source}: array '{name}' holds {high if high >= n_rows else low} in row {row}, and the "
                f"network's table has rows 0 to {n_rows - 1}; give the data that it was trained with"
            )


def _with_classes(source: Arrays, output: Tensor | None) -> Arrays:
    """Without labels where folders were taken for classes and the network has another number of them."""
    labels = source.labels
    if not source.guessed or labels is None or output is None:
        return source
    n_folders, n_classes = int(labels.max()) + 1, output.shape[-1] if output.dim() > 1 else 1
    if n_folders == n_classes:
        LOGGER.warning("%s: its %d folders are taken as the classes in sorted order; if they are others, set "
                       "images.classes", source.source, n_folders)  # fmt: skip
        return source
    LOGGER.warning("%s: its %d folders are no labels, the network has %d classes; name them in images.classes to count "
                   "them", source.source, n_folders, n_classes)  # fmt: skip
    return replace(source, labels=None, guessed=False)


def _refuse_classes(source: Arrays, output: Tensor | None) -> None:
    """Refuses labels that no output stands for."""
    labels = source.labels
    if labels is None or output is None or output.dim() < 1:
        return
    wanted = (len(labels), *output.shape[1:-1])
    if labels.shape != wanted:
        raise DataError(
            f"{source.source}: labels have shape {labels.shape}; the outputs of shape {tuple(output.shape)} of one "
            f"example ask for {wanted}, a class each; give classes as integers, or leave labels out"
        )
    if labels.dtype.kind not in "iu" or output.dim() < 2:
        return
    judged = labels[labels != IGNORED_LABEL]
    if judged.size and (int(judged.min()) < 0 or int(judged.max()) >= output.shape[-1]):
        raise DataError(
            f"{source.source}: labels go from {int(judged.min())} to {int(judged.max())}; the network has "
            f"{output.shape[-1]} classes, 0 to {output.shape[-1] - 1}; give the labels that it was trained with"
        )


def _described(source: Arrays) -> str:
    each = [f"'{name}' {array.shape} of {array.dtype}" for name, array in source.inputs.items()]
    return ", ".join(each[:4]) + (f" and {len(each) - 4} more" if len(each) > 4 else "")


def _reason(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"
