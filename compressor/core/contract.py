"""What the passes promise that do the work, and what they are given.

Each is a subclass of its own settings and of one of these, in `compressor/passes/<name>.py`. Whatever a pass draws, it
draws from the generator that it is given; it changes none of its arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.core.encoding import Encoding
from compressor.core.errors import PassError
from compressor.core.nested import Foretold
from compressor.core.passes import PruningSettings, Rates, StructureSettings, WeightSettings
from compressor.core.structure import Outcome, Subject


@dataclass(frozen=True)
class Statistics:
    """What a pass may know of a matrix (out, in) beside its weights; None: not known.

    hessian       (in, in): the second moment of the layer's inputs, the mean over tokens of t·xxᵀ, t the importance of
                  a token, or 1
    gradient      (out, in): Σ|g| or √Σg² over sequences, by a pruning pass's `gradient_norm`
    n_sequences   that were seen
    window        tokens (or positions) of each
    sparsity      the share to drop of this very matrix, where shares are allocated; None: the pass's own
    kept          (out, in) bool: where it is False a pass before has dropped the weight, which is 0 and stays so;
                  None: nothing was dropped
    """

    hessian: Tensor | None = None
    gradient: Tensor | None = None
    n_sequences: int = 1
    window: int = 1
    sparsity: float | None = None
    kept: Tensor | None = None

    def moment(self, columns: int) -> Tensor:
        """The hessian (columns, columns); where it is not known every input counts alike."""
        return torch.eye(columns) if self.hessian is None else self.hessian

    def after(self, kept: Tensor) -> Statistics:
        """Of the same matrix once weights were dropped: where `kept` (out, in) is False."""
        return replace(self, kept=kept)


class Pruned(NamedTuple):
    """A `matrix` (out, in) that is 0 where weights were dropped, and where they were `kept`: bool (out, in)."""

    matrix: Tensor
    kept: Tensor


class Learnable(nn.Module, ABC):
    """A matrix that gradient steps improve, on the output of a block or of the network, and its encoding afterwards."""

    @abstractmethod
    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (rows, columns) in `dtype`, differentiable."""

    @abstractmethod
    def result(self) -> Encoding:
        """What has been learned, as it is stored."""

    @abstractmethod
    def parameter_groups(self, rates: Rates) -> list[dict]:
        """For an optimiser: parameters with their learning rates, which `rates` has."""

    def penalty(self, step: int, steps: int) -> Tensor | float:
        """What is added to the loss at a `step` of so many `steps`: one number."""
        return 0.0

    def move(self) -> None:
        """After a step: codes that go elsewhere, bounds that are kept."""

    @property
    def n_codes(self) -> int:
        """Codes that could move."""
        return 0

    @property
    def flipped(self) -> int:
        """Moves of codes so far."""
        return 0


class WeightPass(WeightSettings):
    """Says how the weights of a matrix are stored."""

    @abstractmethod
    def encode(self, matrix: Tensor, known: Statistics, generator: torch.Generator) -> Encoding:
        """The encoding of a matrix, as `spec_for` describes it.

        Args:
            matrix: The weights (out, in), float32.
            known: What is known of them: the inputs' second moment if `needs` has "data", what a pass before dropped.
            generator: Of all that is random.
        """

    def learnable(self, matrix: Tensor, known: Statistics) -> Learnable | None:
        """The matrix (out, in) at its start, where steps on the block's output choose more than scales and codewords,
        which any encoding leaves to learn; None where they do not. `known` is as for `encode`."""
        return None

    def optimiser(self, groups: list[dict]) -> torch.optim.Optimizer:
        """Of the steps on a block's output, over `groups` of parameters with their rates."""
        return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)


class TrainedPass(WeightPass):
    """Trains the network so that what `encode` stores is exactly its weights."""

    @abstractmethod
    def fit(self, subject: Subject) -> Outcome:
        """The network of `subject`, trained."""


class PruningPass(PruningSettings):
    """Says which weights of a matrix stay."""

    @abstractmethod
    def prune(self, matrix: Tensor, known: Statistics) -> Pruned:
        """The matrix (out, in) with weights dropped, and which stay; by what is `known` of it, as its gradient."""

    def outliers(self, matrix: Tensor, gradient: Tensor) -> float:
        """What `allocate` is told of a matrix (out, in) and its gradient (out, in).

        Raises:
            PassError: The pass allocates, and does not say.
        """
        raise PassError(f"{self.name} allocates, and does not say by what of a matrix; write its outliers()")

    def allocate(self, outliers: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
        """The `sparsity` of each matrix for its Statistics.

        Args:
            outliers: By the name of a matrix, what `outliers` says of it.
            shapes: (rows, columns) of each.

        Raises:
            PassError: The pass allocates, and does not say how.
        """
        raise PassError(f"{self.name} allocates, and does not say how; write its allocate()")


class StructurePass(StructureSettings):
    """Makes the network smaller."""

    @abstractmethod
    def restructure(self, subject: Subject) -> Outcome:
        """The network of `subject`, made smaller, and what the report says of that."""

    def examine(self, subject: Subject) -> tuple[str, ...]:
        """What the plan says of the network of `subject`, of whose weights no value is known.

        Raises:
            CompressorError: `restructure` would refuse the network.
        """
        return ()

    def foretell(self, subject: Subject) -> tuple[Foretold, ...]:
        """The networks of other sizes that `restructure` will put into that of `subject`, of whose weights no value
        is known.

        Raises:
            CompressorError: It would refuse the network.
        """
        return ()
