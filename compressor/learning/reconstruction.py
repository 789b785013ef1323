"""A block learns on what the original's gave, after its layers are encoded (BRECQ, Li et al., arXiv 2102.05426)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.core.passes import BlockLearning
from compressor.learning.objectives import weighted_error
from compressor.learning.student import Student


def reconstruct(
    student: Student, prefix: str, forward: Callable[[nn.Module, int], Tensor], targets: list[Tensor],
    tokens: Tensor | None, channels: Tensor | None, learning: BlockLearning,
    make: Callable[[list[dict]], torch.optim.Optimizer],
) -> dict[str, float]:  # fmt: skip
    """Steps of the optimiser that `make` makes on the block's `weighted_error`, a batch each.

    forward(module, i) runs the block on batch i; targets (…, width) are what the original's block gave. Weights of
    tokens are of all batches one after the other.
    """
    optimiser, steps = make(student.groups(learning.rates)), learning.steps
    initial = [group["lr"] for group in optimiser.param_groups]
    starts = [0]
    for target in targets:
        starts.append(starts[-1] + target.shape[:-1].numel())
    losses = []
    for step in range(steps):
        for group, rate in zip(optimiser.param_groups, initial, strict=True):
            group["lr"] = rate * min(1.0, 2.0 * (1 - step / steps))
        i = step % len(targets)
        with torch.enable_grad():
            decoded = student.weights(torch.float32)
            open_weights = {name.removeprefix(prefix): tensor for name, tensor in decoded.items()}
            output = forward(_Calling(student.module, open_weights), i)
            some = None if tokens is None else tokens[starts[i] : starts[i + 1]]
            loss = weighted_error(output, targets[i], some, channels)
            losses.append(float(loss.detach()))
            (loss / max(losses[0], 1e-30) + student.penalty(step, steps)).backward()
        optimiser.step()
        optimiser.zero_grad()
        student.move()
    n = max(1, len(losses) // 4)
    ends = {"loss_before": sum(losses[:n]) / n, "loss_after": sum(losses[-n:]) / n}
    return ends | {"flipped_fraction": student.flipped_fraction}


class _Calling(nn.Module):
    """A module that computes with other weights."""

    inner: nn.Module
    replaced: dict[str, Tensor]

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["replaced"] = module, weights

    def forward(self, *args, **kwargs):
        return functional_call(self.inner, self.replaced, args, kwargs)
