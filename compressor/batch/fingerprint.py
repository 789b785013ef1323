"""What a job of a batch depends on, as one digest: content of the model and the data, recipe, settings, versions."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

from compressor.batch.manifest import Job
from compressor.checkpoints.opening import locate, open_source, parse_arch
from compressor.checkpoints.tokenizer import find_tokenizer
from compressor.core.artifact import file_digest
from compressor.plan.recipe_file import load_recipe

VERSIONS = ("compressor", "torch", "onnxruntime", "transformers", "numpy")


def fingerprint(job: Job) -> str:
    """SHA-256 over everything that the artifact's bytes come from.

    Raises:
        CheckpointError: The model is not there, or is none.
        OSError: A file of the model or the data cannot be read.
    """
    found = locate(job.model)
    arch = job.options[job.options.index("--arch") + 1] if "--arch" in job.options else None
    beside = parse_arch(arch)[0] or (found.path if found.path.is_dir() else found.path.parent)
    files = found.files
    if files[0].suffix == ".onnx":  # which alone knows what other files its weights lie in
        files = open_source(files, None, False).files
    model = [*files, *([found.config] if found.config else []), *find_tokenizer(beside)]
    content = {
        "model": {path.name: file_digest(path) for path in model},
        "data": {path.name: file_digest(path) for each in job.inputs for path in _files(Path(each))},
        "recipe": load_recipe(job.recipe, job.sets()).to_dict(),
        "options": list(job.options),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return [each for each in sorted(path.rglob("*")) if each.is_file()] if path.is_dir() else [path]
