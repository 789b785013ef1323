"""What every pass is: a frozen description. Its fields are its settings, checked when the recipe is read.

A pass has two layers, so that recipes are checked and planned without torch: its settings
(`compressor.core.settings`, one class per pass) and, in `compressor/passes/<name>.py`, a subclass of them that does
the work.
"""

from __future__ import annotations

from abc import ABC
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from compressor.core.spec import Spec

Need = Literal["data", "labels", "gradients", "training"]
Stage = Literal["structure", "rewrite", "weight"]
Role = Literal["linear", "embedding", "conv", "other"]
STAGES: tuple[Stage, ...] = ("structure", "rewrite", "weight")
"""In this order they stand in a recipe."""


class Pass(BaseModel, ABC):
    """One published method with its settings.

    name    in recipes; the file name of the pass
    stage   structure: a smaller network · rewrite: the same function, other weights · weight: an encoding per tensor
    paper   authors, title, link
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str]
    stage: ClassVar[Stage]
    paper: ClassVar[str]

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
