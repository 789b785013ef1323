"""What is inside of a checkpoint or an artifact, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.core.artifact import WEIGHTS, Artifact, is_artifact
from compressor.core.errors import CheckpointError
from compressor.core.packed import encoding_label, packed_tensors
from compressor.core.roles import role_of


def inspect_path(path: Path, arch: str | None = None, trust_pickle: bool = False) -> dict[str, Any]:
    """Of an artifact or a checkpoint: kind, architecture, bytes per kind of tensor, encodings, provenance.

    Raises:
        CheckpointError: It can be read as neither.
    """
    if is_artifact(path):
        return _artifact(Artifact.open(path))
    if path.suffix == ".safetensors" and (written := packed_tensors(path)) is not None:
        return {"kind": "artifact", "path": str(path), **_encodings(written)}
    return _checkpoint(open_checkpoint(path, arch=arch, trust_pickle=trust_pickle))


def _artifact(artifact: Artifact) -> dict[str, Any]:
    written = packed_tensors(artifact.directory / WEIGHTS) or {}
    files = {
        str(path.relative_to(artifact.directory)): path.stat().st_size
        for path in sorted(artifact.directory.rglob("*"))
        if path.is_file()
    }
    head = {"kind": "artifact", "path": str(artifact.directory), "files_bytes": files}
    report = {key: value for key, value in artifact.report.items() if key != "tensors"}
    return head | _encodings(written) | {"report": report}


def _encodings(written: dict[str, dict[str, Any]]) -> dict[str, Any]:
    bytes_by_encoding: dict[str, int] = {}
    tensors = []
    for name, description in written.items():
        label = encoding_label(description)
        bytes_by_encoding[label] = bytes_by_encoding.get(label, 0) + description["bytes"]
        tensors.append(
            {"name": name, "shape": description["tensor_shape"], "encoding": label, "bytes": description["bytes"]}
        )
    return {"n_tensors": len(tensors), "bytes_by_encoding": bytes_by_encoding, "tensors": tensors}


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    by_role: dict[str, int] = {}
    tensors = []
    for info in checkpoint.tensors.values():
        role = info.role or role_of(info.name, info.shape, checkpoint.config)
        by_role[role] = by_role.get(role, 0) + info.nbytes
        tensors.append(
            {"name": info.name, "shape": list(info.shape), "encoding": f"{role} {info.dtype}", "bytes": info.nbytes}
        )
    if not tensors:
        raise CheckpointError(f"{checkpoint.path}: holds no tensors; give a file with weights")
    described = checkpoint.describe()
    return {"kind": "checkpoint", "format": described.pop("kind"), **described, "bytes_by_role": by_role} | {
        "tensors": tensors
    }
