"""Compresses trained networks to ONNX artifacts that plain onnxruntime runs.

    artifact = compressor.compress("model", "llm-2bit", output="small")
    module = compressor.load("small")

Importing this costs nothing; torch comes with the first use. Progress and warnings go to the logger "compressor" of the
standard library: after `logging.basicConfig(level="INFO")` they are shown (`compressor.core.log`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.export.loading import load
    from compressor.run.pipeline import compress

__all__ = ["compress", "load"]

_HOMES = {"compress": "compressor.run.pipeline", "load": "compressor.export.loading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
