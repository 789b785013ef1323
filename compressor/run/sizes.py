"""The networks of other sizes in one artifact: a graph each over the same weights, proved, judged and timed beside the
largest; and sizes.json, which says what there is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoints import Checkpoint
from compressor.checkpoints.sized import SizedCheckpoint
from compressor.core.artifact import WEIGHTS
from compressor.core.batch import Batch
from compressor.core.errors import CheckpointError
from compressor.core.files import write_text
from compressor.core.options import RunOptions
from compressor.core.progress import Progress
from compressor.core.report import Quality, Report
from compressor.core.sizes import RECORD, Bytes, SizeEntry, Sizes, graph_name
from compressor.core.tensors import EncodedTensor, EncodedTensors, Part, SizeTensors
from compressor.data.samples import Samples
from compressor.evaluate.bench import alternated, bench
from compressor.evaluate.judge import judge, prove
from compressor.plan.recipe import Recipe
from compressor.run.write import write_graph

_DETAILS = {"outputs", "worst"}


@dataclass
class ManySizes:
    """The sizes of a run.

    sized    the smaller networks, smallest first
    parts    of each, where its tensors are
    own      what they have for themselves, as it is stored
    largest  what the largest is called, its facts and its config
    """

    sized: Sequence[SizedCheckpoint]
    largest: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    own: dict[str, EncodedTensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, whole: Checkpoint, sized: Sequence[SizedCheckpoint], recipe: Recipe, reports: Sequence[Mapping[str, Any]]
    ) -> ManySizes:  # fmt: skip
        """All that is known of the sizes before anything is written."""
        if not sized:
            return cls(())
        facts = next(report["sizes"] for report in reversed(reports) if "sizes" in report)
        largest = next(each for each in facts if each["width"] == each["depth"] == 1)
        found = cls(sized, largest["size"], {key: value for key, value in largest.items() if key != "size"},
                    whole.config)  # fmt: skip
        dtype = torch.float16 if recipe.export.dense == "float16" else torch.float32
        for each in sized:
            found.parts[each.name], own = each.parts(whole)
            found.own |= {stored: each.own_tensor(name, dtype) for stored, name in own.items()}
        return found

    def refuse_indivisible(self, tensors: EncodedTensors) -> None:
        """Refuses what is encoded so that a size cannot share it.

        Raises:
            CheckpointError: A cut goes through what is stored together.
        """
        for name, parts in self.parts.items():
            for part in parts.values():
                if part.stored in tensors and list(part.shape) != tensors.describe(part.stored)["tensor_shape"]:
                    try:
                        tensors[part.stored].beginning(part.shape)
                    except CheckpointError as error:
                        raise CheckpointError(f"size {name}, '{part.stored}': {error}") from error

    def tensors(self, size: SizedCheckpoint, folder: Path) -> SizeTensors:
        """Those of one size, in the file that was written."""
        return SizeTensors(folder / WEIGHTS, self.parts[size.name], size.checkpoint.tied)

    def write(
        self, original: Checkpoint, whole: EncodedTensors, folder: Path, options: RunOptions, recipe: Recipe,
        samples: Samples, batches: list[Batch], report: Report, progress: Progress,
    ) -> dict[str, dict[str, Any] | None]:  # fmt: skip
        """Writes, proves, judges and times every size's graph; then sizes.json, and what the report says of them.

        Returns:
            The quality of each but the largest, with all that is known of its outputs.
        """
        entries: dict[str, SizeEntry] = {}
        judged: dict[str, dict[str, Any] | None] = {}
        for each in self.sized:
            with progress.task(f"size {each.name}", 3) as task:
                tensors, file = self.tensors(each, folder), graph_name(each.name)
                write_graph(each.checkpoint, tensors, folder, options, recipe, batches, file)
                task.advance(note="proving")
                proof = prove(each.checkpoint, tensors, folder, options, batches, file)
                task.advance(note="judging")
                quality = judge(original, samples, recipe, folder, options.format, Progress(), file)
                task.advance()
            entry = self._entry(each, tensors, whole, folder / file)
            entry.proof = None if proof is None else proof["exact"]["max_relative_error"]
            entry.quality, judged[each.name] = _quality(quality), quality
            entries[each.name] = entry
        largest = SizeEntry(facts=dict(self.facts))
        largest.quality = None if report.quality is None else _quality(report.quality.model_dump(exclude_unset=True))
        largest.proof = report.proof.exact.max_relative_error if report.proof and report.proof.exact else None
        found = Sizes(largest=self.largest, sizes=entries | {self.largest: largest})
        if recipe.evaluation.speed:
            graphs = {name: folder / graph_name(name, name == self.largest) for name in found.sizes}
            for name, speed in _speeds(graphs, report).items():
                found.sizes[name].speed = speed
        write_text(folder / RECORD, found.text())
        report.sizes = found.shown()
        return judged

    def _entry(self, size: SizedCheckpoint, tensors: SizeTensors, whole: EncodedTensors, graph: Path) -> SizeEntry:
        parts, checkpoint = self.parts[size.name], size.checkpoint
        other = {
            name: (part.stored, list(part.shape))
            for name, part in parts.items()
            if part.stored not in self.own
            and (name not in whole or part != Part(name, tuple(whole.describe(name)["tensor_shape"])))
        }
        record = None if checkpoint.reshaping is None else json.loads(checkpoint.reshaping.text())
        own = [name for name, part in parts.items() if part.stored in self.own]
        return SizeEntry(
            facts=dict(size.facts), parts=other, own=own, tied=dict(checkpoint.tied), structure=record,
            config=None if checkpoint.config == self.config else checkpoint.config,
            absent=sorted(name for name in whole if name not in parts),
            bytes=Bytes(
                graph=graph.stat().st_size, own=sum(self.own[parts[name].stored].encoding.nbytes for name in own),
                alone=sum(tensors.nbytes(name) for name in parts),
            ),
        )  # fmt: skip


def _quality(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Without what is said of each output."""
    return None if found is None else Quality.model_validate(found).model_dump(exclude_unset=True, exclude=_DETAILS)


def _measured(graphs: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, graph in graphs.items():
        yield name, bench(graph)


def _speeds(graphs: Mapping[str, Path], report: Report) -> dict[str, dict[str, Any]]:
    """By size: of decoders tokens per second, each in a process of its own; of others the latency, in turn."""
    shapes = (report.speed.input_shapes if report.speed is not None else None) or {}
    try:
        if report.speed is not None and report.speed.decode_tokens_per_second is not None:
            keys = ("decode_tokens_per_second", "prefill_tokens_per_second")
            return {name: {key: found[key] for key in keys} for name, found in _measured(graphs)}
        found = alternated(list(graphs.values()), shapes=shapes)
    except CheckpointError:
        return {}
    return dict(zip(graphs, found, strict=True))
