"""From a path to a checkpoint: which files hold the weights, where the config and the tokenizer are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from compressor.checkpoints.architecture import resolve
from compressor.checkpoints.archive import is_archive
from compressor.checkpoints.checkpoint import Checkpoint
from compressor.checkpoints.hub import local
from compressor.checkpoints.positions import positions_of
from compressor.checkpoints.reach import without_code
from compressor.checkpoints.source import Source, digest_of
from compressor.checkpoints.tokenizer import find_tokenizer
from compressor.core.errors import CheckpointError
from compressor.core.model_names import SUFFIXES
from compressor.core.reading import read_json, refuse_outside
from compressor.core.references import code_of
from compressor.core.snapshot import Snapshot

INDEXED = ("model.safetensors", "pytorch_model.bin")
# Files of the Trainer and of adapters that lie beside weights and are none.
NO_WEIGHTS = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
)


@dataclass(frozen=True)
class Location:
    """What was found at a path; `config` is the config.json beside the weights, if there is one."""

    path: Path
    files: list[Path]
    config: Path | None


def locate(path: str | PathLike[str]) -> Location:
    """The weight files of a path, which is a file or a directory, or of a model by its name on a hub."""
    path = local(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: does not exist; give a Hugging Face directory, a file ending in {', '.join(SUFFIXES)}, or a "
            "model's name on the hub, as org/name"
        )
    if not path.is_dir() and not path.is_file():
        raise CheckpointError(f"{path}: is no regular file; give a Hugging Face directory or a file of weights")
    directory = path if path.is_dir() else path.parent
    config = directory / "config.json"
    files = weight_files(path) if path.is_dir() else [path]
    if path.name.endswith(".index.json"):
        files = indexed_files(path)
    unknown = [file for file in files if file.suffix not in SUFFIXES]
    if unknown:
        raise CheckpointError(
            f"{unknown[0]}: files ending in '{unknown[0].suffix}' are not supported; supported are "
            f"{', '.join(SUFFIXES)} and Hugging Face directories"
        )
    for file in files:
        if file != path:  # which the user has named
            refuse_outside(file, directory)
    return Location(path, files, refuse_outside(config, directory) if config.exists() else None)


def weight_files(directory: Path) -> list[Path]:
    """The weights in a directory: the usual names first, else the only file of a known kind."""
    for name in INDEXED:
        if (directory / name).is_file():
            return [directory / name]
        if (directory / f"{name}.index.json").is_file():
            return indexed_files(directory / f"{name}.index.json")
    found = [path for path in sorted(directory.iterdir()) if path.suffix in SUFFIXES and path.name not in NO_WEIGHTS]
    found = [path for path in found if path.suffix != ".onnx"] or found  # an export beside what it was made from
    if len(found) == 1:
        return found
    if not found:
        raise CheckpointError(
            f"{directory}: holds no weights; found {_listing(directory)}; expected {' or '.join(INDEXED)}, "
            f"their .index.json with shards, or one file ending in {', '.join(SUFFIXES)}"
        )
    names = ", ".join(path.name for path in found[:6])
    raise CheckpointError(f"{directory}: holds {len(found)} weight files, {names}; name the one to compress")


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, all of which must be there."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index}: has no 'weight_map'; fetch the index again")
    names = sorted({str(name) for name in mapping.values()})
    outside = [name for name in names if Path(name).name != name or not _can_be_named(index.parent / name)]
    if outside:
        raise CheckpointError(f"{index}: names '{outside[0]}', which is not a file beside it; fetch it again")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:4])}; fetch them"
        )
    return [index.parent / name for name in names]


def _can_be_named(path: Path) -> bool:
    """Whether the system takes the path for a name, of whatever there is or is not."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):  # too long, or of letters that it cannot write
        return False
    return True


def model_digests(path: str | PathLike[str], arch: str | None = None) -> dict[str, str]:
    """SHA-256 of all that a model consists of: "weights", config.json and the tokenizer's files.

    Raises:
        CheckpointError: It is not there, or is none.
        OSError: A file cannot be read.
    """
    found = locate(path)
    config, beside = _companions(found, arch)
    files = found.files
    if files[0].suffix == ".onnx":  # which alone knows what other files its weights lie in
        files = open_source(files, None, False).files
    others = {*([config] if config else []), *(find_tokenizer(beside) if beside else [])}
    return {"weights": digest_of(files)} | {each.name: digest_of([each]) for each in sorted(others)}


def _companions(found: Location, arch: str | None) -> tuple[Path | None, Path | None]:
    """The config.json that goes with weights, and the folder of their tokenizer; None where there is none."""
    folder, reference = parse_arch(arch)
    suffix = found.files[0].suffix
    if suffix == ".onnx":
        beside = folder or found.files[0].parent
        config = refuse_outside(beside / "config.json", beside) if (beside / "config.json").exists() else None
        return config, beside
    config = refuse_outside(folder / "config.json", folder) if folder else (None if reference else found.config)
    return config, folder or (found.config.parent if found.config and suffix != ".gguf" else None)


def open_located(found: Location, *, arch: str | None, trust_pickle: bool) -> Checkpoint:
    """Open the weights, and put config, tokenizer and architecture with them."""
    seen = Snapshot.of([*found.files, *([found.config] if found.config else [])])
    folder, reference = parse_arch(arch)
    config_file, beside = _companions(found, arch)
    seen = seen | Snapshot.of([config_file] if config_file else [])
    if found.files[0].suffix == ".onnx":
        return _open_onnx(found, folder or found.files[0].parent, config_file, reference, seen)
    config = read_config(config_file) if config_file else None
    gguf = found.files[0].suffix == ".gguf"
    if gguf and folder is None:
        config = None  # the file's own metadata describe it
    source = open_source(found.files, config, trust_pickle)
    if gguf and reference is None:
        config = source.config  # type: ignore[attr-defined]
    if source.module is not None and folder is None:
        config = None
    _refuse_scripted(found, source, arch, config)
    architecture = resolve(found.path, source, config, reference)
    tokenizer_files = find_tokenizer(beside) if beside else []
    seen = seen | Snapshot.of(tokenizer_files) | Snapshot.of(code_of(reference) if reference else [])
    return Checkpoint(found.path, source, architecture, config=config, tokenizer_files=tokenizer_files, seen=seen)


def _open_onnx(found: Location, beside: Path, config: Path | None, reference: str | None, seen: Snapshot) -> Checkpoint:
    """A graph is its own architecture; a folder gives the tokenizer of a language model."""
    from compressor.onnx.file import OnnxSource
    from compressor.onnx.kind import onnx_architecture

    if reference is not None:
        raise CheckpointError(
            f"--arch {reference}: {found.path} is an ONNX graph, which is a network by itself; leave --arch out, or "
            "give a folder with its tokenizer"
        )
    source = open_source(found.files, None, False)
    assert isinstance(source, OnnxSource)
    tokenizer_files = find_tokenizer(beside)
    architecture = onnx_architecture(source, bool(tokenizer_files))
    settings: dict[str, Any] = {}
    if architecture.family in ("decoder", "encoder") and config is not None:
        settings = read_json(config)
        if architecture.family == "decoder":
            tokenizer_files.append(config)  # onnxruntime's sessions read it beside the artifact
    seen = seen | Snapshot.of([*source.files[1:], *tokenizer_files])
    checkpoint = Checkpoint(found.path, source, architecture, tokenizer_files=tokenizer_files, seen=seen)
    checkpoint.positions = positions_of(settings)
    return checkpoint


def open_source(files: list[Path], config: dict[str, Any] | None, trust_pickle: bool) -> Source:
    """The reader for a kind of file; each is imported on its first use."""
    suffix = files[0].suffix
    if suffix == ".safetensors":
        from compressor.checkpoints.safetensors_file import SafetensorsSource

        return SafetensorsSource.open(files)
    if suffix == ".gguf":
        from compressor.checkpoints.gguf_file import GgufSource

        return GgufSource.open(files[0], config)
    if suffix == ".onnx":
        from compressor.onnx.file import OnnxSource

        return OnnxSource.open(files[0])
    if suffix == ".pt2":
        from compressor.checkpoints.exported import open_exported

        return open_exported(files[0], trust_pickle=trust_pickle)
    from compressor.checkpoints.state_dict import StateDictSource

    return StateDictSource.open(files, trust_pickle=trust_pickle)


def parse_arch(arch: str | None) -> tuple[Path | None, str | None]:
    """`--arch` as (folder with a config, None) or (None, "module:callable")."""
    if arch is None:
        return None, None
    folder = Path(arch)
    if folder.name == "config.json" and folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"--arch {arch}: the folder has no config.json; found {_listing(folder)}")
        return folder, None
    module, colon, attribute = arch.partition(":")
    if not (module and colon and attribute):
        raise CheckpointError(
            f"--arch {arch}: is neither a folder nor module:callable; write for example --arch mynet:build"
        )
    return None, arch


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, without the record of an earlier quantisation and without what names code."""
    config = without_code(read_json(path))
    config.pop("quantization_config", None)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: has no 'model_type'; give the config.json of a transformers model")
    return config


def _refuse_scripted(found: Location, source: Source, arch: str | None, config: dict[str, Any] | None) -> None:
    if source.kind != "state_dict" or arch is not None or config is not None:
        return
    from compressor.checkpoints.state_dict import is_torchscript

    if is_archive(found.files[0]) and is_torchscript(found.files[0]):
        raise CheckpointError(
            f"{found.files[0]}: is a TorchScript archive, which is never run; only its weights can be used; "
            "give --arch module:callable for the network"
        )


def _listing(directory: Path) -> str:
    names: Iterator[str] = (path.name for path in sorted(directory.iterdir()))
    first = [name for name, _ in zip(names, range(6), strict=False)]
    return ", ".join(first) or "nothing"
