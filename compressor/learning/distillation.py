"""All of a network learns at once on the original's predictions (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.core.memory import give_back
from compressor.core.passes import Rates
from compressor.learning.head import Head
from compressor.learning.objectives import Wanted, divergence
from compressor.learning.student import Student
from compressor.ops.schedules import rate_share


def distill(
    student: Student, batches: Callable[[int], tuple[dict[str, Tensor], Tensor]], teacher: Head, head: nn.Linear,
    steps: int, rates: Rates, dtype: torch.dtype, advance: Callable[[str], None],
) -> Iterator[dict[str, float]]:  # fmt: skip
    """`steps` of Adam on KL(original ‖ student) per token; yields {"step", "kl", "flipped_fraction"} every 10 steps.

    batches(i) gives the forward's arguments and the original's head inputs (tokens, width) of step i; `teacher` is what
    the original makes of them.
    """
    optimiser = torch.optim.Adam(student.groups(rates), betas=(0.9, 0.95), fused=True)
    initial = [group["lr"] for group in optimiser.param_groups]
    teacher = Head(teacher.table.to(dtype), teacher.bias, teacher.logits)
    names = {id(parameter): name for name, parameter in student.module.named_parameters()}
    running, count = 0.0, 0
    for step in range(steps):
        for group, rate in zip(optimiser.param_groups, initial, strict=True):
            group["lr"] = rate * _cosine(step, steps)
        arguments, teacher_rows = batches(step)
        weights = student.weights(dtype)
        hidden = _head_input(student, head, arguments, weights)
        table = weights.get(names[id(head.weight)], head.weight.to(dtype))
        bias = None if head.bias is None else weights.get(names[id(head.bias)], head.bias.to(dtype))
        rows = hidden.detach().flatten(0, -2)
        own = Head(table.detach(), None if bias is None else bias.detach(), teacher.logits)
        wanted = Wanted(table.requires_grad, bias is not None and bias.requires_grad)
        found = divergence(rows, own, teacher_rows.to(dtype), teacher, wanted)
        outputs, gradients = [hidden], [found.to_rows.view_as(hidden).to(hidden.dtype)]
        for part, gradient in ((table, found.to_table), (bias, found.to_bias)):
            if part is not None and gradient is not None:
                outputs.append(part)
                gradients.append(gradient.to(dtype))
        torch.autograd.backward(outputs, gradients)
        loss = found.loss
        del weights, hidden, table, bias, own, rows, found, outputs, gradients  # before the next step makes its own
        optimiser.step()
        optimiser.zero_grad()
        student.move()
        give_back()
        running, count = running + loss, count + 1
        advance(f"KL {loss:.3f}")
        if count == 10 or step == steps - 1:
            yield {"step": step + 1, "kl": running / count, "flipped_fraction": student.flipped_fraction}
            running, count = 0.0, 0


def _cosine(step: int, steps: int) -> float:
    """The share of the full rate: up over the first tenth, down to a twentieth along half a cosine."""
    return rate_share(step, steps, rise=steps // 10, floor=0.05)


class _Reached(Exception):
    pass


def _head_input(student: Student, head: nn.Linear, arguments: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """The student's input of the head, with gradients."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple) -> None:
        caught.append(args[0])
        raise _Reached

    handle = head.register_forward_pre_hook(catch)
    try:
        with contextlib.suppress(_Reached):
            functional_call(student.module, weights, (), arguments)
    finally:
        handle.remove()
    return caught[0]
