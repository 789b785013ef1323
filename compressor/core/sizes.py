"""sizes.json: the networks of several sizes that one artifact holds, each with a graph over the same weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.core.errors import CheckpointError, UsageError, suggestion
from compressor.core.reading import read_json, refuse_links, refuse_outside
from compressor.core.report import misshapen

RECORD = "sizes.json"
GRAPH = "model.onnx"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.]*")
Count = Annotated[int, Field(ge=0, lt=2**62)]
Dimension = Annotated[int, Field(ge=0, lt=2**40)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Bytes(_Section):
    """What a size takes: its graph, what of the weights is its own, and all of its weights if they stood alone."""

    graph: Count
    own: Count
    alone: Count


class SizeEntry(_Section):
    """One size.

    facts       what the pass says of it: width, depth, blocks, parameters
    bytes       none of the largest, which has all of the file
    proof       the largest difference from its network in torch, relative to the largest value
    quality     as compression.json has it
    speed       latency_seconds of one input; of decoders tokens per second
    parts       its tensors -> the stored one that begins with it, and its shape; what is not here is as in the whole
    own         its tensors that are stored for it alone, by `own_name`
    absent      tensors of the whole that it has not
    tied        of its names, those that stand for another one's
    config      the config of its network, where that is another
    structure   what makes its module of the architecture's, as structure.json has it; null where the config says all
    """

    facts: dict[str, Any] = {}
    bytes: Bytes | None = None
    proof: float | None = None
    quality: dict[str, Any] | None = None
    speed: dict[str, Any] = {}
    parts: dict[str, tuple[str, list[Dimension]]] = {}
    own: list[str] = []
    absent: list[str] = []
    tied: dict[str, str] = {}
    config: dict[str, Any] | None = None
    structure: dict[str, Any] | None = None


class Sizes(_Section):
    """The largest one, which is the artifact's network, and all of them by name, smallest first."""

    largest: str
    sizes: dict[str, SizeEntry]

    def text(self) -> str:
        """The file's content."""
        return json.dumps(self.model_dump(exclude_defaults=True), ensure_ascii=False, separators=(",", ":")) + "\n"

    def shown(self) -> dict[str, dict[str, Any]]:
        """What compression.json says of each size."""
        kept = {"facts", "bytes", "proof", "quality", "speed"}
        return {name: entry.model_dump(include=kept, exclude_defaults=True) for name, entry in self.sizes.items()}


def own_name(tensor: str, size: str) -> str:
    """What a tensor is called in the file that only one size has."""
    return f"{tensor}@{size}"


def graph_name(size: str, largest: bool = False) -> str:
    """The file of a size's graph."""
    return GRAPH if largest else f"model-{size}.onnx"


def read_sizes(directory: Path) -> Sizes | None:
    """What an artifact's folder says of its sizes; None where it has one only.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = directory / RECORD
    if not path.is_file():
        return None
    refuse_outside(path, directory)
    try:
        found = Sizes.model_validate_json(json.dumps(read_json(path, measured=True)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise CheckpointError(f"{path}: is damaged; {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    names = [name for name in found.sizes if not NAME.fullmatch(name)]
    if names or found.largest not in found.sizes:
        raise CheckpointError(f"{path}: is damaged; {names[0]!r} is no size" if names else
                              f"{path}: is damaged; it has no {found.largest!r}")  # fmt: skip
    for name, entry in found.sizes.items():
        wrong = "" if entry.quality is None else misshapen({"quality": entry.quality})
        if wrong:
            raise CheckpointError(f"{path}: is damaged; sizes.{name}.{wrong}")
    return found


def chosen_size(directory: Path, size: str) -> tuple[Sizes, SizeEntry]:
    """All sizes of an artifact, and one of them.

    Raises:
        UsageError: It has not that one, or one only.
        CheckpointError: What it says of them is damaged.
    """
    found = read_sizes(directory)
    if found is None:
        raise UsageError(f"{directory}: holds one size only, it has no {RECORD}; leave --size out")
    if size not in found.sizes:
        raise UsageError(f"{directory}: has no size '{size}'. {suggestion(size, list(found.sizes))}")
    return found, found.sizes[size]


def graph_file(directory: Path, size: str | None) -> str:
    """The file of the graph of a size; of the largest where none is asked for.

    Raises:
        UsageError: The artifact has not that one.
        CheckpointError: Its graph is a link that leads out of the folder.
    """
    if size is None:
        return GRAPH
    name = graph_name(size, size == chosen_size(directory, size)[0].largest)
    refuse_links(directory, [name])
    return name


def graph_of(directory: Path, size: str | None) -> Path:
    """The graph of a size, or the folder itself where none is asked for, or the largest.

    Raises:
        UsageError: The artifact has not that one.
    """
    file = graph_file(directory, size)
    return directory if file == GRAPH else directory / file
