"""What a recipe may write under `pass: metaprune`; no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from compressor.core.passes import Need
from compressor.core.training import Count, FittedSettings, Positive, Rate
from compressor.passes.settings.fields import Counted, RemovesFraction


class MetapruneSettings(RemovesFraction, FittedSettings):
    """Rewrites a network slightly by a metanetwork, so that it loses less when its smallest channels are removed.

    network        the file of the metanetwork, which scripts/metatrain.py trained on networks alike; none: the network
                   stays as it is, and is pruned alike, to compare with
    fraction       the share that is removed, `of` the parameters, of the units or of the flops, a forward's
                   multiplications by matrices
    step           how much of it at a time: norms are taken anew after each
    most           the largest share of a group's units that may go
    divisible      what stays of a group that loses units is a multiple of it
    epochs_before  of training between the metanetwork and the pruning, at rate_before
    epochs         of training afterwards; 0 is none, before as well
    """

    name = "metaprune"
    paper = "Liu et al., Meta Pruning via Graph Metanetworks: A Universal Meta Learning Framework for Network Pruning, \
2025, https://arxiv.org/abs/2506.12041"

    reads = ("network",)

    network: str | None = None
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    of: Counted = "flops"
    step: Annotated[float, Field(gt=0, le=1)] = 0.01
    most: Annotated[float, Field(gt=0, lt=1)] = 0.9
    divisible: Positive = 1
    epochs_before: Count = 5
    rate_before: Rate = 0.01
    epochs: Count = 10
    rate: Rate = 0.01

    @model_validator(mode="after")
    def _trains_at_the_end(self) -> MetapruneSettings:
        if self.epochs_before and not self.epochs:
            raise ValueError(
                f"epochs_before is {self.epochs_before} and epochs 0: what is pruned last would not be trained; write "
                "epochs as well, or epochs_before: 0"
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        always: frozenset[Need] = frozenset({"data"})
        return super().needs | always

    def examines(self, in_blocks: float) -> bool:
        return self.network is not None or super().examines(in_blocks)

    @property
    def refuses_decoders(self) -> str | None:
        return "metaprune reads graphs of convolutions, and a decoder has none; take lrp with spread: group, or n2n"

    def forwards_trained(self, n: int) -> float:
        return super().forwards_trained(n) * (self.epochs_before + self.epochs) / max(1, self.epochs)

    @property
    def measures_norms(self) -> bool:
        return not self.epochs
