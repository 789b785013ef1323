"""What passes that train a network are told of the training: examples, loss, optimizer; no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


_SENDABLE = ("momentum", "nesterov", "weight_decay")
"""Options of SGD that compressed gradients know of."""


class Compression(BaseModel):
    """How processes that train together send their gradients compressed (deep gradient compression).

    share     of a matrix's entries that a process sends in a step; what has one dimension is sent whole
    warmup    the shares of the first epochs instead
    masking   clears the momentum where entries were sent; late: at shares up to 1 %; paper: always; never
    clip      the largest norm of the mean gradient; each of N processes clips its own to that by √N, before all else
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    share: Annotated[float, Field(gt=0, lt=1)] = 0.001
    warmup: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[])
    masking: Literal["late", "paper", "never"] = "late"
    clip: Rate | None = None


class Training(Pass):
    """What passes that train have in common.

    epochs        over --data; a step takes `batch` examples, in a new order each epoch
    loss          labels: cross-entropy; teacher: the original's predictions; both: their mean; none: labels where the
                  data has them, the teacher otherwise
    distance      to the teacher; kl: of the softmax at `temperature`, times its square; mse: of the outputs
    optimizer     a class of torch.optim, with `rate` and further `options` as it takes them
    schedule      of the rate: cosine, linear or constant, after a `rise` over that share of the steps
    gradients     between processes that torchrun started: dense, or compressed as `compression` says, with SGD
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
    gradients: Literal["dense", "compressed"] = "dense"
    compression: Compression = Compression()

    @model_validator(mode="after")
    def _sends_what_it_can(self) -> Training:
        if self.gradients == "dense":
            if self.compression != Compression():
                raise ValueError("compression is of gradients: compressed, found dense; leave compression out")
            return self
        if (reason := self.refuses_compression) is not None:
            raise ValueError(f"gradients: compressed: {reason}; write gradients: dense")
        if self.optimizer != "SGD":
            raise ValueError(
                f"gradients: compressed has the momentum of SGD in what it sends, and {self.optimizer} scales each "
                "entry by its own past, most of which has not been sent; write optimizer: SGD, or gradients: dense"
            )
        if others := [name for name in self.options if name not in _SENDABLE]:
            raise ValueError(
                f"gradients: compressed knows of the options {', '.join(_SENDABLE)}, found {', '.join(others)}; leave "
                "them out, or write gradients: dense"
            )
        if not self.epochs:
            raise ValueError("gradients: compressed is of a training, and epochs is 0; write epochs, or leave it out")
        return self

    @property
    def refuses_compression(self) -> str | None:
        """Why gradients of the pass cannot be sent compressed; None where they can."""
        return None

    def steps(self, n_examples: int, n_processes: int = 1) -> tuple[int, int]:
        """Of the optimizer in all over `n_examples`, and examples of each; an epoch's last that fill none are left out.

        Both are 0 where `n_processes` have no example each.
        """
        batch = min(self.batch, n_examples) // n_processes * n_processes
        return (self.epochs * (n_examples // batch), batch) if batch else (0, 0)

    def refuses_steps(self, n_steps: int) -> str | None:
        """Why `n_steps` of the optimizer are too few; None where they will do."""
        return None

    def forwards_trained(self, n: int) -> float:
        """Forwards of one example that training takes, about, where there are `n` examples; a backward is two."""
        return n * self.epochs * (3.0 + (self.loss in ("teacher", "both")))

    @property
    def tokens_tried(self) -> float:
        """Tokens of text on which networks are tried before training, all forwards together; none of `cost`."""
        return 0.0

    @property
    def needs(self) -> frozenset[Need]:
        labels: frozenset[Need] = frozenset({"labels"} if self.loss in ("labels", "both") else ())
        always: frozenset[Need] = frozenset({"data", "gradients", "training"})
        return always | labels if self.epochs else frozenset()


def unlabelled(settings: Training, loss: str) -> str:
    """What is wrong where labels are learned, and the data has none."""
    return f"{settings.name}: loss {loss} needs labels, and the data has none; write loss: teacher"


def too_few(settings: Training, n_examples: int, n_processes: int) -> str:
    """What is wrong where a process has no example of its own."""
    return (
        f"{settings.name}: {n_examples} examples in batches of {settings.batch} are fewer than {n_processes} "
        "processes; give more data, or start fewer"
    )


def alone(settings: Training) -> str:
    """What is wrong where gradients are to be compressed and nobody is there to send them to."""
    return (
        f"{settings.name}: gradients: compressed is of several processes, and this is one; start with "
        "torchrun --nproc-per-node 2 -m compressor …, or write gradients: dense"
    )


class FittedSettings(Training, StructureSettings):
    """Of structure passes that train the network, on the way or at the end; 0 epochs are none."""

    epochs: Count = 10
