"""What goes along with a training, step by step, and what runs it.

A pass that trains holds a `Follower`, whose `step` follows every step of the optimizer; a `Trainer` runs both. Neither
knows the other's business: the one no data or loss, the other no paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor


class Follower(ABC):
    """Follows a training from its step 0 on."""

    remembers: ClassVar[tuple[str, ...]] = ()
    """Attributes that a resumed training needs: tensors, numbers and containers of them."""

    def before(self) -> Mapping[str, Tensor]:
        """What `step` wants to know of the time before the optimizer's step."""
        return {}

    @abstractmethod
    def step(self, number: int, before: Mapping[str, Tensor], rate: float) -> None:
        """After the optimizer's step of this `number`, whose learning rate was `rate`; what was `before` it is told."""

    def entry(self) -> dict[str, float]:
        """What the log says at the end of an epoch, beside the loss."""
        return {}

    def note(self) -> str:
        """What progress shows beside the loss."""
        return ""

    def state(self) -> dict[str, Any]:
        """For a checkpoint of the training."""
        return {name: getattr(self, name) for name in self.remembers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        for name in self.remembers:
            setattr(self, name, state[name])


class Trainer(Protocol):
    """Trains the subject's network as a pass's settings say, in `n_steps` steps."""

    n_steps: int

    def train(self, follower: Follower | None = None) -> list[dict[str, float]]:
        """All steps, or those that an interrupted run has left, which `follower` follows; what each epoch came to."""
        ...
