"""Reading trained networks: one file per kind of source, one `Checkpoint` for them all.

Opening reads headers only; torch and transformers are imported when a tensor or the module is asked for.
"""

from __future__ import annotations

from os import PathLike

from compressor.checkpoints.checkpoint import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | PathLike[str], *, arch: str | None = None, trust_pickle: bool = False) -> Checkpoint:
    """The checkpoint at `path`: a directory or a file, of any supported kind.

    Args:
        arch: A folder with config.json (and tokenizer), or `module:callable` that returns the module.
        trust_pickle: Whether code inside of the file may run. Nothing of it is executed otherwise.

    Raises:
        CheckpointError: The path cannot be read, or is refused.
    """
    from compressor.checkpoints.opening import locate, open_located

    return open_located(locate(path), arch=arch, trust_pickle=trust_pickle)
