"""What a recipe may write under `pass: lrp`; no torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, model_validator

from compressor.core.passes import Need
from compressor.core.training import Count, FittedSettings, Optimizer, Rate
from compressor.passes.settings.fields import UNEVEN, Counted, RemovesFraction

Rule = Literal["epsilon", "zplus", "alpha_beta", "gamma"]


class LrpSettings(RemovesFraction, FittedSettings):
    """Removes the channels, heads and neurons that explain least of what the network says.

    criterion      lrp: relevance at a unit's output; taylor: |activation · gradient|; gradient: |gradient|;
                   magnitude: the norm of its weights
    fraction       the share that is removed, `of` the parameters, of the units or of the flops, a forward's
                   multiplications by matrices
    spread         network: the lowest of all units; kind: the same share of each kind, as heads and neurons, the
                   lowest of all blocks; group: the same share of each layer's, so that all blocks stay alike
    step           how much of it at a time: scores are computed anew after each
    most           the largest share of a group's units that may go
    divisible      what stays of a group that loses units is a multiple of it: kernels compute channels by 8 or 16, and
                   an odd number of them may take longer than all did; of spread: network
    first_rule     of the layer that reads the network's input; zbox, or same as the others of its kind
    conv_rule      of convolutions
    linear_rule    of linear layers
    epsilon, gamma, alpha, beta   of the rules; alpha − beta is 1
    trials         of a search by Optuna for the rules of low, middle and high convolutions and of linear layers, such
                   that the network keeps its predictions longest on the reference data; 0 takes those written
    norms          measure: batch norms take their statistics from the smaller network on the calibration data; keep
    compensate     bias: what removed units add on average goes to the biases of the linear layers that read them;
                   layers that have none get one; none
    epochs         of training afterwards, with the original as teacher or on labels; 0 is none
    """

    name = "lrp"
    paper = (
        "Yeom et al., Pruning by explaining: a novel criterion for deep neural network pruning, Pattern Recognition \
2021, https://arxiv.org/abs/1912.08881"
    )

    criterion: Literal["lrp", "taylor", "gradient", "magnitude"] = "lrp"
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    of: Counted = "parameters"
    spread: Literal["network", "kind", "group"] = "network"
    step: Annotated[float, Field(gt=0, le=1)] = 0.05
    most: Annotated[float, Field(gt=0, lt=1)] = 0.9
    divisible: Annotated[int, Field(ge=1)] = 1
    first_rule: Literal["zbox", "same"] = "zbox"
    conv_rule: Rule = "zplus"
    linear_rule: Rule = "epsilon"
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    gamma: Annotated[float, Field(ge=0)] = 0.25
    alpha: Annotated[float, Field(ge=1)] = 2.0
    beta: Annotated[float, Field(ge=0)] = 1.0
    trials: Count = 0
    norms: Literal["measure", "keep"] = "measure"
    compensate: Literal["bias", "none"] = "none"
    epochs: Count = 0
    batch: Annotated[int, Field(ge=1)] = 32
    optimizer: Optimizer = "AdamW"
    rate: Rate = 1e-4

    @model_validator(mode="after")
    def _conserves(self) -> LrpSettings:
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(f"alpha − beta is {self.alpha - self.beta:g}; write such that it is 1, as 2 and 1")
        if self.trials and self.criterion != "lrp":
            raise ValueError(f"trials searches the rules of criterion: lrp, found {self.criterion}; write trials: 0")
        if self.divisible > 1 and self.spread != "network":
            raise ValueError(f"divisible is of spread: network, found {self.spread}; write divisible: 1")
        if self.trials and find_spec("optuna") is None:
            raise ValueError("trials needs optuna; pip install 'compressor[search]', or write trials: 0")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        runs = self.norms == "measure" or self.compensate == "bias" or self.of == "flops"
        measures: frozenset[Need] = frozenset({"data"} if runs else ())
        explains: frozenset[Need] = frozenset({"data", "gradients"})
        return super().needs | (measures if self.criterion == "magnitude" else explains)

    @property
    def refuses_decoders(self) -> str | None:
        if self.spread == "group":
            return None
        return f"{UNEVEN}; found spread: {self.spread}; write spread: group, so that all lose alike"

    @property
    def removes_evenly(self) -> bool:
        return self.of == "units" and self.spread != "network"

    @property
    def measures_norms(self) -> bool:
        return self.norms == "measure"

    def cost(self, tokens: int) -> float:
        return 3.0 * self.fraction / self.step + 13.0 * self.trials  # 3 to score, 10 to judge
