"""Compressed networks as torch modules again: the decoded tensors of an artifact as a checkpoint like any other."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from compressor.checkpoints.architecture import resolve
from compressor.checkpoints.checkpoint import Checkpoint
from compressor.checkpoints.opening import read_config
from compressor.checkpoints.reshaping import RECORD, Reshaping
from compressor.checkpoints.source import Source, TensorInfo
from compressor.core.artifact import Artifact
from compressor.core.errors import CheckpointError
from compressor.core.reading import refuse_links
from compressor.core.sizes import RECORD as SIZES
from compressor.core.sizes import SizeEntry, chosen_size, own_name
from compressor.core.tensors import EncodedTensors, Part, SizeTensors

WEIGHTS = "model.safetensors"


class DecodedSource(Source):
    """Encoded tensors, each decoded to float32 when it is read; integers stay what they are."""

    def __init__(self, path: Path, tensors: EncodedTensors) -> None:
        lost = next((name for name, other in tensors.tied.items() if other not in tensors), None)
        if lost is not None:
            raise CheckpointError(
                f"{path}: '{lost}' stands for '{tensors.tied[lost]}', which is not in it; compress again"
            )
        infos = {name: _info(name, tensors) for name in (*tensors, *sorted(tensors.tied))}
        super().__init__("artifact", [path], infos, dict(tensors.tied))
        self.encoded = tensors

    def file_of(self, name: str) -> Path:
        return self.files[0]

    def read(self, name: str) -> Tensor:
        tensor = self.encoded[name]
        if tensor.encoding.kind == "dense":
            values = tensor.encoding.parts()["weight"]
            return (tensor.decode() if values.is_floating_point() else tensor.layout.tensor(values)).clone()
        return tensor.decode()


def load(path: str | PathLike[str], arch: str | None = None, size: str | None = None) -> nn.Module:
    """The network of an artifact's directory with its decoded weights: float32, in eval mode.

    Args:
        path: The directory.
        arch: `module:callable` that returns the module, where no config.json and no known architecture tells. The
            one that the artifact names is not called: it may come from anybody.
        size: Of an artifact that holds networks of several sizes, which one; by default the largest.

    Raises:
        UsageError: It holds no such size.
        CheckpointError: The directory is no artifact, or its network cannot be built.
    """
    artifact = Artifact.open(Path(path))
    weights = artifact.directory / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{artifact.directory}: has no {WEIGHTS}; give a directory that compress wrote")
    refuse_links(artifact.directory, (WEIGHTS, "config.json", RECORD))
    config_file = artifact.directory / "config.json"
    config = read_config(config_file) if arch is None and config_file.is_file() else None
    record = artifact.directory / RECORD
    tensors, reshaping = EncodedTensors([weights]), Reshaping.read(record) if record.is_file() else None
    if size is not None:
        sizes, entry = chosen_size(artifact.directory, size)
        if size != sizes.largest:
            tensors = size_tensors(weights, size, entry)
            reshaping = None if entry.structure is None else Reshaping.of(entry.structure, artifact.directory / SIZES)
            config = config if entry.config is None or arch is not None else entry.config
    source = DecodedSource(weights, tensors)
    if reshaping is None:
        architecture = resolve(artifact.directory, source, config, arch)
    else:
        whole = DecodedSource(weights, source.encoded)
        whole.tensors = reshaping.before(source.tensors)
        architecture = reshaping.architecture(resolve(artifact.directory, whole, config, arch))
    recorded = (artifact.report.get("source") or {}).get("arch")
    if architecture.name == "unknown" and recorded:
        raise CheckpointError(
            f"{artifact.directory}: its network is built by '{recorded}', which the artifact names; what an artifact "
            f"names is not run; give arch={recorded!r} if you trust it"
        )
    return Checkpoint(artifact.directory, source, architecture, config=config).build("cpu").float()


def size_tensors(weights: Path, size: str, entry: SizeEntry) -> SizeTensors:
    """The tensors of one of an artifact's sizes, in the file of all of them.

    Raises:
        CheckpointError: The file does not hold what is said of it.
    """
    whole, everything = EncodedTensors([weights]), EncodedTensors([weights], own=True)
    other = {*entry.absent, *entry.parts, *entry.own}
    names = {name: name for name in whole if name not in other} | {name: own_name(name, size) for name in entry.own}
    missing = [stored for stored in names.values() if stored not in everything]
    if missing:
        raise CheckpointError(f"{weights}: holds no '{missing[0]}', which size {size} has; compress again")
    parts = {name: Part(stored, tuple(everything.describe(stored)["tensor_shape"])) for name, stored in names.items()}
    parts |= {name: Part(stored, tuple(shape)) for name, (stored, shape) in entry.parts.items()}
    lost = next((name for name, other in entry.tied.items() if other not in parts), None)
    if lost is not None:
        raise CheckpointError(f"{weights}: holds nothing that '{lost}' of size {size} could stand for; compress again")
    return SizeTensors(weights, parts, entry.tied)


def decoded_checkpoint(checkpoint: Checkpoint, tensors: EncodedTensors) -> Checkpoint:
    """The checkpoint's network with what `tensors` decode to, each when it is read."""
    source = DecodedSource(checkpoint.path, tensors)
    return Checkpoint(
        checkpoint.path, source, checkpoint.blueprint, config=checkpoint.config,
        tokenizer_files=checkpoint.tokenizer_files,
    )  # fmt: skip


def _info(name: str, tensors: EncodedTensors) -> TensorInfo:
    shape = tuple(tensors.describe(name)["tensor_shape"])
    return TensorInfo(name, shape, "F32", 4 * math.prod(shape))
