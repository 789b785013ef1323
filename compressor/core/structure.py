"""What a structure pass is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from compressor.core.batch import Batch, call
from compressor.core.channels import ChannelGraph
from compressor.core.encoding import Layout
from compressor.core.groups import Branches, Group, Operator
from compressor.core.memory import LEARNING_SLACK, Slack
from compressor.core.nested import Size

if TYPE_CHECKING:
    from compressor.core.follower import Trainer
    from compressor.core.passes import StructureSettings
    from compressor.core.students import Students
    from compressor.core.training import Training

Removal = Mapping[Group, Tensor]
"""Which units of each group go: LongTensors of their numbers."""


class Surgeon(Protocol):
    """Finds and removes units of a network; `compressor.structure.stage` has it from the graph."""

    def groups(self, module: nn.Module) -> list[Group]:
        """The dependency groups of `module`."""
        ...

    def branches(self, module: nn.Module) -> Branches:
        """The whole branches of `module` that can be erased."""
        ...

    def mask(self, module: nn.Module, group: Group, units: Tensor) -> None:
        """Makes `units` (LongTensor) of a `group` of `module` zero, in place."""
        ...

    def parameters(self, module: nn.Module, removal: Removal) -> int:
        """How many parameters `module` has without the units of `removal`."""
        ...

    def shapes(self, module: nn.Module, removal: Removal) -> dict[str, tuple[int, ...]]:
        """The shapes that the parameters and buffers of `module` have without the units of `removal`, by its names."""
        ...

    def multiplications(self, module: nn.Module, removal: Removal) -> int:
        """How many multiplications by matrices one example takes in `module` without the units of `removal`."""
        ...

    def compensate(
        self, smaller: nn.Module, original: nn.Module, removal: Removal, batches: list[Batch]
    ) -> list[str]:  # fmt: skip
        """Adds to biases of the `smaller` network what the units of `removal` add on average in the `original`, on
        `batches`; names of biases that are new."""
        ...

    def remove(self, module: nn.Module, removal: Removal) -> nn.Module:
        """`module` without the units of `removal`, checked to compute what it does with them masked."""
        ...

    def sort(self, module: nn.Module, group: Group, order: Tensor) -> None:
        """Puts the units of a `group` of `module` in another `order`, in place: it computes what it did."""
        ...

    def channels(self, module: nn.Module) -> ChannelGraph:
        """The graph of the channels of `module`; refused by name where it has none."""
        ...

    def blocks(self, module: nn.Module) -> list[Operator]:
        """The repeated blocks of `module` that can go altogether, in order; none where it has no list of them."""
        ...

    def skipping(self, module: nn.Module, gone: Sequence[Operator]) -> AbstractContextManager[None]:
        """Meanwhile `module` computes without the blocks or branches that are `gone`."""
        ...


class MakesTrainer(Protocol):
    """Makes what trains the module, or `other`, as settings say; it learns from `teacher`, or the original.

    It is a `share` of the pass's whole work; a pass that trains twice gives each a `name`.
    """

    def __call__(
        self, settings: Training, teacher: nn.Module | None = None, other: nn.Module | None = None, *,
        name: str = "", share: float = 1.0,
    ) -> Trainer: ...  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A linear or a convolution that a recipe's step is for.

    name     of its weight, whose matrix `layout` tells
    module   the layer itself
    reason   why it should stay as it is; empty where it need not
    """

    name: str
    module: nn.Module
    layout: Layout
    reason: str = ""


@dataclass
class Subject:
    """A network to make smaller.

    module      float32, in eval mode; the pass owns it
    batches     calibration data, as arguments of its forward
    labels      (n,) per batch, or (n, tokens); None where there are none, and the network's own classes serve
    surgeon     finds, masks and removes units
    generator   of all that is random
    selects     whether the recipe's step is for a tensor of that name
    advance     reports progress: a share of the pass's whole work, and a note
    trainer     of the module, or of a network made from it, which the original then teaches
    layers      that the recipe's step is for, in execution order; of a pass whose encoding is trained
    students    of the module, as the settings of a pass that searches say
    slack       what forwards have left free, which goes back
    """

    module: nn.Module
    batches: list[Batch]
    labels: list[Tensor] | None
    surgeon: Surgeon
    generator: torch.Generator
    selects: Callable[[str], bool]
    advance: Callable[[float, str], None]
    trainer: MakesTrainer
    layers: Callable[[], list[Layer]] = list
    students: Callable[[StructureSettings], Students] | None = None
    slack: Slack = field(default_factory=lambda: Slack(LEARNING_SLACK))

    def call(self, batch: Batch) -> Any:
        """The forward of a `batch`; {"": tensor} is one argument by position."""
        self.slack.give_back()  # of the last one
        return call(self.module, batch)

    def amount(self, removal: Removal, of: str) -> int:
        """How much goes with the units of `removal`; counted `of` "parameters", "flops" or "units"."""
        if of == "units":
            return sum(len(units) for units in removal.values())
        count = self.surgeon.multiplications if of == "flops" else self.surgeon.parameters
        return count(self.module, {}) - count(self.module, removal)

    def whole(self, of: str) -> int:
        """All that `amount` counts `of`: "parameters" or "flops"."""
        return (self.surgeon.multiplications if of == "flops" else self.surgeon.parameters)(self.module, {})

    def erasable(self) -> Branches:
        """The branches that can be erased and whose weights the recipe's step is for."""
        found = self.surgeon.branches(self.module)
        chosen = [
            operator for operator in found.operators if all(self.selects(member.tensor) for member in operator.members)
        ]
        return Branches(tuple(chosen), found.feeds, found.sums)

    def choosable(self) -> list[Group]:
        """The groups that can lose units and whose producers the recipe's step is for."""
        return [
            group
            for group in self.surgeon.groups(self.module)
            if not group.reason and all(self.selects(member.tensor) for member in group.producers)
        ]


@dataclass(frozen=True)
class Outcome:
    """The smaller network, `module`, what the `report` says of how it came about, and networks within it of other
    `sizes`."""

    module: nn.Module
    report: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[Size, ...] = ()
