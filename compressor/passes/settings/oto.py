"""What a recipe may write under `pass: oto`; no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from compressor.core.training import Rate
from compressor.passes.settings.training import TrainingSettings


class OtoSettings(TrainingSettings):
    """Trains once with a penalty on the units that are redundant after the warm-up, and projects them to zero.

    penalty         λ₀; none is 1e-3, and 1e-2 for an optimizer that adapts its rates
    amplification   of the smallest λ that makes a unit shrink where the gradient would let it grow; none: 2, or 20
    cap             of λ, in λ₀; none: 10, or 1000
    epsilon         ε of the half-space: a unit whose step turns away by more is set to zero
    erase           whole branches go instead of channels, heads and neurons: what lies between two joins, and adds
                    nothing to a sum once it is zero
    """

    name = "oto"
    paper = (
        "Chen et al., OTOv3: Automatic Architecture-Agnostic Neural Network Training and Compression from Structured \
Pruning to Erasing Operators, 2023, https://arxiv.org/abs/2312.09411"
    )

    penalty: Rate | None = None
    amplification: Rate | None = None
    cap: Rate | None = None
    epsilon: Annotated[float, Field(ge=0, lt=0.95)] = 0.0
    erase: bool = False

    @model_validator(mode="after")
    def _counts_no_operators(self) -> OtoSettings:
        if self.erase and self.of == "units":
            raise ValueError(
                "erase counts what goes in parameters or flops, since branches are of all sizes; write of: parameters"
            )
        return self

    @property
    def chooses_units(self) -> bool:
        return not self.erase

    @property
    def refuses_decoders(self) -> str | None:
        if not self.erase:
            return super().refuses_decoders
        return (
            "the graph of decoders has whole blocks only, and oto erases parts of them; write erase: false, or take "
            "n2n with units: block"
        )

    @property
    def removes_exactly(self) -> bool:
        return super().removes_exactly and not self.erase

    @property
    def strength(self) -> tuple[float, float, float]:
        """λ₀, amplification and cap, as set or as they suit the optimizer."""
        usual = (1e-3, 2.0, 10.0) if self.optimizer in ("SGD", "ASGD") else (1e-2, 20.0, 1000.0)
        return self.penalty or usual[0], self.amplification or usual[1], self.cap or usual[2]
