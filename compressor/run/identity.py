"""The identity of a run, from its options: for --resume, for batches, and for compression.json."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from compressor.checkpoints.opening import model_digests, parse_arch
from compressor.core.artifact import file_digest
from compressor.core.device import HOST, product_of
from compressor.core.identity import Identity, Targets
from compressor.core.options import RunOptions
from compressor.plan.recipe import Recipe

VERSIONS = ("compressor", "torch", "onnxruntime", "transformers", "numpy")
"""What computes, by its name on the package index."""


def identity_of(
    options: RunOptions, recipe: Recipe, data: Mapping[str, str | None], threads: int, device: str = HOST
) -> Identity:
    """Which run the options ask for. Reads every byte of the model.

    Args:
        recipe: As it was loaded, before targets change it.
        data: SHA-256 of the calibration and of the evaluation data.
        threads: That torch computes with.
        device: Where blocks lie while they are computed with.

    Raises:
        CheckpointError: The model is not there, or is none.
    """
    read = [getattr(step.settings, name) for step in recipe.passes for name in step.settings.reads]
    files = [path for name in read if name and (path := Path(name)).is_file()]
    return Identity(
        model=model_digests(options.model, options.arch),
        arch=parse_arch(options.arch)[1],
        recipe=recipe.to_dict(),
        seed=options.seed,
        data={**data, **{f"file {path.name}": file_digest(path) for path in files}},
        mode=options.mode,
        format=options.format,
        targets=Targets(
            size=options.target_size,
            flops=options.target_flops,
            loss=options.max_loss,
            latency=options.target_latency,
            speedup=options.target_speedup,
            threads=options.threads,
            batch=options.batch,
        ),
        threads=threads,
        device=product_of(device),
        versions={name: metadata.version(name) for name in VERSIONS},
    )
