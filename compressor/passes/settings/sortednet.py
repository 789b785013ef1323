"""What a recipe may write under `pass: sortednet`; no torch."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from compressor.core.passes import Need
from compressor.core.training import Count, FittedSettings, Optimizer, Positive, Rate, Share
from compressor.passes.settings.fields import listed

Shares = Annotated[tuple[Share, ...], BeforeValidator(listed), Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)]
JUDGED_TOKENS = 1 << 19
"""Over the square of the number of blocks, tokens on which their order is found, in n² / 2 forwards at most."""


class SortednetSettings(FittedSettings):
    """One network with smaller ones in it, which are its first units: trained together, and shipped in one artifact.

    Sizes are all pairs of a width and a depth, and are called by both in percent: 50, or 50x67 where there are several
    depths. The largest is the network itself.

    widths     shares of the channels and neurons of each layer that stay; 1 among them. The width of a residual stream
               stays whole
    heads      shares of the attention heads, one for each of `widths`; none: as those
    depths     shares of the blocks that stay, of a convolutional network of the branches that end in a sum; 1 among
               them
    blocks     which ones: chain, nested, those go first without which the outputs on the calibration data change least;
               spread, evenly; prefix, the first ones
    multiple   what stays of channels and neurons is a multiple of it, as kernels compute them; heads stay whole
    order      of units, by importance: taylor, |weights · gradients|; lrp, relevance; magnitude; none, as they are
    ship       names of the sizes that the artifact holds; none: all that are trained
    draw       which sizes learn in a step: random, `draws` of them, each on its part of the batch; sandwich, the
               largest, the smallest and others up to `draws`, which learn from the largest; all
    vectors    own: every size has norms and biases of its own; shared: of them the means and variances of batch norms
               alone
    largest    trained: with the others; frozen: only what the sizes have of their own learns, and the largest one
               stays the original
    """

    name = "sortednet"
    paper = "Valipour et al., SortedNet: a place for every network and every network in its place, 2023, \
https://arxiv.org/abs/2309.00255"

    widths: Shares = (0.25, 0.5, 0.75, 1.0)
    heads: Shares | None = None
    depths: Shares = (1.0,)
    blocks: Literal["chain", "spread", "prefix"] = "chain"
    multiple: Positive = 8
    order: Literal["taylor", "lrp", "magnitude", "none"] = "taylor"
    ship: Names | None = None
    draw: Literal["random", "sandwich", "all"] = "random"
    draws: Annotated[int, Field(ge=2)] = 4
    vectors: Literal["own", "shared"] = "own"
    largest: Literal["trained", "frozen"] = "trained"
    loss: Literal["labels", "teacher", "both"] | None = "teacher"
    epochs: Count = 4
    batch: Positive = 64
    optimizer: Optimizer = "AdamW"
    rate: Rate = 1e-3
    temperature: Rate = 1.0

    @model_validator(mode="after")
    def _are_sizes(self) -> SortednetSettings:
        for key, shares in (("widths", self.widths), ("depths", self.depths)):
            if 1.0 not in shares:
                raise ValueError(f"{key} are {list(shares)}; write 1 among them, which is the network itself")
        if 0.0 in (*self.widths, *(self.heads or ())):
            raise ValueError("a width of 0 leaves nothing of a layer; write such as 0.25")
        if self.heads is not None and len(self.heads) != len(self.widths):
            raise ValueError(f"heads are {len(self.heads)} shares, widths {len(self.widths)}; write one for each")
        if self.heads is not None and any(h < 1 for w, h in zip(self.widths, self.heads, strict=True) if w == 1):
            raise ValueError("heads of width 1 have to be 1: that is the network itself")
        double = next((name for name, n in Counter(self.names).items() if n > 1), None)
        if double is not None:
            raise ValueError(f"two sizes would be called {double}; write shares that differ in whole percents")
        unknown = next((name for name in self.ship or () if name not in self.names), None)
        if unknown is not None:
            raise ValueError(f"ship names '{unknown}'; known: {', '.join(self.names)}")
        if len(self.names) < 2:
            raise ValueError("there is one size only; write several widths or depths")
        if self.draw == "sandwich" and self.largest == "frozen":
            raise ValueError("draw: sandwich trains the largest, and it is frozen; write draw: random")
        if self.epochs and self.largest == "frozen" and self.vectors == "shared":
            raise ValueError(
                "with largest: frozen and vectors: shared nothing learns; write vectors: own, or epochs: 0"
            )
        return self

    @property
    def refuses_compression(self) -> str | None:
        return "sortednet trains in one process"

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        """(width, depth) of every size."""
        return tuple((width, depth) for depth in self.depths for width in self.widths)

    @property
    def names(self) -> tuple[str, ...]:
        """What the sizes are called, in the order of `pairs`."""
        return tuple(size_name(width, depth, len(self.depths) > 1) for width, depth in self.pairs)

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(name for name in self.ship or self.names if name != self.largest_name)

    @property
    def largest_name(self) -> str:
        """That of the network itself."""
        return size_name(1.0, 1.0, len(self.depths) > 1)

    def heads_of(self, width: float) -> float:
        """The share of the heads that stays at a width."""
        return width if self.heads is None else self.heads[self.widths.index(width)]

    @property
    def needs(self) -> frozenset[Need]:
        always: frozenset[Need] = frozenset({"data", "gradients"})
        return super().needs | always

    @property
    def chooses_units(self) -> bool:
        return len(self.widths) > 1

    def forwards_trained(self, n: int) -> float:
        drawn = {"random": 1.0, "sandwich": self.draws / 2, "all": len(self.names) / 2}[self.draw]
        return super().forwards_trained(n) * drawn  # of half the size on average

    def cost(self, tokens: int) -> float:
        return 3.0 + len(self.names)

    @property
    def tokens_tried(self) -> float:
        return JUDGED_TOKENS * (1 - min(self.depths) ** 2) / 2 if self.blocks == "chain" else 0.0


def size_name(width: float, depth: float, deep: bool) -> str:
    """A size by its shares in percent; `deep`: there are several depths."""
    return f"{100 * width:.0f}x{100 * depth:.0f}" if deep else f"{100 * width:.0f}"
