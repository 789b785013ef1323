"""What a recipe may write under `pass: jlcm`; no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compressor.core.passes import BlockLearning, Moves, Need, Rates, Role, WeightSettings
from compressor.core.spec import CodebookSpec, Spec
from compressor.core.training import Rate
from compressor.passes.settings.fields import GroupSetting, Steps

CODES = ((4, 1), (8, 4), (9, 4), (10, 4), (12, 4), (6, 2), (7, 2))
"""(width, dim) that codebooks are allocated in: 2 to 4 bits per weight."""


class JlcmSettings(WeightSettings):
    """Jointly learned codebooks and mappings.

    width, dim          a code of `width` bits names `dim` neighbouring weights: width / dim bits per weight
    codebooks           tables per tensor; with several, rows are clustered and re-ordered
    group, scale_bits   columns that share a scale, and how it is stored
    grid                int4: codewords on −8 … 7, which onnxruntime runs; free: float16, only for safetensors
    kmeans_iterations   of the weighted k-means that starts the codebooks
    feedback            codes with error feedback; without it each code is the nearest, for comparison
    damping             of the Hessian in the error feedback, as a share of its mean diagonal
    descent_rounds      of coordinate descent behind it, over scales and codes, on the layer's output error; 0 is off
    block_steps         gradient steps on each block's output; 0 is off
    mapping_rate        of the proximal search that moves codes in these steps; 0 leaves them
    codebook_rate, scale_rate, dense_rate   learning rates, as in the recipe's section distill
    neighbours, delta   of the proximal mapping gradient, φ(d) = 1 / (d + delta) on the nearest codewords
    """

    name = "jlcm"
    paper = "Yvinec et al., Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings, \
ICLR 2024, https://arxiv.org/abs/2309.17361"

    width: Annotated[int, Field(ge=1, le=12)] = 9
    dim: Literal[1, 2, 4] = 4
    codebooks: Annotated[int, Field(ge=1)] = 1
    group: GroupSetting = 64
    scale_bits: Literal[8, 16] = 8
    grid: Literal["int4", "free"] = "int4"
    kmeans_iterations: Steps = 4
    feedback: bool = True
    damping: Rate = 0.01
    descent_rounds: Steps = 2
    block_steps: Steps = 0
    mapping_rate: Annotated[float, Field(ge=0)] = 0.0
    codebook_rate: Rate = 0.03
    scale_rate: Rate = 0.01
    dense_rate: Rate = 1e-3
    neighbours: Annotated[int, Field(ge=1)] = 4
    delta: Rate = 0.1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"data", "gradients"}) if self.block_steps else frozenset({"data"})

    def spec_for(self, name: str, shape: tuple[int, int], role: Role) -> Spec | None:
        if role not in ("linear", "conv"):
            return None
        return CodebookSpec(
            width=self.width, dim=self.dim, codebooks=self.codebooks, group=self.group, scale_bits=self.scale_bits,
            grid=self.grid, reorder=min(self.codebooks, shape[0]) > 1,
        )  # fmt: skip

    @property
    def keeps_zeros(self) -> bool:
        return True

    @property
    def block_learning(self) -> BlockLearning | None:
        rates = Rates(self.codebook_rate, self.scale_rate, self.dense_rate)
        moves = Moves(self.mapping_rate, self.neighbours, self.delta)
        return BlockLearning(self.block_steps, rates, moves) if self.block_steps else None

    def ladder(self) -> tuple[WeightSettings, ...]:
        codes = sorted({(self.width, self.dim), *CODES}, key=lambda code: (code[0] / code[1], code))
        return tuple(self.model_copy(update={"width": width, "dim": dim}) for width, dim in codes)

    def quick(self) -> WeightSettings:
        changed = {"feedback": False, "kmeans_iterations": 0, "codebooks": 1, "block_steps": 0, "descent_rounds": 0}
        return self.model_copy(update=changed)

    def cost(self, tokens: int) -> float:
        windows = max(tokens // 512, 1)
        return 4.0 + self.descent_rounds + 3.0 * self.block_steps * 4 / windows
