"""What a job of a batch depends on, as one digest: the identity of its run, found without reading what data hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

from compressor.batch.manifest import Job
from compressor.core.artifact import file_digest
from compressor.core.options import RunOptions
from compressor.core.quantities import parse_share, parse_size
from compressor.plan.recipe_file import load_recipe
from compressor.run.identity import identity_of
from compressor.runtime.workers import environment


def fingerprint(job: Job) -> str:
    """SHA-256 over everything that the artifact's bytes come from; of data over their files.

    Raises:
        CheckpointError: The model is not there, or is none.
        OSError: A file of the model or the data cannot be read.
    """
    options = options_of(job)
    data = {"calibration": _content(options.data), "evaluation": _content(options.eval)}
    threads = int(environment()["OMP_NUM_THREADS"].split(",")[0])
    return identity_of(options, load_recipe(options.recipe, options.sets), data, threads).digest()


def options_of(job: Job) -> RunOptions:
    """What its command asks for."""
    words = dict(zip(job.options, job.options[1:], strict=False))  # what follows a word; of --set the last
    size, flops, loss = (words.get(f"--{name}") for name in ("target-size", "target-flops", "max-loss"))
    return RunOptions(
        model=job.model,
        recipe=job.recipe,
        data=words.get("--data"),
        eval=words.get("--eval"),
        arch=words.get("--arch"),
        format="safetensors" if words.get("--format") == "safetensors" else "onnx",
        sets=tuple(job.sets()),
        mode="standard" if "--standard" in job.options else "compat" if "--compat" in job.options else "default",
        seed=int(words.get("--seed", 0)),
        target_size=None if size is None else parse_size(size, "--target-size"),
        target_flops=None if flops is None else parse_share(flops, "--target-flops"),
        max_loss=None if loss is None else parse_share(loss, "--max-loss"),
    )


def _content(argument: str | None) -> str | None:
    """A digest of the files of a path, in order, with their names; of what is no path its name."""
    if argument is None or not Path(argument).exists():
        return argument
    path = Path(argument)
    files = [each for each in sorted(path.rglob("*")) if each.is_file()] if path.is_dir() else [path]
    found = hashlib.sha256()
    for each in files:
        found.update(f"{each.relative_to(path)}\0{file_digest(each)}\0".encode())
    return found.hexdigest()
