"""The settings of every pass, without torch: what a recipe may write under `pass: <name>`.

`compressor/passes/<name>.py` holds the pass itself, a subclass of its settings.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compressor.core.passes import Need, Pass, Role
from compressor.core.spec import AffineSpec, CodebookSpec, Group, Spec

GroupSetting = Annotated[int, Field(ge=16, multiple_of=16)] | Literal["row"]
Steps = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class AffineSettings(Pass):
    """A uniform grid per group of columns; the baselines, each at its best settings.

    rtn     rounds to nearest, with a searched scale
    hqq     half-quadratic fitting of scale and zero point, no data
    gptq    rounds column by column and feeds the error forward
    """

    name = "affine"
    stage = "weight"
    paper = "Frantar et al., GPTQ, ICLR 2023, https://arxiv.org/abs/2210.17323"

    method: Literal["rtn", "hqq", "gptq"] = "rtn"
    bits: Literal[2, 3, 4, 8] = 4
    group: GroupSetting = 64
    zero: Literal["middle", "half", "learned"] = "middle"
    scale_bits: Literal[8, 16] = 16
    damping: Rate = 0.01

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"data"}) if self.method == "gptq" else frozenset()

    def spec_for(self, name: str, shape: tuple[int, int], role: Role) -> Spec | None:
        if role not in ("linear", "conv"):
            return None
        group: Group = self.group
        return AffineSpec(bits=self.bits, group=group, zero=self.zero, scale_bits=self.scale_bits)

    def cost(self, tokens: int) -> float:
        return 3.0 if self.method == "gptq" else 0.0

    @property
    def keeps_zeros(self) -> bool:
        return self.zero != "half"


class JlcmSettings(Pass):
    """Jointly learned codebooks and mappings.

    width, dim          a code of `width` bits names `dim` neighbouring weights: width / dim bits per weight
    codebooks           tables per tensor; with several, rows are clustered and re-ordered
    group, scale_bits   columns that share a scale, and how it is stored
    grid                int4: codewords on −8 … 7, which onnxruntime runs; free: float16, only for safetensors
    kmeans_iterations   of the weighted k-means that starts the codebooks
    feedback            codes with error feedback; without it each code is the nearest, for comparison
    damping             of the Hessian in the error feedback, as a share of its mean diagonal
    block_steps         gradient steps on each block's output; 0 is off
    mapping_rate        of the proximal search that moves codes in these steps; 0 leaves them
    codebook_rate, scale_rate, dense_rate   learning rates, as in the recipe's section distill
    neighbours, delta   of the proximal mapping gradient, φ(d) = 1 / (d + delta) on the nearest codewords
    """

    name = "jlcm"
    stage = "weight"
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

    def cost(self, tokens: int) -> float:
        windows = max(tokens // 512, 1)
        return 4.0 + 3.0 * self.block_steps * 4 / windows


SETTINGS: dict[str, type[Pass]] = {kind.name: kind for kind in (AffineSettings, JlcmSettings)}
