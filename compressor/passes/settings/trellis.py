"""What a recipe may write under `pass: trellis`; no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compressor.core.passes import Need, Role, WeightSettings
from compressor.core.spec import CodebookSpec, Spec
from compressor.core.training import Rate
from compressor.ops.widths import rows_before
from compressor.passes.settings.fields import GroupSetting, Steps

DIM = 2
"""Weights that a step gives."""
WIDTHS = (4, 5, 6, 7)
"""Bits of a step that trellises are allocated in: 2 to 3.5 bits per weight."""
_PER_TABLE = 96
"""Weights that a matrix has at least for each codeword of its table, so that the table is a small part of it."""
_FURTHEST = 2
"""Rows before its own that a state reaches back to, at most: what the graph unpacks."""


class TrellisSettings(WeightSettings):
    """Trellis codes: a codeword of two weights is named by the last bits of the codes down a column.

    width               bits of a step's code: width / 2 bits per weight
    window              bits of a state, and so codewords of the table, 2**window; fewer where a matrix is small
    group, scale_bits   columns that share a scale, and how it is stored
    damping             of the Hessian in the error feedback, as a share of its mean diagonal
    descent_rounds      of coordinate descent behind it, over scales and paths, on the layer's output error; 0 is off
    """

    name = "trellis"
    paper = "Tseng et al., QTIP: Quantization with Trellises and Incoherence Processing, NeurIPS 2024, \
https://arxiv.org/abs/2406.11235"

    width: Annotated[int, Field(ge=2, le=7)] = 5
    window: Annotated[int, Field(ge=4, le=12)] = 12
    group: GroupSetting = 64
    scale_bits: Literal[8, 16] = 8
    damping: Rate = 0.01
    descent_rounds: Steps = 1

    @model_validator(mode="after")
    def _reaches(self) -> Self:
        if not 0 < rows_before(self.width, self.window) <= _FURTHEST:
            raise ValueError(
                f"a window of {self.window} bits for codes of {self.width}; write one of {self.width + 1} to "
                f"{(_FURTHEST + 1) * self.width}"
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"data"})

    def spec_for(self, name: str, shape: tuple[int, int], role: Role) -> Spec | None:
        if role not in ("linear", "conv"):
            return None
        return CodebookSpec(
            width=self.width, dim=DIM, group=self.group, scale_bits=self.scale_bits, window=self.window_of(shape)
        )

    def window_of(self, shape: tuple[int, int]) -> int:
        """Bits of a state for a matrix (rows, columns): `window`, or less where its table would be a large part."""
        fitting = (shape[0] * shape[1] // _PER_TABLE).bit_length() - 1
        return max(self.width + 1, min(self.window, fitting))

    def compared(self, shape: tuple[int, int]) -> int:
        return (1 + self.descent_rounds) * 2 ** self.window_of(shape) // DIM

    def ladder(self) -> tuple[WeightSettings, ...]:
        found = sorted({self.width, *WIDTHS})
        return tuple(self.model_copy(update={"width": width, "window": max(self.window, width + 1)}) for width in found)

    def quick(self) -> WeightSettings:
        return self.model_copy(update={"descent_rounds": 0, "window": min(self.window, max(8, self.width + 1))})

    def cost(self, tokens: int) -> float:
        return 4.0 + self.descent_rounds
