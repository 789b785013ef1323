"""What a recipe may write under `pass: reste`; no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from compressor.core.passes import Role, WeightSettings
from compressor.core.spec import BinarySpec, Spec
from compressor.core.training import Rate, Share, Training


class ResteSettings(Training, WeightSettings):
    """Weights, and inputs if asked, learned as signs: one bit per weight and a scale.

    activations   binary: inputs of these layers are signs as well, about a threshold per channel that is learned
    estimator     of the gradient of sign; reste: of a power function that grows steeper; ste: 1 near zero;
                  ede: of a hyperbolic tangent that does
    scale         of the signs: one for the layer, or for each output channel
    unit          what the estimator sees of a weight; raw: the weight itself; mean: in units of the layer's mean size
    o_end         o at the end of the training; 1 at its start
    """

    name = "reste"
    paper = (
        "Wu et al., Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural \
Networks Training, ICCV 2023, https://arxiv.org/abs/2308.06689"
    )

    activations: Literal["float", "binary"] = "float"
    estimator: Literal["reste", "ste", "ede"] = "reste"
    scale: Literal["layer", "channel"] = "layer"
    unit: Literal["raw", "mean"] = "raw"
    o_end: Annotated[float, Field(ge=1)] = 3.0
    rate: Rate = 0.1
    options: dict[str, Any] = Field({"momentum": 0.9})
    rise: Share = 0.0

    def spec_for(self, name: str, shape: tuple[int, int], role: Role) -> Spec | None:
        scale = "row" if self.scale == "channel" else "tensor"
        return BinarySpec(scale=scale) if role in ("linear", "conv") else None

    @property
    def trains(self) -> bool:
        return True

    @property
    def signs_inputs(self) -> bool:
        return self.activations == "binary"

    @property
    def refuses_decoders(self) -> str | None:
        signs = "the graph of decoders has no layers on binary inputs; write activations: float"
        return signs if self.signs_inputs else None
