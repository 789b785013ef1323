"""What a recipe knows of a pass: a frozen description, whose fields are its settings, checked when the recipe is read.

A pass has two layers, so that recipes are checked and planned without torch: its settings, in
`compressor/passes/settings/<name>.py`, and in `compressor/passes/<name>.py` a subclass of them that does the work, as
`compressor.core.contract` says:

    settings            work
    WeightSettings      WeightPass      how the weights of a matrix are stored
    PruningSettings     PruningPass     which weights of a matrix stay, before another pass stores them
    StructureSettings   StructurePass   a smaller network

What a pass can do besides is declared here, as a property with a default, and nothing else is asked of it.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from compressor.core.spec import Spec

Need = Literal["data", "labels", "gradients", "training"]
Stage = Literal["structure", "rewrite", "weight"]
Role = Literal["linear", "embedding", "conv", "other"]
STAGES: tuple[Stage, ...] = ("structure", "rewrite", "weight")
"""In this order they stand in a recipe."""


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates.

    codebook   of codewords, in grid steps
    scale      of scales, relative to their mean
    dense      of norms and biases
    """

    codebook: float
    scale: float
    dense: float


@dataclass(frozen=True)
class Moves:
    """How gradient steps move codes to other codewords: the proximal search of JLCM, on the `neighbours` nearest.

    A `rate` of 0 leaves codes where they are; φ(d) = 1 / (d + delta) is the pull of a codeword at distance d.
    """

    rate: float = 0.0
    neighbours: int = 4
    delta: float = 0.1


@dataclass(frozen=True)
class BlockLearning:
    """Gradient steps on the output of each block of the network, after its layers are encoded.

    steps   per block
    rates   of the optimiser
    moves   of codes to other codewords
    """

    steps: int
    rates: Rates
    moves: Moves = Moves()


class Pass(BaseModel, ABC):
    """One published method with its settings.

    name    in recipes; the file name of the pass
    stage   structure: a smaller network · rewrite: the same function, other weights · weight: an encoding per tensor
    paper   authors, title, link
    reaches  settings that lead out of the process, as to a cluster: not for a recipe of somebody else to say
    reads    settings that name files to be read, whose bytes are part of what a run is
    writes   settings that name files to be written: for the command line alone to say
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str]
    stage: ClassVar[Stage]
    paper: ClassVar[str]
    reaches: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[dict[str, str]] = {}
    """Setting -> the option of the command."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the pass, as it is set, cannot do without."""
        return frozenset()

    def cost(self, tokens: int) -> float:
        """Forward passes over the `tokens` of calibration that the pass takes, about; a backward pass counts as two."""
        return 0.0

    @property
    def trains(self) -> bool:
        """Of a weight pass, whether the network is trained before it is encoded: then it is a `TrainedPass`."""
        return False

    @property
    def signs_inputs(self) -> bool:
        """Whether layers are given signs, so that no gradient of the result tells about their inputs."""
        return False

    @property
    def refuses_decoders(self) -> str | None:
        """Why the graph of decoders cannot hold its result, and what to write instead; None where it can."""
        return None

    @property
    def refuses_others(self) -> str | None:
        """Why a network that is no decoder cannot go through it, and what to write instead; None where it can."""
        return None


class WeightSettings(Pass):
    """Settings of a pass that says how the weights of a matrix are stored."""

    stage = "weight"

    def spec_for(self, name: str, shape: tuple[int, int], role: Role) -> Spec | None:
        """How the pass will store the matrix of a tensor; None where it leaves it alone.

        Args:
            name: The tensor's.
            shape: (rows, columns) of the matrix.
            role: What the tensor is, as far as its name and shape tell.
        """
        return None

    def compared(self, shape: tuple[int, int]) -> int:
        """Codewords that each weight of a matrix is compared with, where that takes the time.

        Args:
            shape: (rows, columns) of the matrix.
        """
        return 0

    @property
    def encodes_beginnings(self) -> bool:
        """Whether the first rows, and the first groups of columns, of its encoding are that of a smaller matrix."""
        return False

    @property
    def keeps_zeros(self) -> bool:
        """Whether what a pass before has dropped is exactly zero in its encoding; without, it cannot follow one."""
        return False

    def ladder(self) -> tuple[WeightSettings, ...]:
        """The same pass at other widths, of which an allocation chooses one per tensor; itself among them."""
        return (self,)

    def quick(self) -> WeightSettings:
        """A faster pass whose errors rise and fall with the width as its own do."""
        return self

    @property
    def block_learning(self) -> BlockLearning | None:
        """The gradient steps on blocks that it asks for."""
        return None

    @property
    def refuses_single_block(self) -> str | None:
        """Why it cannot do with a network that has no repeated blocks, and what to write; None where it can."""
        return None


class PruningSettings(Pass):
    """Settings of a pass that says which weights of a matrix stay."""

    stage = "weight"

    def kept(self, rows: int, columns: int) -> int:
        """How many weights of a matrix (rows, columns) stay."""
        return rows * columns

    @property
    def gradient_norm(self) -> Literal[1, 2] | None:
        """p, where the pass asks for Σ|g| (1) or √Σg² (2) per weight over calibration sequences."""
        return None

    @property
    def allocates(self) -> bool:
        """Whether matrices lose different shares, as its `allocate` says once gradients are known."""
        return False


class StructureSettings(Pass):
    """Settings of a pass that makes the network smaller."""

    stage = "structure"

    @property
    def chooses_units(self) -> bool:
        """Among the traced graph's groups; a network that has none is refused before."""
        return True

    def examines(self, in_blocks: float) -> bool:
        """Whether its `examine` may have something to say of a transformer that was measured to be traced.

        Args:
            in_blocks: Of the network's parameters, the share that its blocks have.
        """
        return False

    def refuses_blocks(self, n: int) -> str | None:
        """Why a transformer of `n` blocks cannot go through it; None where it can."""
        return None

    @property
    def removes(self) -> float:
        """The share of the network that goes."""
        return 0.0

    @property
    def counts(self) -> Literal["parameters", "units", "flops"]:
        """What `removes` is a share of."""
        return "units"

    @property
    def removes_evenly(self) -> bool:
        """Whether every kind of unit loses that share."""
        return False

    @property
    def removes_exactly(self) -> bool:
        """Whether that is a share of the parameters, so that sizes can be told before."""
        return False

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of smaller networks that are in its result, and go with it into one artifact."""
        return ()

    @property
    def measures_norms(self) -> bool:
        """Whether batch norms of the smaller network take their statistics anew."""
        return False
