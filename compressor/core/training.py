"""What passes that train a network are told of the training: examples, loss, optimizer; no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from compressor.core.passes import Need, Pass, StructureSettings
from compressor.ops.schedules import Schedule

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Optimizer = Literal[
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"
]
"""Of torch.optim; not LBFGS, which calls the loss itself, nor those that take some tensors only."""


class Training(Pass):
    """What passes that train have in common.

    epochs        over --data; a step takes `batch` examples, in a new order each epoch
    loss          labels: cross-entropy; teacher: the original's predictions; both: their mean; none: labels where the
                  data has them, the teacher otherwise
    distance      to the teacher; kl: of the softmax at `temperature`, times its square; mse: of the outputs
    optimizer     a class of torch.optim, with `rate` and further `options` as it takes them
    schedule      of the rate: cosine, linear or constant, after a `rise` over that share of the steps
    """

    epochs: Positive = 10
    batch: Positive = 128
    loss: Literal["labels", "teacher", "both"] | None = None
    distance: Literal["kl", "mse"] = "kl"
    temperature: Rate = 2.0
    optimizer: Optimizer = "SGD"
    rate: Rate = 0.05
    options: dict[str, Any] = Field({})
    schedule: Schedule = "cosine"
    rise: Share = 0.05

    @property
    def needs(self) -> frozenset[Need]:
        labels: frozenset[Need] = frozenset({"labels"} if self.loss in ("labels", "both") else ())
        always: frozenset[Need] = frozenset({"data", "gradients", "training"})
        return always | labels if self.epochs else frozenset()


def unlabelled(settings: Training, loss: str) -> str:
    """What is wrong where labels are learned, and the data has none."""
    return f"{settings.name}: loss {loss} needs labels, and the data has none; write loss: teacher"


class FittedSettings(Training, StructureSettings):
    """Of structure passes that train the network, on the way or at the end; 0 epochs are none."""

    epochs: Count = 10
