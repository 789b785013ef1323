"""A run's working folder: what is finished lies in it, and what is drawn can be drawn again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.core.files import short_name


@dataclass
class Work:
    """The folder, the seed of all that is random, and what the learning of each block came to."""

    folder: Path
    seed: int
    log: list[dict[str, Any]] = field(default_factory=list)

    def file(self, block: str) -> Path:
        """Where the encoded tensors of a block go; of the network's own where there is no block."""
        return self.folder / f"{short_name(block or 'network')}.safetensors"

    def generator(self, name: str) -> torch.Generator:
        """A generator of its own for each tensor, so that the order of work does not matter."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
