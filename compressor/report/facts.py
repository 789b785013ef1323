"""What a report shows, taken from an artifact: bytes and errors per layer, quality in one number, stages."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.core.artifact import WEIGHTS, Artifact
from compressor.core.errors import CheckpointError
from compressor.core.files import resolved
from compressor.core.packed import encoding_label, packed_tensors
from compressor.core.quantities import short_duration, size
from compressor.core.roles import block_of, folded

LITTLE = 0.05
"""A difference in speed that is not worth a word."""
MOST_LAYERS = 48
TABLES = "outside of layers"
_NUMBERED = re.compile(r"^(.*?_\d+)\.[^.]+\.")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an artifact; `before` is about what it took, `error` is None where it was not measured."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    bytes: int
    before: float
    error: float | None

    @property
    def layer(self) -> str:
        """The repeated block, or for what is in none the name's first parts."""
        return self.block or ".".join(self.name.split(".")[:-1]) or self.name

    @property
    def block(self) -> str:
        """`model.layers.0`, or as ONNX graphs have it `encoder.layer_0`; empty outside of blocks."""
        numbered = _NUMBERED.match(self.name)
        return block_of(self.name) or (numbered.group(1) if numbered else "")

    @property
    def kind(self) -> str:
        """What alike tensors of all layers have in common."""
        return folded(self.name.removeprefix(f"{self.block}.")).removesuffix(".weight")

    @property
    def is_dense(self) -> bool:
        return self.encoding.startswith("dense")


@dataclass(frozen=True)
class Layer:
    """The tensors of a layer, in order."""

    name: str
    tensors: tuple[StoredTensor, ...]

    def bytes_by_encoding(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for tensor in self.tensors:
            found[tensor.encoding] = found.get(tensor.encoding, 0) + tensor.bytes
        return found

    @property
    def before(self) -> float:
        return sum(tensor.before for tensor in self.tensors)


def stored_tensors(artifact: Artifact) -> list[StoredTensor]:
    """The tensors in the order of the file."""
    source, errors = artifact.report.get("source") or {}, artifact.report.get("errors") or {}
    each = source.get("tensor_bytes", 0) / max(source.get("n_parameters", 0), 1) or 4.0
    found = packed_tensors(artifact.directory / WEIGHTS) or {}
    return [
        StoredTensor(name, tuple(one["tensor_shape"]), encoding_label(one), one["bytes"],
                     each * _product(one["tensor_shape"]), errors.get(name))
        for name, one in found.items()
    ]  # fmt: skip


def layers_of(tensors: Iterable[StoredTensor]) -> list[Layer]:
    """Tensors by layer; where there are too many layers, the smallest are one."""
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.layer, []).append(tensor)
    found = [Layer(name, tuple(members)) for name, members in groups.items()]
    if len(found) <= MOST_LAYERS:
        return found
    kept = {layer.name for layer in sorted(found, key=lambda layer: -layer.before)[: MOST_LAYERS - 1]}
    rest = [layer for layer in found if layer.name not in kept]
    others = Layer(f"{len(rest)} smaller layers", tuple(tensor for layer in rest for tensor in layer.tensors))
    return [layer for layer in found if layer.name in kept] + [others]


@dataclass(frozen=True)
class Loss:
    """The loss of quality in one number, 0 for the original, and what it is."""

    value: float
    what: str


def loss_of(report: dict[str, Any]) -> Loss | None:
    """Of the measured quality, the largest of all outputs; None where nothing was measured."""
    quality = report.get("quality") or {}
    worst = quality.get("worst") or {}
    if quality.get("ratio") is not None:
        return Loss(quality["ratio"] - 1, "rise of perplexity")
    found = []
    for key, what, whole in (("cosine", "1 − cosine", True), ("top1_agreement", "share of changed predictions", True),
                             ("relative_error", "relative error", False)):  # fmt: skip
        if quality.get(key) is not None:
            of = f" of {worst[key]}" if key in worst else ""
            found.append(Loss(1 - quality[key] if whole else quality[key], what + of))
    return max(found, key=lambda loss: loss.value, default=None)


def siblings(artifact: Artifact) -> list[Artifact]:
    """Other artifacts of the same original in the same folder."""
    digest = (artifact.report.get("source") or {}).get("sha256")
    beside = resolved(artifact.directory).parent
    paths = [path for path in sorted(beside.glob("*/compression.json")) if path.parent != resolved(artifact.directory)]
    found = []
    for path in paths:
        with contextlib.suppress(CheckpointError):  # a damaged one beside it is nothing to compare with
            found += [] if path.parent.name.endswith(".partial") else [Artifact.open(path.parent)]
    return [other for other in found if digest and (other.report.get("source") or {}).get("sha256") == digest]


def title_of(directory: Path) -> str:
    return resolved(directory).name


def _product(shape: Iterable[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


@dataclass(frozen=True)
class SearchedSpeed:
    """What a network takes that was searched for its speed, as it was measured once more in the artifact.

    what     threads and batch
    sought   the target, and what the artifact has of it
    """

    latency: float
    original: float
    what: str
    sought: str


def searched_speed(report: dict[str, Any]) -> SearchedSpeed | None:
    """Of a run with --target-latency or --target-speedup."""
    found = report.get("search") or {}
    latency, original = found.get("latency"), found.get("original")
    if not latency or not original:
        return None
    threads, batch = found.get("threads"), found.get("batch") or 1
    cores = "all cores" if threads is None else "1 thread" if threads == 1 else f"{threads} threads"
    target = found.get("target_latency")
    sought = f"{found.get('target_speedup'):g} × its speed" if target is None else short_duration(target)
    return SearchedSpeed(
        latency, original, f"{cores}, batch {batch}",
        f"{original / latency:.3g} × the original's speed, where {sought} was sought; the choice of "
        f"{found.get('n_measured')} networks",
    )  # fmt: skip


def drawbacks(report: dict[str, Any]) -> list[str]:
    """In what the artifact is worse than its original where a person would expect better: size and speed."""
    sizes, found = report.get("size") or {}, []
    before, after = sizes.get("original_bytes"), sizes.get("bytes")
    if before and after and after >= before:
        found.append(f"larger than its original: {size(after)}, not {size(before)}")
    speed, original = report.get("speed") or {}, report.get("original_speed") or {}
    times = [each.get("latency_seconds") or 0.0 for each in (original, speed)]
    errors = [each.get("latency_error") or 0.0 for each in (original, speed)]
    if all(times) and times[0] / times[1] < 1 - max(LITTLE, 3 * sum(errors)):
        found.append(f"slower than its original: {times[0] / times[1]:.2f} × its speed")
    rates = [each.get("decode_tokens_per_second") or 0.0 for each in (original, speed)]
    if all(rates) and rates[1] / rates[0] < 1 - LITTLE:
        found.append(f"slower than its original: {rates[1] / rates[0]:.2f} × its tokens per second")
    return found
