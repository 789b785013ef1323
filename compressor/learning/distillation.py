"""All of a network learns at once on the original's predictions (Hinton et al., arXiv 1503.02531).

Weights stay packed: a block's are decoded when it is called, and again, with its activations, when gradients come back
to it (Chen et al., arXiv 1604.06174); what it was given is all that is kept between. Held are what learns, its
gradients and moments, the tables, and one block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from compressor.core.memory import LEARNING_SLACK, Slack, give_back
from compressor.core.passes import Rates
from compressor.graph.blocks import on_input, patched
from compressor.learning.head import Head
from compressor.learning.objectives import Wanted, divergence
from compressor.learning.student import Student
from compressor.ops.schedules import rate_share


def distill(
    student: Student, batches: Callable[[int], tuple[dict[str, Tensor], Tensor]], teacher: Head, head: nn.Linear,
    steps: int, rates: Rates, dtype: torch.dtype, advance: Callable[[str], None], blocks: Sequence[str] = (),
) -> Iterator[dict[str, float]]:  # fmt: skip
    """`steps` of Adam on KL(original ‖ student) per token; yields {"step", "kl", "flipped_fraction"} every 10 steps.

    batches(i) gives the forward's arguments and the original's head inputs (tokens, width) of step i; `teacher` is what
    the original makes of them. Weights of the modules named in `blocks` are there only while these compute.
    """
    optimiser = torch.optim.Adam(student.groups(rates), betas=(0.9, 0.95), fused=True)
    initial = [group["lr"] for group in optimiser.param_groups]
    teacher = Head(teacher.table.to(dtype), teacher.bias, teacher.logits)
    names = {id(parameter): name for name, parameter in student.module.named_parameters()}
    slack = Slack(LEARNING_SLACK)
    streamed = {student.module.get_submodule(block): _streamed(student, block, names, dtype, slack) for block in blocks}
    inside = tuple(f"{block}." for block in blocks)
    outside = [name for name in names.values() if not name.startswith(inside)] if blocks else None
    running, count = 0.0, 0
    for step in range(steps):
        for group, rate in zip(optimiser.param_groups, initial, strict=True):
            group["lr"] = rate * _cosine(step, steps)
        arguments, teacher_rows = batches(step)
        weights = student.weights(dtype, outside)
        with patched(streamed):
            hidden = _head_input(student, head, arguments, weights)
        give_back()  # what the blocks left behind, before the logits come
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
        loss = found.loss
        del own, rows, found, table, bias, teacher_rows
        give_back()
        with patched(streamed):
            torch.autograd.backward(outputs, gradients)
        del weights, hidden, outputs, gradients  # before the next step makes its own
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


def _streamed(
    student: Student, name: str, names: dict[int, str], dtype: torch.dtype, slack: Slack
) -> Callable[..., Any]:  # fmt: skip
    """The forward of the block of that name with weights that are decoded in it, and again for its backward pass."""
    block = student.module.get_submodule(name)
    stored = {local: names[id(parameter)] for local, parameter in block.named_parameters()}
    due = set(stored.values())

    def run(*args: Any, **kwargs: Any) -> Any:
        slack.give_back()  # what blocks left behind: over all it is several times what one needs
        weights = student.weights(dtype, due)
        own = {local: weights[each] for local, each in stored.items() if each in weights}
        streamed = block.__dict__.pop("forward")
        try:
            return functional_call(block, own, args, kwargs)
        finally:
            block.forward = streamed

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward


class _Reached(Exception):
    pass


def _head_input(student: Student, head: nn.Linear, arguments: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """The student's input of the head, with gradients."""
    caught: list[Tensor] = []

    def catch(given: Tensor) -> None:
        caught.append(given)
        raise _Reached

    with on_input(head, catch), contextlib.suppress(_Reached):
        functional_call(student.module, weights, (), arguments)
    return caught[0]
