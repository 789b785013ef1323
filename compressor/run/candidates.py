"""The networks that a search for a fast one chooses among: layers as the recipe stores them, in 8 bits or as floats, or
what a sorted network has in it, of any width for each of its groups.

Genes begin with what is fastest: an integer layer, the smallest width, the fewest blocks.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from compressor.checkpoints import Checkpoint
from compressor.checkpoints.reshaped import open_reshaped, write_reshaped
from compressor.core.artifact import WEIGHTS
from compressor.core.batch import Batch, call
from compressor.core.groups import Group, Operator
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.core.work import Work
from compressor.evaluate.operators import Operator as Layer
from compressor.evaluate.operators import Table, operators, stored_as
from compressor.evaluate.original import OriginalTensors, export_original
from compressor.export.forms import form
from compressor.ops.evolution import Genes, Space
from compressor.passes.settings.sortednet import SortednetSettings
from compressor.passes.sortednet import Sortednet
from compressor.plan.plan import Plan
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Recipe
from compressor.plan.searching import SearchSpace, in_eight_bits
from compressor.run.encoding import Course, Encoded
from compressor.run.prepare import Prepared
from compressor.run.write import write_graph
from compressor.structure.stage import GraphSurgeon, looked_at

STORED, EIGHT, FLOAT = "stored", "8 bits", "float"
"""How a layer is: as the recipe says, or otherwise."""
_RANGED = 64
"""Examples that ranges of activations are taken from while networks are only tried."""


class Family(Protocol):
    """Networks that differ in their genes."""

    space: Space

    def write(self, genes: Genes, folder: Path) -> None:
        """The graph of one of them, with its weights, into an empty folder."""
        ...

    def course(self, genes: Genes, work: Work) -> Course:
        """One of them, for a run to go on with."""
        ...

    def told(self, genes: Genes) -> dict[str, Any]:
        """What was chosen, for people to read."""
        ...


class Layers:
    """Each of some layers as the recipe stores it, then in 8 bits, where it can be, and as floats, the last gene.

    Args:
        encoded: The network of which all of them are stored as the recipe says.
        eight: The one of which all that can be are in 8 bits; None where none can.
    """

    def __init__(
        self, start: Prepared, course: Course, encoded: Encoded, chosen: SearchSpace, table: Table,
        eight: Encoded | None = None,
    ) -> None:  # fmt: skip
        self.start, self.original, self.encoded, self.eight = start, course, encoded, eight
        self.names, self.wider = chosen.layers, chosen.wider
        self.table, self.batches = table, _first(encoded.batches, _RANGED)
        known = self._known
        prior = (lambda genes: sum(costs[gene] for costs, gene in zip(known, genes, strict=True))) if known else None
        self.space = Space(chosen.counts, prior=prior)

    @cached_property
    def _known(self) -> list[tuple[float, ...]]:
        """Of each layer what each choice takes; nothing where the network is no module of torch."""
        checkpoint = self.original.checkpoint
        if checkpoint.kind == "onnx" or not self.batches:
            return []
        found = operators(checkpoint.build("cpu").float(), call, _example(self.batches))
        static = self.original.recipe.export.activations == "static_int8"
        planned = {tensor.name: tensor for tensor in self.original.plan.tensors}
        costs = []
        for name in self.names:
            kernel, layer = form(planned[name].describe(), self.start.options.mode), found.get(name)
            bits = 0 if kernel is None else kernel.bits  # which are more than those that are stored, of 3 for instance
            widths = (bits, 8) if name in self.wider else (bits,)
            ways = () if layer is None else (*(stored_as(layer, static, width) for width in widths), layer)
            costs.append(tuple(self.table.seconds(way) for way in ways) or (0.0,) * (len(widths) + 1))
        return costs

    def write(self, genes: Genes, folder: Path) -> None:
        told, checkpoint = self.told(genes), self.original.checkpoint
        if all(how == FLOAT for how in told.values()):
            export_original(checkpoint, folder, self.batches)
            return
        if checkpoint.config is not None:
            (folder / "config.json").write_text(json.dumps(checkpoint.config))
        sources: dict[str, Mapping[str, EncodedTensor]] = {FLOAT: OriginalTensors(checkpoint)}
        if self.eight is not None:
            sources[EIGHT] = self.eight.tensors
        mixed = _Mixed(self.encoded.tensors, sources, self._along(told))
        write_tensors(folder / WEIGHTS, mixed, self.encoded.tensors.tied)
        tensors = EncodedTensors([folder / WEIGHTS])
        write_graph(checkpoint, tensors, folder, self.start.options, self._recipe(told), self.batches)

    def course(self, genes: Genes, work: Work) -> Course:
        recipe = self._recipe(self.told(genes))
        return dataclasses.replace(self.original, recipe=recipe, plan=planned_again(self.start, self.original, recipe))

    def told(self, genes: Genes) -> dict[str, str]:
        """Layer -> how it is stored."""
        ways = {name: (STORED, EIGHT, FLOAT) if name in self.wider else (STORED, FLOAT) for name in self.names}
        return {name: ways[name][gene] for name, gene in zip(self.names, genes, strict=True)}

    def _recipe(self, told: Mapping[str, str]) -> Recipe:
        """The recipe that stores them so; without int8 activations where no convolution is left that has them."""
        planned = {tensor.name: tensor for tensor in self.original.plan.tensors}
        floats = [name for name, how in told.items() if how == FLOAT]
        recipe = in_eight_bits(
            self.original.recipe, {name: self.wider[name] for name, how in told.items() if how == EIGHT}
        )
        for step in dict.fromkeys(planned[name].by for name in self.names):
            recipe = recipe.leaving(step, [name for name in floats if planned[name].by == step])
        left = [name for name in self.names if planned[name].role == "conv" and name not in floats]
        if recipe.export.activations == "static_int8" and not left:
            export = recipe.export.model_copy(update={"activations": "int8"})
            recipe = recipe.model_copy(update={"export": export})
        return recipe

    def _along(self, told: Mapping[str, str]) -> dict[str, str]:
        """Those tensors, and what follows each up to the next matrix: biases and norms, as a run would correct them."""
        found, how = dict[str, str](), STORED
        for tensor in self.original.plan.tensors:
            if len(tensor.shape) > 1:
                how = told.get(tensor.name, STORED)
            found[tensor.name] = how
        return found


def planned_again(start: Prepared, course: Course, recipe: Recipe) -> Plan:
    """The plan of what a course has, by another recipe; it says no more than the first did."""
    plan = make_plan(course.checkpoint, recipe, start.options.format, smaller=True)
    return dataclasses.replace(plan, notes=course.plan.notes, in_use=course.plan.in_use)


class _Mixed(Mapping[str, EncodedTensor]):
    """Tensors that are encoded, but for some that come from elsewhere."""

    def __init__(
        self, encoded: EncodedTensors, sources: Mapping[str, Mapping[str, EncodedTensor]], along: Mapping[str, str]
    ) -> None:
        self.encoded, self.sources, self.along = encoded, sources, along

    def __getitem__(self, name: str) -> EncodedTensor:
        return self.sources.get(self.along.get(name, STORED), self.encoded)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)


_SIZES = 16
"""Of one depth and width, about evenly spread where there are more, that are measured to begin with."""


class Mixtures:
    """What a sorted network has in it: a depth, and of each group of units a width, smallest first.

    Norms and biases of a group are those of the size that has its width; what is of no group is the widest one's that
    is in it. Statistics of batch norms are taken anew.
    """

    def __init__(self, start: Prepared, course: Course, batches: list[Batch], table: Table) -> None:
        self.start, self.original, self.table, self.batches = start, course, table, batches
        step = next(step for step in course.recipe.structure if isinstance(step.settings, SortednetSettings))
        assert isinstance(step.settings, SortednetSettings)
        self.settings, report = step.settings, next(each for each in reversed(course.reports) if "sizes" in each)
        self.method = Sortednet(**step.settings.model_dump())
        self.module = course.checkpoint.build("cpu").float().eval()
        surgeon = GraphSurgeon(_example(batches), call)
        self.surgeon = surgeon
        self.groups, blocks = self.method.groups_and_blocks(looked_at(self.module, batches, surgeon, step.selects))
        self.order = report["order"]
        self.blocks = blocks
        self.widths = sorted(self.settings.widths)
        self.depths = sorted(self.settings.depths)
        self.layers = operators(self.module, call, _example(batches))
        self.sizes = {each.name: each for each in course.sizes}
        counts = (len(self.depths), *(len(self.widths) for _ in self.groups))
        sizes = [
            (depth, *[width] * (len(counts) - 1)) for depth in range(counts[0]) for width in range(len(self.widths))
        ]
        self.space = Space(counts, self._inactive, self._prior, tuple(sizes[:: -(-len(sizes) // _SIZES)]))

    def write(self, genes: Genes, folder: Path) -> None:
        beside = folder.with_name(f"{folder.name}.made")
        export_original(self._made(genes, beside), folder, self.batches)
        shutil.rmtree(beside)

    def course(self, genes: Genes, work: Work) -> Course:
        checkpoint = self._made(genes, work.folder / "chosen")
        recipe = self.original.recipe
        plan = make_plan(checkpoint, recipe, self.start.options.format, smaller=True)
        return dataclasses.replace(self.original, checkpoint=checkpoint, plan=plan, sizes=())

    def told(self, genes: Genes) -> dict[str, Any]:
        idle = self._inactive(genes)
        widths = {
            group.name: self.widths[gene]
            for place, (group, gene) in enumerate(zip(self.groups, genes[1:], strict=True), 1) if place not in idle
        }  # fmt: skip
        return {"depth": self.depths[genes[0]], "widths": widths}

    def _removal(self, genes: Genes) -> dict[Group, torch.Tensor]:
        shares = [self.widths[gene] for gene in genes[1:]]
        return self.method.removal(self.module, self.groups, self.blocks, self.order, shares, self.depths[genes[0]])

    def _inactive(self, genes: Genes) -> Collection[int]:
        """Groups all of which lies in blocks that are left out."""
        return self._idle[genes[0]]

    @cached_property
    def _idle(self) -> list[frozenset[int]]:
        found = []
        for depth in self.depths:
            gone = _without(
                self.method.removal(self.module, self.groups, self.blocks, self.order, [1.0] * len(self.groups), depth)
            )
            found.append(frozenset(
                place for place, group in enumerate(self.groups, 1)
                if all(gone(member.tensor) for member in group.producers)
            ))  # fmt: skip
        return found

    def _prior(self, genes: Genes) -> float:
        """What the layers that are left take alone, by the table."""
        removal = self._removal(genes)
        gone, left = _without(removal), dict[tuple[str, int], int]()
        for group, units in removal.items():
            if not isinstance(group, Operator):
                for member in group.members:
                    left[member.tensor, member.dim] = len(units) * member.index.shape[1]
        total = 0.0
        for name, layer in self.layers.items():
            if not gone(name):
                total += self.table.seconds(_narrower(layer, left.get((name, 0), 0), left.get((name, 1), 0)))
        return total

    def _made(self, genes: Genes, folder: Path) -> Checkpoint:
        """A network, written into a folder."""
        removal = self._removal(genes)
        module, renamed = self.method.part(self.surgeon, self.module, removal)
        module = copy.deepcopy(module)  # what it has in common with the whole is its own from here on
        self._own(module, renamed, genes)
        self.method.measured(module, self.batches)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_reshaped(self.start.checkpoint, module, folder)
        return open_reshaped(self.start.checkpoint, folder)

    @torch.no_grad()
    def _own(self, module: torch.nn.Module, renamed: Mapping[str, str], genes: Genes) -> None:
        """Gives it the vectors of the sizes whose widths it has."""
        depth, idle = self.depths[genes[0]], self._inactive(genes)
        shares = {
            member.tensor: self.widths[gene]
            for place, (group, gene) in enumerate(zip(self.groups, genes[1:], strict=True), 1) if place not in idle
            for member in group.members
        }  # fmt: skip
        widest = max(shares.values(), default=1.0)
        for name, tensor in module.state_dict(keep_vars=True).items():
            width = shares.get(renamed.get(name, name), widest)
            size = self.sizes.get(self.method.names[self.method.pairs.index((width, depth))])
            if tensor.dim() > 1 or size is None or name not in size.checkpoint.tensors:
                continue
            theirs = size.checkpoint.read(name)
            if theirs.shape == tensor.shape:
                tensor.data.copy_(theirs)


def _without(removal: Mapping[Group, torch.Tensor]) -> Callable[[str], bool]:
    """Whether a tensor is in a block or branch that goes."""
    operators = [group for group in removal if isinstance(group, Operator)]
    inside = {member.tensor for operator in operators for member in operator.members}
    paths = tuple(f"{path}." for operator in operators if operator.whole for path in operator.cut)
    return lambda name: name in inside or name.startswith(paths)


def _narrower(layer: Layer, outputs: int, inputs: int) -> Layer:
    """A layer without so many of its outputs and inputs; a depthwise one loses both at once."""
    n, k, *rest = layer.weight
    if layer.is_convolution:
        groups = layer.groups - outputs if layer.groups > 1 and k == 1 else layer.groups
        rows = (groups if groups > 1 else layer.rows[0] - inputs, *layer.rows[1:])
        return dataclasses.replace(layer, weight=(n - outputs, k - inputs, *rest), rows=rows, groups=groups)
    return dataclasses.replace(layer, weight=(n - outputs, k - inputs))


def _example(batches: Sequence[Batch]) -> Batch:
    return {name: tensor[:2] for name, tensor in batches[0].items()}


def _first(batches: Sequence[Batch], n: int) -> list[Batch]:
    """Batches that come to `n` examples, of the last one no more than that takes."""
    found, left = list[Batch](), n
    for batch in batches:
        if left > 0:
            found.append({name: tensor[:left] for name, tensor in batch.items()})
            left -= len(next(iter(batch.values())))
    return found
