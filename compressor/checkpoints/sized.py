"""Networks of other sizes within one: written beside it by a structure pass, opened as checkpoints like any other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoints.checkpoint import Checkpoint
from compressor.checkpoints.reshaped import open_reshaped, write_reshaped
from compressor.core.nested import Size
from compressor.core.sizes import own_name
from compressor.core.tensors import EncodedTensor, Part, begins

FACTS = "size.json"


@dataclass(frozen=True)
class SizedCheckpoint:
    """One of them.

    name        as users call it
    checkpoint  its network
    renamed     its tensors -> the whole's, where they are called otherwise
    facts       what the pass says of it
    """

    name: str
    checkpoint: Checkpoint
    renamed: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def parts(self, whole: Checkpoint) -> tuple[dict[str, Part], dict[str, str]]:
        """Where each of its tensors is: the beginning of one of the `whole`, or where they differ one of its own; and
        of those the names: as they are stored -> as they are called here."""
        found, own = {}, {}
        for name, info in self.checkpoint.tensors.items():
            stored = self.renamed.get(name, name)
            shape = tuple(info.shape)
            there = whole.tensors.get(stored)
            if there is not None and begins(shape, there.shape):
                theirs = whole.read(stored)[tuple(slice(size) for size in shape)]
                if torch.equal(theirs, self.checkpoint.read(name)):
                    found[name] = Part(stored, shape)
                    continue
            own[own_name(name, self.name)] = name
            found[name] = Part(own_name(name, self.name), shape)
        return found, own

    def own_tensor(self, name: str, dtype: torch.dtype) -> EncodedTensor:
        """One of its tensors as it is, floats in this `dtype`."""
        tensor = self.checkpoint.read(name)
        return EncodedTensor.dense(tensor, dtype if tensor.is_floating_point() else tensor.dtype)


def write_sizes(original: Checkpoint, sizes: tuple[Size, ...], folder: Path) -> None:
    """Each into a folder of its own, numbered in order."""
    for number, size in enumerate(sizes):
        place = folder / f"{number}"
        place.mkdir(parents=True)
        write_reshaped(original, size.module, place)
        facts = {"name": size.name, "renamed": dict(size.renamed), "facts": dict(size.facts)}
        (place / FACTS).write_text(json.dumps(facts))


def open_sizes(original: Checkpoint, folder: Path) -> list[SizedCheckpoint]:
    """What `write_sizes` wrote, in order; nothing where there is no such folder."""
    found = []
    for number in range(len(list(folder.iterdir())) if folder.is_dir() else 0):
        place = folder / f"{number}"
        said = json.loads((place / FACTS).read_text())
        found.append(SizedCheckpoint(said["name"], open_reshaped(original, place), said["renamed"], said["facts"]))
    return found
