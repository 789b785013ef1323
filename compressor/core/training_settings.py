"""The settings of passes that train the network, without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compressor.core.passes import Need, Pass, Role, StructurePass
from compressor.core.spec import BinarySpec, Spec
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
        return frozenset({"data", "gradients", "training"}) | labels if self.epochs else frozenset()


class FittedPass(Training, StructurePass):
    """Structure passes that train the network, on the way or at the end; 0 epochs are none."""

    epochs: Count = 10


class TrainingPass(FittedPass):
    """Passes that train while units go to zero.

    fraction      the share that is removed, `of` the parameters, of the units, or of the flops: a forward's
                  multiplications by matrices
    divisible     what stays of a group is a multiple of it, and at least that
    most          the largest share of a group's units that may go
    warmup        the share of the steps before units begin to go
    pruning       the share of the steps over which they go; what is left trains on
    """

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    of: Literal["parameters", "units", "flops"] = "parameters"
    divisible: Positive = 1
    most: Annotated[float, Field(gt=0, le=1)] = 0.9
    epochs: Positive = 10
    warmup: Share = 0.1
    pruning: Annotated[float, Field(gt=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _has_time(self) -> TrainingPass:
        if self.warmup + self.pruning > 1 + 1e-9:
            raise ValueError(
                f"warmup {self.warmup:g} and pruning {self.pruning:g} are shares of one training and come to more than "
                "1; write such as 0.1 and 0.5"
            )
        return self

    @property
    def removes(self) -> float:
        return self.fraction

    @property
    def removes_exactly(self) -> bool:
        return self.of == "parameters"


class HessoSettings(TrainingPass):
    """Trains once, and units go to zero on the way, the least salient first.

    periods       in which the budget is spent: each takes its share of units and shrinks them to zero
    cycles        of CRIC at most, before that: the lowest units are shrunk on trial and brought back, to see what
                  their loss does; 0 is off
    cycle_steps   of the optimizer in each
    """

    name = "hesso"
    paper = (
        "Chen et al., HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning, \
2024, https://arxiv.org/abs/2409.09085"
    )

    periods: Positive = 10
    cycles: Count = 0
    cycle_steps: Positive = 20


class OtoSettings(TrainingPass):
    """Trains once with a penalty on the units that are redundant after the warm-up, and projects them to zero.

    penalty         λ₀; none is 1e-3, and 1e-2 for an optimizer that adapts its rates
    amplification   of the smallest λ that makes a unit shrink where the gradient would let it grow; none: 2, or 20
    cap             of λ, in λ₀; none: 10, or 1000
    epsilon         ε of the half-space: a unit whose step turns away by more is set to zero
    erase           whole branches go instead of channels, heads and neurons: what lies between two joins, and adds
                    nothing to a sum once it is zero
    """

    name = "oto"
    paper = (
        "Chen et al., OTOv3: Automatic Architecture-Agnostic Neural Network Training and Compression from Structured \
Pruning to Erasing Operators, 2023, https://arxiv.org/abs/2312.09411"
    )

    penalty: Rate | None = None
    amplification: Rate | None = None
    cap: Rate | None = None
    epsilon: Annotated[float, Field(ge=0, lt=0.95)] = 0.0
    erase: bool = False

    @model_validator(mode="after")
    def _counts_no_operators(self) -> OtoSettings:
        if self.erase and self.of == "units":
            raise ValueError(
                "erase counts what goes in parameters or flops, since branches are of all sizes; write of: parameters"
            )
        return self

    @property
    def chooses_units(self) -> bool:
        return not self.erase

    @property
    def refuses_decoders(self) -> str | None:
        if not self.erase:
            return None
        return (
            "the graph of decoders has whole blocks only, and oto erases parts of them; write erase: false, or take "
            "n2n with units: block"
        )

    @property
    def removes_exactly(self) -> bool:
        return super().removes_exactly and not self.erase

    @property
    def strength(self) -> tuple[float, float, float]:
        """λ₀, amplification and cap, as set or as they suit the optimizer."""
        usual = (1e-3, 2.0, 10.0) if self.optimizer in ("SGD", "ASGD") else (1e-2, 20.0, 1000.0)
        return self.penalty or usual[0], self.amplification or usual[1], self.cap or usual[2]


class ResteSettings(Training):
    """Weights, and inputs if asked, learned as signs: one bit per weight and a scale.

    activations   binary: inputs of these layers are signs as well, about a threshold per channel that is learned
    estimator     of the gradient of sign; reste: of a power function that grows steeper; ste: 1 near zero;
                  ede: of a hyperbolic tangent that does
    scale         of the signs: one for the layer, or for each output channel
    unit          what the estimator sees of a weight; raw: the weight itself; mean: in units of the layer's mean size
    o_end         o at the end of the training; 1 at its start
    """

    name = "reste"
    stage = "weight"
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
    def keeps_zeros(self) -> bool:
        return False

    @property
    def signs_inputs(self) -> bool:
        return self.activations == "binary"

    @property
    def refuses_decoders(self) -> str | None:
        signs = "the graph of decoders has no layers on binary inputs; write activations: float"
        return signs if self.signs_inputs else None
