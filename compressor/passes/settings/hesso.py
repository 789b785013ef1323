"""What a recipe may write under `pass: hesso`; no torch."""

from __future__ import annotations

from compressor.core.training import Count, Positive
from compressor.passes.settings.training import TrainingSettings


class HessoSettings(TrainingSettings):
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

    def refuses_steps(self, n_steps: int) -> str | None:
        start, length = self.schedule_of(n_steps)
        trials = self.cycles * self.cycle_steps
        if length < self.periods:
            return (
                f"{length} of {n_steps} steps are for pruning, fewer than periods: {self.periods}; write fewer periods "
                "or more epochs"
            )
        if start + trials + length > n_steps:
            return (
                f"warm-up, {self.cycles} cycles of {self.cycle_steps} steps and pruning take "
                f"{start + trials + length} steps, and there are {n_steps}; write more epochs or fewer cycles"
            )
        return None
