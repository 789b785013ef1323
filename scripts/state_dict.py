"""Writes the weights of a Hugging Face directory as a bare state dict, model.pt, with config and tokenizer beside it.

python scripts/state_dict.py SOURCE TARGET
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main(source: Path, target: Path) -> None:
    """One state dict of all shards; the other files are copied."""
    target.mkdir(parents=True, exist_ok=True)
    state = {}
    for shard in sorted(source.glob("*.safetensors")):
        state |= load_file(shard)
    torch.save(state, target / "model.pt")
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name:
            shutil.copy2(file, target / file.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
