"""How a checkpoint is opened once more, in another process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.checkpoint import Checkpoint
from compressor.checkpoints.reshaped import open_reshaped


@dataclass(frozen=True)
class Opening:
    """Which checkpoint, as the user named it.

    path      of the model
    arch, trust_pickle    as in `open_checkpoint`
    written   where a structure pass has written the network that it made of it; None where none has
    """

    path: Path
    arch: str | None = None
    trust_pickle: bool = False
    written: Path | None = None

    def open(self) -> Checkpoint:
        """The checkpoint."""
        found = open_checkpoint(self.path, arch=self.arch, trust_pickle=self.trust_pickle)
        return found if self.written is None else open_reshaped(found, self.written)
