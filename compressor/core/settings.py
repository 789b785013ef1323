"""The settings of every pass, without torch: what a recipe may write under `pass: <name>`.

`compressor/passes/<name>.py` holds the pass itself, a subclass of its settings.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from compressor.core.passes import Need, Pass, Role
from compressor.core.search_settings import N2nSettings
from compressor.core.spec import AffineSpec, CodebookSpec, Group, Spec
from compressor.core.structure_settings import LrpSettings
from compressor.core.training_settings import HessoSettings, OtoSettings, ResteSettings

GroupSetting = Annotated[int, Field(ge=16, multiple_of=16)] | Literal["row"]
Steps = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]

SPARSEGPT_COLUMNS = 128
"""Of a matrix that SparseGPT chooses from at a time."""


WIDTHS = (2, 3, 4, 8)
"""Bits that uniform grids are allocated in."""
GROUPS = (32, 64, 128)
CODES = ((4, 1), (8, 4), (9, 4), (10, 4), (12, 4), (6, 2), (7, 2))
"""(width, dim) that codebooks are allocated in: 2 to 4 bits per weight."""


def uniform_ladder(step: Any) -> tuple[Any, ...]:
    """A pass with fields `bits` and `group` at every width, and in the usual groups beside its own."""
    groups = (step.group,) if step.group == "row" else sorted({step.group, *GROUPS})
    return tuple(step.model_copy(update={"bits": bits, "group": group}) for bits in WIDTHS for group in groups)


def _listed(value: Any) -> Any:
    """A list as YAML has it; plans are compared, and settings hashed, so that it is a tuple here."""
    return tuple(value) if isinstance(value, list) else value


def whole_share(n: int, share: float) -> int:
    """⌊n·share⌋, where 100 · 0.29 is 29."""
    return int(n * share + 1e-9)


class AffineSettings(Pass):
    """A uniform grid per group of columns; the baselines, each at its best settings.

    rtn     rounds to nearest, with a searched scale
    hqq     half-quadratic fitting of scale and zero point, no data
    gptq    rounds column by column and feeds the error forward

    zero    the zero point: middle, half a step below it, or of each group its own, a whole number of steps (learned) or
            of 8 bits (fine)
    sweeps  of coordinate descent behind gptq, over codes and scales
    """

    name = "affine"
    stage = "weight"
    paper = "Frantar et al., GPTQ, ICLR 2023, https://arxiv.org/abs/2210.17323"

    method: Literal["rtn", "hqq", "gptq"] = "rtn"
    bits: Literal[2, 3, 4, 8] = 4
    group: GroupSetting = 64
    zero: Literal["middle", "half", "learned", "fine"] = "middle"
    scale_bits: Literal[8, 16] = 16
    damping: Rate = 0.01
    sweeps: Steps = 0

    @model_validator(mode="after")
    def _fits_together(self) -> AffineSettings:
        if self.sweeps and self.method != "gptq":
            raise ValueError(
                f"sweeps are behind gptq, and method is {self.method}; write method: gptq, or leave sweeps"
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"data"}) if self.method == "gptq" else frozenset()

    def spec_for(self, name: str, shape: tuple[int, int], role: Role) -> Spec | None:
        if role not in ("linear", "conv"):
            return None
        group: Group = self.group
        return AffineSpec(bits=self.bits, group=group, zero=self.zero, scale_bits=self.scale_bits)

    def ladder(self) -> tuple[Pass, ...]:
        return uniform_ladder(self)

    def quick(self) -> Pass:
        return self.model_copy(update={"method": "rtn", "sweeps": 0})

    def cost(self, tokens: int) -> float:
        return 3.0 + self.sweeps if self.method == "gptq" else 0.0

    @property
    def keeps_zeros(self) -> bool:
        return self.zero in ("middle", "learned")


class JlcmSettings(Pass):
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

    def ladder(self) -> tuple[Pass, ...]:
        codes = sorted({(self.width, self.dim), *CODES}, key=lambda code: (code[0] / code[1], code))
        return tuple(self.model_copy(update={"width": width, "dim": dim}) for width, dim in codes)

    def quick(self) -> Pass:
        changed = {"feedback": False, "kmeans_iterations": 0, "codebooks": 1, "block_steps": 0, "descent_rounds": 0}
        return self.model_copy(update=changed)

    def cost(self, tokens: int) -> float:
        windows = max(tokens // 512, 1)
        return 4.0 + self.descent_rounds + 3.0 * self.block_steps * 4 / windows


class RoundingSettings(Pass):
    """Learned rounding: AdaRound, BRECQ, signed gradients, coordinate descent.

    start         nearest: from the grid point nearest to each weight; feedback: from error feedback, as affine's gptq
    unit          layer: on the output of each layer; block: on that of each block, where the network has blocks
    grid          uniform; codebook: 2**bits levels of the int4 grid, learned per tensor
    learn         what learns: rounding, scale, zero
    optimizer     adam: a rectified sigmoid, with a penalty that drives it to 0 or 1; signsgd: signed gradients of an
                  offset; descent: one column after the other to the best point of the grid
    steps         of the optimizer, of descent sweeps over the columns; 0 leaves the start as it is
    rate          learning rate of the rounding; none is 1/steps for signsgd and 0.1 for adam
    scale_rate    of scales, relative to their start
    penalty       λ, of the mean rounding penalty beside a loss that starts at 1
    """

    name = "rounding"
    stage = "weight"
    mapping_rate: ClassVar[float] = 0.0
    neighbours: ClassVar[int] = 1
    delta: ClassVar[float] = 1.0
    codebook_rate: ClassVar[float] = 0.03
    dense_rate: ClassVar[float] = 1e-3
    paper = "Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020, \
https://arxiv.org/abs/2004.10568"

    bits: Literal[2, 3, 4, 8] = 4
    group: GroupSetting = 64
    zero: Literal["middle", "half", "learned"] = "middle"
    scale_bits: Literal[8, 16] = 16
    damping: Rate = 0.01
    start: Literal["nearest", "feedback"] = "feedback"
    unit: Literal["layer", "block"] = "layer"
    grid: Literal["uniform", "codebook"] = "uniform"
    learn: Annotated[
        tuple[Literal["rounding", "scale", "zero"], ...], BeforeValidator(_listed), Field(min_length=1)
    ] = ("rounding",)
    optimizer: Literal["adam", "signsgd", "descent"] = "descent"
    steps: Steps = 4
    rate: Rate | None = None
    scale_rate: Rate = 1e-3
    penalty: Annotated[float, Field(ge=0)] = 100.0

    @model_validator(mode="after")
    def _fits_together(self) -> RoundingSettings:
        if self.grid == "codebook" and self.bits > 3:
            raise ValueError(
                f"grid codebook takes some of the 16 levels of the int4 grid, and bits {self.bits} would take all; "
                "write bits: 2 or 3, or grid: uniform"
            )
        if self.grid == "codebook" and self.zero != "middle":
            raise ValueError(f"grid codebook has no zero point, but zero is {self.zero}; leave zero out")
        if self.optimizer == "descent" and (
            self.unit == "block" or "rounding" not in self.learn or "zero" in self.learn
        ):
            raise ValueError(
                "optimizer descent moves codes, and scales if learn has them, on the output of a layer; write "
                "optimizer: adam or signsgd for another unit, or to learn zero alone or with them"
            )
        if "zero" in self.learn and self.zero != "learned":
            raise ValueError(f"learn has zero, but zero is {self.zero}, the same for every group; write zero: learned")
        return self

    @property
    def step_size(self) -> float:
        """The learning rate of the rounding."""
        return self.rate or (1 / max(1, self.steps) if self.optimizer == "signsgd" else 0.1)

    @property
    def block_steps(self) -> int:
        """Steps on the output of a block."""
        return self.steps if self.unit == "block" else 0

    @property
    def needs(self) -> frozenset[Need]:
        if self.unit == "block":
            return frozenset({"data", "gradients"})
        return frozenset({"data"} if self.start == "feedback" or self.steps else ())

    def spec_for(self, name: str, shape: tuple[int, int], role: Role) -> Spec | None:
        if role not in ("linear", "conv"):
            return None
        if self.grid == "codebook":
            return CodebookSpec(width=self.bits, dim=1, group=self.group, scale_bits=self.scale_bits)
        return AffineSpec(bits=self.bits, group=self.group, zero=self.zero, scale_bits=self.scale_bits)

    def ladder(self) -> tuple[Pass, ...]:
        found = uniform_ladder(self)
        return tuple(step for step in found if step.bits <= 3) if self.grid == "codebook" else found

    def quick(self) -> Pass:
        return AffineSettings(bits=self.bits, group=self.group, zero=self.zero, scale_bits=self.scale_bits)

    def cost(self, tokens: int) -> float:
        if self.unit == "block":
            return 6.0 + 3.0 * self.steps * 2048 / max(tokens, 2048)
        return 6.0 + self.steps * 600 / max(tokens, 600)  # a product with a matrix (in, in) is about 600 tokens' worth

    @property
    def keeps_zeros(self) -> bool:
        return self.zero != "half"


class GblmSettings(Pass):
    """Which weights to drop: by gradient and activation, or by a baseline.

    score        gblm: |W|·(‖X‖ + α·‖G‖) per row; wanda: |W|·‖X‖ per row; magnitude: |W|, one threshold per matrix;
                 sparsegpt: w²/U², with the kept weights making up for the dropped
    sparsity     the share that is dropped
    pattern      "N:M" instead: N of each run of M columns of a row, as 2:4 and 4:8
    p            of the norm of a weight's gradients over sequences
    alpha        α, of the gradient beside the activation, for 128 sequences; other numbers are rescaled to it
    variant      reference: ‖X‖ as the authors' code has it, over a sequence on average; paper: over all 128 sequences
    allocation   uniform: every matrix the same share; importance: less from matrices with more outliers (OWL)
    damping      of sparsegpt's Hessian, as a share of its mean diagonal
    """

    name = "gblm"
    stage = "weight"
    prunes = True
    paper = "Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, 2023, \
https://arxiv.org/abs/2311.04902"

    score: Literal["gblm", "wanda", "magnitude", "sparsegpt"] = "gblm"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d?:[1-9]\d?$")] | None = None
    p: Literal[1, 2] = 1
    alpha: Annotated[float, Field(ge=0)] = 100.0
    variant: Literal["reference", "paper"] = "reference"
    allocation: Literal["uniform", "importance"] = "uniform"
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
        return frozenset() if self.score == "magnitude" else frozenset({"data"})

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


SETTINGS: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        AffineSettings,
        GblmSettings,
        HessoSettings,
        JlcmSettings,
        LrpSettings,
        N2nSettings,
        OtoSettings,
        ResteSettings,
        RoundingSettings,
    )
}
