"""What a recipe may write under `pass: affine`; no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from compressor.core.passes import Need, Role, WeightSettings
from compressor.core.spec import AffineSpec, Group, Spec
from compressor.core.training import Rate
from compressor.passes.settings.fields import GroupSetting, Steps, uniform_ladder


class AffineSettings(WeightSettings):
    """A uniform grid per group of columns; the baselines, each at its best settings.

    rtn     rounds to nearest, with a searched scale
    hqq     half-quadratic fitting of scale and zero point, no data
    gptq    rounds column by column and feeds the error forward

    zero    the zero point: middle, half a step below it, or of each group its own, a whole number of steps (learned) or
            of 8 bits (fine)
    sweeps  of coordinate descent behind gptq, over codes and scales
    """

    name = "affine"
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

    def ladder(self) -> tuple[WeightSettings, ...]:
        return uniform_ladder(self, self.group)

    def quick(self) -> WeightSettings:
        return self.model_copy(update={"method": "rtn", "sweeps": 0})

    def cost(self, tokens: int) -> float:
        return 3.0 + self.sweeps if self.method == "gptq" else 0.0

    @property
    def encodes_beginnings(self) -> bool:
        return self.method != "gptq"

    @property
    def keeps_zeros(self) -> bool:
        return self.zero in ("middle", "learned")
