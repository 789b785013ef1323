"""What a recipe may write under `pass: rounding`; no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from compressor.core.passes import BlockLearning, Need, Rates, Role, WeightSettings
from compressor.core.spec import AffineSpec, CodebookSpec, Spec
from compressor.core.training import Rate
from compressor.passes.settings.affine import AffineSettings
from compressor.passes.settings.fields import GroupSetting, Steps, listed, uniform_ladder


class RoundingSettings(WeightSettings):
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
    learn: Annotated[tuple[Literal["rounding", "scale", "zero"], ...], BeforeValidator(listed), Field(min_length=1)] = (
        "rounding",
    )
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
    def block_learning(self) -> BlockLearning | None:
        steps = self.steps if self.unit == "block" else 0
        return BlockLearning(steps, Rates(codebook=0.03, scale=self.scale_rate, dense=1e-3)) if steps else None

    @property
    def refuses_single_block(self) -> str | None:
        return (
            "unit is block, and the network has no repeated ones; write unit: layer" if self.unit == "block" else None
        )

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

    def ladder(self) -> tuple[WeightSettings, ...]:
        found = uniform_ladder(self, self.group)
        return tuple(step for step in found if step.bits <= 3) if self.grid == "codebook" else found

    def quick(self) -> WeightSettings:
        return AffineSettings(bits=self.bits, group=self.group, zero=self.zero, scale_bits=self.scale_bits)

    def cost(self, tokens: int) -> float:
        if self.unit == "block":
            return 6.0 + 3.0 * self.steps * 2048 / max(tokens, 2048)
        return 6.0 + self.steps * 600 / max(tokens, 600)  # a product with a matrix (in, in) is about 600 tokens' worth

    @property
    def keeps_zeros(self) -> bool:
        return self.zero != "half"
