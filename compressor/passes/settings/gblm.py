"""What a recipe may write under `pass: gblm`; no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from compressor.core.passes import Need, PruningSettings
from compressor.core.training import Rate
from compressor.passes.settings.fields import whole_share

SPARSEGPT_COLUMNS = 128
"""Of a matrix that SparseGPT chooses from at a time."""


class GblmSettings(PruningSettings):
    """Which weights to drop: by gradient and activation, or by a baseline.

    score        gblm: |W|·(‖X‖ + α·‖G‖) per row; wanda: |W|·‖X‖ per row; magnitude: |W|, one threshold per matrix;
                 sparsegpt: w²/U², with the kept weights making up for the dropped
    sparsity     the share that is dropped
    pattern      "N:M" instead: N of each run of M columns of a row, as 2:4 and 4:8
    p            of the norm of a weight's gradients over sequences
    alpha        α, of the gradient beside the activation, for 128 sequences; other numbers are rescaled to it
    variant      reference: ‖X‖ as the authors' code has it, over a sequence on average; paper: over all 128 sequences
    allocation   uniform: every matrix the same share; importance: less from matrices with more outliers (OWL)
    reconstruct  layer: the kept weights make up for the dropped, by least squares on the layer's inputs; none
    damping      of that, and of sparsegpt's Hessian, as a share of its mean diagonal
    """

    name = "gblm"
    paper = "Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, 2023, \
https://arxiv.org/abs/2311.04902"

    score: Literal["gblm", "wanda", "magnitude", "sparsegpt"] = "gblm"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d?:[1-9]\d?$")] | None = None
    p: Literal[1, 2] = 1
    alpha: Annotated[float, Field(ge=0)] = 100.0
    variant: Literal["reference", "paper"] = "reference"
    allocation: Literal["uniform", "importance"] = "uniform"
    reconstruct: Literal["none", "layer"] = "none"
    damping: Rate = 0.01

    @model_validator(mode="after")
    def _fits_together(self) -> GblmSettings:
        if self.run is None:
            return self
        n, m = self.run
        if n >= m:
            raise ValueError(f"pattern {self.pattern} drops {n} of {m}, which leaves nothing; write as 2:4")
        if self.sparsity not in (0.5, n / m):
            raise ValueError(f"pattern {self.pattern} is a sparsity of {n / m:g}, not {self.sparsity}; leave one out")
        if self.allocation == "importance":
            raise ValueError(f"pattern {self.pattern} is the same share everywhere; leave allocation or pattern out")
        return self

    @property
    def run(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def allocates(self) -> bool:
        return self.allocation == "importance"

    @property
    def gradient_norm(self) -> Literal[1, 2] | None:
        return self.p if self.score == "gblm" or self.allocates else None

    @property
    def needs(self) -> frozenset[Need]:
        if self.gradient_norm is not None:
            return frozenset({"data", "gradients"})
        blind = self.score == "magnitude" and self.reconstruct == "none"
        return frozenset() if blind else frozenset({"data"})

    def kept(self, rows: int, columns: int) -> int:
        """Exact with the same share for every matrix; the mean where shares are allocated."""
        if self.run is not None:
            n, m = self.run
            return rows * (columns - columns // m * n - columns % m * n // m)
        if self.score == "magnitude":
            return rows * columns - whole_share(rows * columns, self.sparsity)
        if self.score == "sparsegpt":
            widths = [min(SPARSEGPT_COLUMNS, columns - i) for i in range(0, columns, SPARSEGPT_COLUMNS)]
            return rows * columns - sum(whole_share(rows * width, self.sparsity) for width in widths)
        return rows * (columns - whole_share(columns, self.sparsity))

    def cost(self, tokens: int) -> float:
        return (3.0 if "data" in self.needs else 0.0) + (4.0 if "gradients" in self.needs else 0.0)
