"""What a recipe may write under `pass: n2n`; no torch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from compressor.core.errors import RecipeError
from compressor.core.passes import Need, StructureSettings
from compressor.core.training import Count, Optimizer, Positive, Rate, Training
from compressor.passes.settings.fields import UNEVEN

Part = Annotated[float, Field(gt=0, le=1)]
POLICIES = ("removal", "shrinkage")
_LARGEST_HEADER = 1_000_000


def too_many(remove: int | None, n: int) -> str:
    """What is wrong where no unit would be left."""
    if n == 1:
        return f"remove is {remove}, but nothing would be left of one unit; leave n2n out"
    return f"remove is {remove}, but of {n} units one has to stay; write at most {n - 1}"


def refuse_overwriting(file: Path) -> None:
    """Refuses to save policies over anything that is there and holds none.

    Raises:
        RecipeError: It does.
    """
    if not (file.exists() or file.is_symlink()):
        return
    names = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if file.is_file():
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                names = json.loads(opened.read(length)) if 0 < length <= _LARGEST_HEADER else {}
    kinds = {name.partition(".")[0] for name in names if name != "__metadata__"} if isinstance(names, dict) else set()
    if not kinds or not kinds <= set(POLICIES):
        raise RecipeError(f"{file}: is there and holds no policies, which would be written over it; give another file")


class N2nSettings(Training, StructureSettings):
    """Removes layers, and shrinks those that are left, as a policy learns to from how good the students are.

    units          layer: convolutions, linears and pools; block: of a transformer; part: its attentions and MLPs;
                   auto: block where there are repeated blocks without convolutions, layer elsewhere
    policy         reinforce; random: students drawn evenly; of blocks also greedy: the least harmful one after the
                   other (SLEB), and influence: those that change the hidden state least (ShortGPT)
    remove         how many units go; none: as many as the reward says. greedy and influence need it
    measure        of students: accuracy (of next tokens, classes or the teacher's answers), or perplexity, its inverse
    start          of blocks: the policy's first odds; none: even ones; influence: as a block matters; greedy: what
                   greedy finds first
    strength       of that start, in logits per standard deviation
    search_epochs  of rollouts that decide what is removed
    shrink_epochs  of rollouts that decide how much the others shrink; layers only
    attributes     what of a layer shrinks: outputs, kernel, padding
    rollouts       students per epoch
    max_students   the search ends when so many were judged
    policy_rate, shrink_rate, own_rate    learning rates of the policies, and of the weight that each block has
    memory         of the baseline: how much of it stays from epoch to epoch
    max_parameters, max_latency   the largest share of the teacher's
    min_accuracy   the least share of the teacher's
    filters        students that cannot win are not trained
    init           of a student: inherit the teacher's weights where shapes allow, or fresh
    student_epochs, student_examples    a student's training before it is judged: on the teacher's outputs
    validation     examples, or tokens of text, that students are judged on; no student sees them before
    student_rate   of that training, at most; none: as `rate`
    jobs           students at once, one core each; 0: as many as there are cores
    engine         where: local processes, or ray, on a cluster at `address`
    policy_in      a file with policies to start from, trained on another teacher
    policy_out     where the policies are saved
    epochs         of the final student's training, on labels and the teacher; 0: none
    """

    name = "n2n"
    paper = (
        "Ashok et al., N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning, ICLR \
2018, https://arxiv.org/abs/1709.06030"
    )

    reaches = ("engine", "address")
    reads = ("policy_in",)
    writes = {"policy_out": "--policy"}  # noqa: RUF012

    units: Literal["auto", "layer", "block", "part"] = "auto"
    policy: Literal["reinforce", "random", "greedy", "influence"] = "reinforce"
    remove: Positive | None = None
    measure: Literal["accuracy", "perplexity"] = "accuracy"
    start: Literal["none", "influence", "greedy"] = "influence"
    strength: Annotated[float, Field(ge=0)] = 1.5
    search_epochs: Positive = 20
    shrink_epochs: Count = 0
    attributes: Annotated[list[Literal["outputs", "kernel", "padding"]], Field(min_length=1)] = Field(
        ["outputs", "kernel", "padding"]
    )
    rollouts: Positive = 5
    max_students: Positive | None = None
    policy_rate: Rate = 3e-3
    shrink_rate: Rate = 0.1
    own_rate: Rate = 0.2
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.8
    max_parameters: Part | None = None
    max_latency: Part | None = None
    min_accuracy: Part | None = None
    filters: bool = True
    init: Literal["inherit", "fresh"] = "inherit"
    student_epochs: Positive = 1
    student_examples: Positive = 4096
    student_rate: Rate | None = None
    validation: Positive = 2048
    jobs: Count = 0
    engine: Literal["local", "ray"] = "local"
    address: str = "auto"
    policy_in: str | None = None
    policy_out: str | None = None
    epochs: Count = 0
    batch: Positive = 64
    distance: Literal["kl", "mse"] = "mse"
    optimizer: Optimizer = "Adam"
    rate: Rate = 1e-3

    @model_validator(mode="after")
    def _fits_together(self) -> N2nSettings:
        ordered = self.policy in ("greedy", "influence")
        if ordered and self.remove is None:
            raise ValueError(f"policy {self.policy} has to know how many blocks go; write remove: 3 or such")
        if (ordered or self.measure == "perplexity") and self.units == "layer":
            what = f"policy {self.policy}" if ordered else "measure perplexity"
            raise ValueError(f"{what} is of blocks, but units is layer; write units: block")
        if self.policy == "influence" and self.units == "part":
            raise ValueError("policy influence is of whole blocks, but units is part; write units: block")
        return self

    def examines(self, in_blocks: float) -> bool:
        return bool(self.policy_in or self.policy_out)

    def refuses_blocks(self, n: int) -> str | None:
        return too_many(self.remove, n) if self.units == "block" and (self.remove or 0) >= n else None

    @property
    def refuses_compression(self) -> str | None:
        return "n2n trains its students in processes of its own, which send no gradients"

    @property
    def chooses_units(self) -> bool:
        return False

    @property
    def refuses_decoders(self) -> str | None:
        if self.units in ("auto", "block"):
            return None
        return f"{UNEVEN}; found units: {self.units}; write units: block"

    @property
    def refuses_others(self) -> str | None:
        if self.measure != "perplexity":
            return None
        return (
            "n2n: measure perplexity is of decoders, and this network predicts no next tokens; write measure: accuracy"
        )

    @property
    def needs(self) -> frozenset[Need]:
        trains: frozenset[Need] = frozenset({"training", "gradients"} if self.epochs or self.units != "block" else ())
        labels: frozenset[Need] = frozenset({"labels"} if self.loss in ("labels", "both") else ())
        always: frozenset[Need] = frozenset({"data"})
        return always | trains | labels

    @property
    def students(self) -> int:
        """How many are judged at most."""
        return self.max_students or self.rollouts * (self.search_epochs + self.shrink_epochs)

    def forwards_trained(self, n: int) -> float:
        taught = 0.0 if self.units == "block" else 3.0 * self.student_epochs * min(n, self.student_examples)
        return super().forwards_trained(n) + self.students * taught / 2  # of half the size on average

    def cost(self, tokens: int) -> float:
        """Of whole forwards over the validation tokens."""
        judged = {"influence": 1, "greedy": 30 * (self.remove or 1) / 2}.get(self.policy, self.students)
        return judged * min(1.0, self.validation / max(tokens, 1))
