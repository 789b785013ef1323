"""What passes that train while units go to zero have in common; no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from compressor.core.training import FittedSettings, Positive, Share
from compressor.passes.settings.fields import UNEVEN, Counted, RemovesFraction


class TrainingSettings(RemovesFraction, FittedSettings):
    """Of passes that train while units go to zero.

    fraction      the share that is removed, `of` the parameters, of the units, or of the flops: a forward's
                  multiplications by matrices
    divisible     what stays of a group is a multiple of it, and at least that
    most          the largest share of a group's units that may go
    warmup        the share of the steps before units begin to go
    pruning       the share of the steps over which they go; what is left trains on
    """

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    of: Counted = "parameters"
    divisible: Positive = 1
    most: Annotated[float, Field(gt=0, le=1)] = 0.9
    epochs: Positive = 10
    warmup: Share = 0.1
    pruning: Annotated[float, Field(gt=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _has_time(self) -> TrainingSettings:
        if self.warmup + self.pruning > 1 + 1e-9:
            raise ValueError(
                f"warmup {self.warmup:g} and pruning {self.pruning:g} are shares of one training and come to more than "
                "1; write such as 0.1 and 0.5"
            )
        return self

    def schedule_of(self, n_steps: int) -> tuple[int, int]:
        """The first of the training's steps at which units may go, and over how many they go."""
        return round(self.warmup * n_steps), max(1, round(self.pruning * n_steps))

    @property
    def refuses_decoders(self) -> str | None:
        return f"{UNEVEN}; take lrp with spread: group, or n2n, which removes whole blocks"

    @property
    def refuses_compression(self) -> str | None:
        return f"{self.name} tells by each step which units matter, and a compressed one has few entries of any"
