"""torch.save files: a state dict, alone or under a usual key; loaded with `weights_only` unless trusted.

Of a zip archive only what describes the tensors is loaded, on the meta device, from a copy of the archive in which
every record of values is empty. The place of such a record in the copy tells which one a tensor's values are, and they
are read from the file when they are wanted. The older pickle format has no index and is loaded whole.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from compressor.checkpoints.archive import (
    BROKEN,
    MOST_INFLATED,
    MOST_TIMES,
    Record,
    has_directory,
    is_archive,
    opened_archive,
    read_record,
    records,
)
from compressor.checkpoints.safetensors_file import TORCH_NAMES
from compressor.checkpoints.source import Source, TensorInfo, merge_shards, refuse_empty
from compressor.checkpoints.unused import AVERAGES
from compressor.core.errors import CheckpointError
from compressor.core.resources import refuse_shortage

USUAL_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params",
    "model_weights", "net_state_dict", "params_ema", "ema",
)  # fmt: skip
NO_NETWORK = re.compile(r"optim|sched|scaler|(^|_)(lr|rng|loss|metric|callback|epoch)", re.IGNORECASE)
"""In keys of what a training keeps beside its network."""
PREFIXES = ("module.", "_orig_mod.")
_COUNT = "n_averaged"
"""What torch's AveragedModel counts beside its module."""
DTYPE_NAMES = {getattr(torch, name): code for code, name in TORCH_NAMES.items()}
REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)|whose module (\S+) is blocked|but got (.+?)[>.]")
READ_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, OSError,
    AttributeError, OverflowError, AssertionError, struct.error, MemoryError, RecursionError,
)  # fmt: skip


@dataclass
class StateDictSource(Source):
    """One or several torch.save files."""

    homes: dict[str, Path] = field(default_factory=dict)
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)
    archives: dict[Path, Archive] = field(default_factory=dict)

    @classmethod
    def open(cls, files: list[Path], *, trust_pickle: bool = False) -> StateDictSource:
        archives: dict[Path, Archive] = {}
        contents = {path: load_file(path, trust_pickle, archives) for path in files}
        modules = [found for content in contents.values() if (found := find_module(content)) is not None]
        dicts = {path: find_state_dict(path, content) for path, content in contents.items()}
        infos = {path: {n: _info(path, n, t) for n, t in tensors.items()} for path, tensors in dicts.items()}
        tensors, homes = merge_shards(infos)
        loaded = {name: tensor for found in dicts.values() for name, tensor in found.items()}
        shared = find_shared(loaded, homes)
        kind = "pickle" if modules else "state_dict"
        module = modules[0] if len(modules) == 1 else None
        notes = [note for path, content in contents.items() for note in _averages(path, content)]
        return cls(kind, files, tensors, shared, module, notes, homes=homes, loaded=loaded, archives=archives)

    def file_of(self, name: str) -> Path:
        return self.homes[name]

    def read(self, name: str) -> torch.Tensor:
        tensor = self.loaded[name]
        if tensor.device.type != "meta":
            return tensor.clone()
        return self.archives[self.homes[name]].read(self.homes[name], name, tensor)


@dataclass
class Archive:
    """Where values lie: the place of an empty record in the copy -> the record of the file.

    `swapped` says that their bytes are in the other order than this machine's.
    """

    places: dict[int, Record]
    swapped: bool

    def read(self, path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a tensor that was opened on meta."""
        storage = tensor.untyped_storage()
        offset = storage._checkpoint_offset
        record = None if offset is None else self.places.get(offset)
        there = 0 if record is None else record.n_bytes  # memory is taken for what is there, not for what is promised
        raw = torch.empty(min(storage.nbytes(), there), dtype=torch.uint8)
        present = read_record(path, record, raw.numpy().data) if record is not None and raw.numel() else 0
        if present != storage.nbytes():
            raise CheckpointError(f"{path}: is truncated inside of tensor '{name}'; fetch it again")
        size = tensor.element_size() // (2 if tensor.is_complex() else 1)
        if self.swapped and size > 1:
            raw = torch.from_numpy(raw.numpy().view(numpy.dtype(f"u{size}")).byteswap().view(numpy.uint8))
        try:
            flat = raw.view(tensor.dtype)
            return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).clone()
        except RuntimeError as error:
            refuse_shortage(error)
            raise _unreadable(path, error) from error


def find_shared(tensors: Mapping[str, torch.Tensor], homes: Mapping[str, Path]) -> dict[str, str]:
    """Name -> earlier name with the same view of the same storage. Equal values alone are no tie."""
    first: dict[tuple, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        place = storage._checkpoint_offset if tensor.device.type == "meta" else storage.data_ptr()
        key = (
            homes[name],
            place,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and first.setdefault(key, name) != name:
            shared[name] = first[key]
    return shared


def load_file(path: Path, trust_pickle: bool, archives: dict[Path, Archive]) -> Any:
    """The content of a torch.save file; without trust, nothing of it is executed.

    Tensors are on meta where `archives` then says where their values lie.
    """
    refuse_empty(path)
    zipped = is_archive(path)
    with path.open("rb") as file:
        start = file.read(4)
    if zipped and not has_directory(path):
        raise CheckpointError(
            f"{path}: is truncated; it has {path.stat().st_size} bytes and the index at its end is missing; "
            "fetch it again"
        )
    if not zipped and start[:1] != b"\x80":
        raise CheckpointError(
            f"{path}: is not a torch.save file; it starts with {start!r}; give a file written by torch.save"
        )
    if zipped and is_torchscript(path):
        from compressor.checkpoints.torchscript import load_torchscript

        return load_torchscript(path)
    if trust_pickle:
        return _load_trusted(path)
    if not zipped:
        return _load_weights(path, path, "cpu")
    copy, archives[path] = without_values(path)
    return _load_weights(path, copy, "meta")


def without_values(path: Path) -> tuple[io.BytesIO, Archive]:
    """A copy of an archive in which records of values are empty, and where those lie in the file."""
    copy = io.BytesIO()
    try:
        with opened_archive(path) as archive, path.open("rb") as file, zipfile.ZipFile(copy, "w") as made:
            found = records(path, archive, file)
            keys = [name for name in found if name.startswith("data/")]
            for name in ("data.pkl", *(name for name in ("version", ".data/version") if name in found)):
                if name not in found:
                    raise CheckpointError(f"{path}: is not a torch.save file; it has no {name}; give one of torch.save")
                made.writestr(f"archive/{name}", _content(path, found[name]))
            for name in keys:
                made.writestr(f"archive/{name}", b"")
            order = _content(path, found["byteorder"]) if "byteorder" in found else sys.byteorder.encode()
    except BROKEN as error:
        raise CheckpointError(f"{path}: is a damaged archive; {error}; fetch it again") from error
    with zipfile.ZipFile(copy) as made:
        empty = records(path, made, copy)
    places = {empty[name].offset: found[name] for name in keys}
    copy.seek(0)
    return copy, Archive(places, order.decode("ascii", "replace") != sys.byteorder)


def _content(path: Path, record: Record) -> bytes:
    """A record that is no values, whole."""
    content = bytearray(record.n_bytes)
    if read_record(path, record, memoryview(content)) != record.n_bytes:
        raise CheckpointError(f"{path}: is truncated or corrupt inside of its description; fetch it again")
    return bytes(content)


def is_torchscript(path: Path) -> bool:
    with opened_archive(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def _load_weights(path: Path, file: Path | io.BytesIO, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(file, map_location=device, weights_only=True)
    except READ_ERRORS as error:
        message = str(error)
        refused = REFUSED_GLOBAL.search(message)
        if isinstance(error, pickle.UnpicklingError) and refused:
            found = next(group for group in refused.groups() if group)
            raise CheckpointError(
                f"{path}: is a pickle with code that would be executed; found {found}; nothing of it was "
                "run; save the state dict alone (torch.save(model.state_dict(), ...)), or give "
                "--trust-pickle if you trust whoever made the file"
            ) from error
        if "quantized" in message.lower():
            raise CheckpointError(
                f"{path}: holds tensors that torch has quantised, whose codes would be coded again; give the "
                "checkpoint before it was quantised"
            ) from error
        raise _unreadable(path, error) from error


def _load_trusted(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (*READ_ERRORS, ImportError) as error:
        hint = "put the code of its classes on PYTHONPATH" if isinstance(error, ImportError | AttributeError) else ""
        raise _unreadable(path, error, hint) from error


def _unreadable(path: Path, error: BaseException, hint: str = "") -> CheckpointError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"{path}: cannot be read, it is truncated or corrupt; found {path.stat().st_size} bytes and "
        f"{first_line!r}; {hint or 'fetch it again'}"
    )


def find_module(content: Any) -> nn.Module | None:
    """The network inside of a trusted pickle, if there is one."""
    if isinstance(content, nn.Module):
        return content
    if isinstance(content, Mapping):
        return next((content[key] for key in USUAL_KEYS if isinstance(content.get(key), nn.Module)), None)
    return None


def find_state_dict(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, from under its usual keys, without wrappers' prefixes."""
    found = _search(content, depth=3)
    if found is None:
        keys = f" with keys {', '.join(map(repr, list(content)[:8]))}" if isinstance(content, Mapping) else ""
        raise CheckpointError(
            f"{path}: holds no state dict; found a {type(content).__name__}{keys}; save model.state_dict(), "
            f"alone or under one of {', '.join(USUAL_KEYS)}"
        )
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if all(name.startswith(prefix) or name == _COUNT for name in found):
                found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name != _COUNT}
    return {name: tensor.detach() for name, tensor in found.items()}


def _search(content: Any, depth: int) -> dict[str, torch.Tensor] | None:
    if isinstance(content, nn.Module):
        return dict(content.state_dict())
    if not isinstance(content, Mapping) or depth == 0:
        return None
    for key in USUAL_KEYS:
        if isinstance(content.get(key), Mapping | nn.Module):
            below = _search(content[key], depth - 1)
            if below is not None:
                return below
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if tensors and all(isinstance(key, str) for key in tensors):
        return tensors
    return _only_network(content, depth)


def _only_network(content: Mapping[Any, Any], depth: int) -> dict[str, torch.Tensor] | None:
    """What lies under a key of somebody's own, where no other could be meant."""
    found = {
        key: below
        for key, value in content.items()
        if isinstance(key, str) and not NO_NETWORK.search(key) and isinstance(value, Mapping | nn.Module)
        and (below := _search(value, depth - 1)) is not None
    }  # fmt: skip
    plain = [key for key in found if not AVERAGES.search(key)]
    chosen = plain if plain else list(found)
    return found[chosen[0]] if len(chosen) == 1 else None


def _averages(path: Path, content: Any) -> Iterator[str]:
    """Says where an average of the weights lies beside those that are taken."""
    taken = _search(content, depth=3)
    if not isinstance(content, Mapping) or taken is None:
        return
    for key, value in content.items():
        below = _search(value, 3) if isinstance(key, str) and isinstance(value, Mapping | nn.Module) else None
        if below is None or not AVERAGES.search(key) or next(iter(below.values())) is next(iter(taken.values())):
            continue
        yield (
            f"{path.name}: the weights of the training are taken; '{key}' beside them holds {len(below)} tensors of an "
            "average, which is often the better network: to take it, save it alone"
        )


def _info(path: Path, name: str, tensor: torch.Tensor) -> TensorInfo:
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{path}: tensor '{name}' is {tensor.dtype}, {tensor.layout}; only dense tensors can be "
            "compressed; give the checkpoint before it was quantised or made sparse"
        )
    if tensor.device.type == "meta" and tensor.numel() and tensor.untyped_storage()._checkpoint_offset is None:
        raise CheckpointError(
            f"{path}: tensor '{name}' was saved from the meta device and has no values; load the weights, and save "
            "them then"
        )
    size, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if size > max(MOST_INFLATED, MOST_TIMES * held):
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {tuple(tensor.shape)} would become {size} bytes, and {held} are stored; "
            "save it with .contiguous()"
        )
    return TensorInfo(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], size)
