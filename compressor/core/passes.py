"""What every pass is: a frozen description. Its fields are its settings, checked when the recipe is read.

A pass has two layers, so that recipes are checked and planned without torch: its settings
(`compressor.core.settings`, one class per pass) and, in `compressor/passes/<name>.py`, a subclass of them that does
the work.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from compressor.core.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["data", "labels", "gradients", "training"]
Stage = Literal["structure", "rewrite", "weight"]
Role = Literal["linear", "embedding", "conv", "other"]
STAGES: tuple[Stage, ...] = ("structure", "rewrite", "weight")
"""In this order they stand in a recipe."""


@dataclass(frozen=True)
class Statistics:
    """What a pass that drops weights may know of a matrix (out, in).

    hessian       (in, in): mean over tokens of t·xxᵀ, t the importance of a token, or 1
    gradient      (out, in): Σ|g| or √Σg² over sequences, by the pass's `gradient_norm`
    n_sequences   that were seen, of `window` tokens (or positions) each
    sparsity      the share to drop of this very matrix, where shares are allocated; None: the pass's own
    """

    hessian: Tensor | None = None
    gradient: Tensor | None = None
    n_sequences: int = 1
    window: int = 1
    sparsity: float | None = None


class Pass(BaseModel, ABC):
    """One published method with its settings.

    name    in recipes; the file name of the pass
    stage   structure: a smaller network · rewrite: the same function, other weights · weight: an encoding per tensor
    paper   authors, title, link
    prunes  a weight pass that says which weights are kept, before another says how these are stored
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str]
    stage: ClassVar[Stage]
    paper: ClassVar[str]
    prunes: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        """What the pass, as it is set, cannot do without."""
        return frozenset()

    def spec_for(self, name: str, shape: tuple[int, int], role: Role) -> Spec | None:
        """How the pass will store the matrix (rows, columns) of a tensor; None where it leaves it alone."""
        return None

    def cost(self, tokens: int) -> float:
        """Forward passes over the calibration tokens that the pass takes, about; a backward pass counts as two."""
        return 0.0

    def ladder(self) -> tuple[Pass, ...]:
        """The same pass at other widths, of which an allocation chooses one per tensor; itself among them."""
        return (self,)

    def quick(self) -> Pass:
        """A faster pass whose errors rise and fall with the width as its own do."""
        return self

    @property
    def trains(self) -> bool:
        """Of a weight pass, whether the network is trained before it is encoded: its `fit` takes a
        `core.structure.Subject`."""
        return False

    def kept(self, rows: int, columns: int) -> int:
        """How many weights of such a matrix stay; of a pass that prunes."""
        return rows * columns

    @property
    def gradient_norm(self) -> Literal[1, 2] | None:
        """p, where the pass asks for Σ|g| (1) or √Σg² (2) per weight over calibration sequences."""
        return None

    @property
    def allocates(self) -> bool:
        """Whether matrices lose different shares, as its `allocate` says once gradients are known."""
        return False

    @property
    def keeps_zeros(self) -> bool:
        """Whether its encoding holds exact zeros, so that what a pass before has dropped stays dropped."""
        return True

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


class StructurePass(Pass):
    """A pass that returns a smaller network; its `restructure` takes a `core.structure.Subject`."""

    stage = "structure"

    @property
    def chooses_units(self) -> bool:
        """Among the traced graph's groups; a network that has none is refused before."""
        return True

    @property
    def removes(self) -> float:
        """The share of the network that goes."""
        return 0.0

    @property
    def removes_exactly(self) -> bool:
        """Whether that is a share of the parameters, so that sizes can be told before."""
        return False

    @property
    def removes_evenly(self) -> bool:
        """Whether every kind of unit loses that share."""
        return False
