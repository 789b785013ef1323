"""What examples ask of a network that reads arrays: what its layers read and write on one, and how many there are.

Found where the data are tried on the network; of it a plan tells time and memory. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from compressor.plan.recipe import Recipe

EXAMPLES_AT_ONCE = 32
VALUES_AT_ONCE = 2**20
"""Numbers of a batch's largest array: a few images at a time are several times faster than many, since memory is used
again."""
HELD_AT_ONCE = 2**24
"""Numbers that a batch's largest layer reads and writes, unless one example alone has more."""
UNFOLDED_AT_ONCE = 2**22
"""Numbers of a convolution's input that are unfolded at a time."""


@dataclass(frozen=True)
class LayerWork:
    """One call of a layer on one example.

    name      of the layer, which may be called several times
    shape     of the weight
    groups    of a convolution
    read      numbers of its input
    written   numbers of its output
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    read: int
    written: int

    @property
    def positions(self) -> int:
        """How often its matrix is multiplied with."""
        return max(1, self.written // max(1, self.shape[0]))

    @property
    def products(self) -> int:
        return self.positions * math.prod(self.shape)

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Workload:
    """What one example asks for, and how many a run has.

    layers    every call of a layer, in order
    given     numbers of the example's arrays; `largest` those of the largest
    n_loaded  how many lie in memory, whether a run computes with them or not
    n_trained  how many a pass that trains has
    """

    layers: tuple[LayerWork, ...]
    given: int
    largest: int
    n_calibration: int = 0
    n_evaluation: int = 0
    n_loaded: int = 0
    n_trained: int = 0

    @property
    def held(self) -> int:
        """Numbers that the largest layer reads and writes."""
        return max((layer.read + layer.written for layer in self.layers), default=0)

    @property
    def written(self) -> int:
        """Numbers that all layers write."""
        return sum(layer.written for layer in self.layers)

    @property
    def products(self) -> int:
        return sum(layer.products for layer in self.layers)

    @property
    def n_layers(self) -> int:
        return len({layer.name for layer in self.layers})

    def seconds(self, costs: tuple[float, float]) -> float:
        """Of one forward, by what a product and what a number that is written cost."""
        return costs[0] * self.products + costs[1] * self.written

    @property
    def at_once(self) -> int:
        """How many examples make a batch."""
        by_input = VALUES_AT_ONCE // max(1, self.largest)
        return max(1, min(EXAMPLES_AT_ONCE, by_input, HELD_AT_ONCE // max(1, self.held)))

    @property
    def unfolded(self) -> int:
        """Numbers that the largest convolution's input has when it is unfolded, as many as are at once."""
        sizes = [each.positions * each.columns for each in self.layers if len(each.shape) > 2 and each.groups == 1]
        return min(self.at_once * max(sizes, default=0), UNFOLDED_AT_ONCE)


def workload_of(load: Workload, recipe: Recipe, n_calibration: int, n_evaluation: int) -> Workload:
    """With the examples that a run computes with, of those that there are."""
    found = min(recipe.calibration.samples, n_calibration), min(recipe.evaluation.samples, n_evaluation)
    return replace(load, n_calibration=found[0], n_evaluation=found[1], n_loaded=n_calibration + n_evaluation,
                   n_trained=n_calibration)  # fmt: skip
