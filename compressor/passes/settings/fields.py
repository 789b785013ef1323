"""Fields that the settings of several passes have: groups, steps, the widths that are allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field

from compressor.core.passes import WeightSettings
from compressor.core.spec import Group

GroupSetting = Annotated[int, Field(ge=16, multiple_of=16)] | Literal["row"]
Steps = Annotated[int, Field(ge=0)]

Own = TypeVar("Own", bound=WeightSettings)

WIDTHS = (2, 3, 4, 8)
"""Bits that uniform grids are allocated in."""
GROUPS = (32, 64, 128)


def uniform_ladder(step: Own, group: Group) -> tuple[Own, ...]:
    """A pass with fields `bits` and `group` at every width, and in the usual groups beside its own."""
    groups = (group,) if group == "row" else sorted({group, *GROUPS})
    return tuple(step.model_copy(update={"bits": bits, "group": group}) for bits in WIDTHS for group in groups)


Counted = Literal["parameters", "units", "flops"]
"""What a share that is removed is of; flops are a forward's multiplications by matrices."""


class RemovesFraction:
    """Of structure passes whose settings have a `fraction` that is removed, `of` something."""

    if TYPE_CHECKING:
        fraction: float
        of: Counted
        most: float

    @property
    def removes(self) -> float:
        return self.fraction

    @property
    def counts(self) -> Counted:
        return self.of

    @property
    def removes_exactly(self) -> bool:
        return self.of == "parameters"

    def examines(self, in_blocks: float) -> bool:
        """Where it is more than half of what `most` lets go of blocks, which have little besides heads and neurons."""
        return self.fraction > self.most * (in_blocks if self.of == "parameters" else 1.0) / 2


UNEVEN = "its layers would differ in heads, width or parts, which the graph of decoders cannot have"
"""Of a decoder, after passes that take from each layer what matters least in the whole network."""


def listed(value: Any) -> Any:
    """A list as YAML has it; plans are compared, and settings hashed, so that it is a tuple here."""
    return tuple(value) if isinstance(value, list) else value


def whole_share(n: int, share: float) -> int:
    """⌊n·share⌋, where 100 · 0.29 is 29."""
    return int(n * share + 1e-9)
