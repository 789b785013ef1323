"""The state dict of a TorchScript archive, without running any of it.

`data.pkl` describes the module tree with classes under `__torch__`, whose code lies in the archive. Here
these classes become plain attribute bags, and only the few functions that rebuild tensors are allowed.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoints.archive import BROKEN, opened_archive
from compressor.core.errors import CheckpointError


class Attributes:
    """A scripted object: only its attributes, never its methods."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def rebuild(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    """A tensor over a flat storage."""
    return storage.as_strided(size, stride, offset)


def plain(value: Any, *_: Any) -> Any:
    """TorchScript's typed lists, as the list that they wrap."""
    return value


STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): rebuild,
    ("torch._utils", "_rebuild_parameter"): plain,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class Unpickler(pickle.Unpickler):
    """Builds tensors and attribute bags, and refuses every other global."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.path, self.archive, self.root = path, archive, root
        self.storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (Attributes,), {})
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch.jit._pickle":
            return plain
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise CheckpointError(
            f"{self.path}: is a TorchScript archive with {module}.{name}, which would be executed; nothing "
            "of it was run; save the state dict alone and give --arch"
        )

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            self.storages[key] = flat
        return self.storages[key]


def load_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the archive by its attribute path."""
    try:
        with opened_archive(path) as archive:
            root = archive.namelist()[0].partition("/")[0]  # as torch finds it
            content = Unpickler(path, archive, root).load()
        return dict(_tensors(content, ""))
    except (*BROKEN, pickle.UnpicklingError, StopIteration, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: is a TorchScript archive that cannot be read; {error!r}; save the state dict alone"
        ) from error


def _tensors(content: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in vars(content).items() if isinstance(content, Attributes) else ():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")
