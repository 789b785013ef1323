"""Learning what the encodings leave continuous, and the codes themselves, by gradient.

A `LearnedCodebook` stands for one encoded matrix: its forward decodes, its backward gives the gradients of codewords and
scales and gathers what the codes would gain by moving (the proximal search of JLCM, arXiv 2309.17361). Codewords are
rounded to the int4 grid straight-through. `distill` learns all of a network at once on the original's predictions
(Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from compressor.core.encoding import Codebook, Scales
from compressor.core.tensors import EncodedTensor
from compressor.graph.blocks import first_tensor

_POSITIONS = 512


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, scales: Tensor, learned: LearnedCodebook) -> Tensor:
        grid = table.detach().round().clamp(-8, 7)
        values = grid[learned.index].view(scales.shape[0], scales.shape[1], -1)
        ctx.save_for_backward(scales, values)
        ctx.learned = learned
        return (values * scales.unsqueeze(2)).flatten(1)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        scales, values = ctx.saved_tensors
        learned = ctx.learned
        upstream = upstream.float().view(values.shape)
        to_scales = (upstream * values).sum(2)
        to_values = (upstream * scales.unsqueeze(2)).view(-1, learned.dim)
        to_table = torch.zeros(learned.table.shape).index_add_(0, learned.index, to_values)
        learned.gather(to_values)
        return to_table, to_scales, None


class LearnedCodebook(nn.Module):
    """The codebook encoding of one matrix with its table, scales and codes open to learning.

    table (n_codebooks·2**width, dim) in steps of the int4 grid, scales (rows, n_groups), index (rows·vectors,) into the
    table. `mapping_rate` 0 leaves the codes alone.
    """

    def __init__(self, encoding: Codebook, mapping_rate: float, neighbours: int, delta: float) -> None:
        super().__init__()
        self.encoding, self.dim = encoding, encoding.dim
        self.mapping_rate, self.neighbours, self.delta = mapping_rate, neighbours, delta
        size = encoding.table.shape[1]
        book = torch.repeat_interleave(torch.arange(len(encoding.counts)), torch.tensor(encoding.counts))
        self.index = (encoding.codes.long() + book.unsqueeze(1) * size).flatten()
        self.table = nn.Parameter(encoding.table.float().flatten(0, 1))
        self.scales = nn.Parameter(encoding.scales.decode())
        self._gathered: Tensor | None = None
        self.flipped = 0

    def forward(self) -> Tensor:
        """The matrix (rows, columns) in its own row order."""
        rows, columns = self.encoding.shape
        stored = _Decode.apply(self.table, self.scales, self)[:, :columns]
        if self.encoding.order is None:
            return stored
        return torch.zeros_like(stored).index_copy(0, self.encoding.order.long(), stored)

    def gather(self, gradient: Tensor) -> None:
        """Adds a step's gradient of the values, scaled to unit root mean square, to what codes will move by."""
        if not self.mapping_rate:
            return
        size = gradient.pow(2).mean().sqrt().clamp_min(1e-30)
        if self._gathered is None:
            self._gathered = torch.zeros(gradient.shape, dtype=torch.bfloat16)
        self._gathered.add_(gradient, alpha=-self.mapping_rate / float(size))

    @torch.no_grad()
    def move(self) -> None:
        """Moves each code to the near codeword whose logit has overtaken the current one's.

        Logit of codeword k: ⟨Σ −g, (C_k − c)/‖C_k − c‖⟩ · 1/(‖C_k − c‖ + δ) − 1, of the current one 0. In one dimension
        this is the summed `proximal_gradient` of the jlcm pass.
        """
        if self._gathered is None:
            return
        n_books, size = len(self.encoding.counts), self.encoding.table.shape[1]
        grid = self.table.round().clamp(-8, 7).view(n_books, size, self.dim)
        distance = torch.cdist(grid, grid)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        distance.masked_fill_(distance == 0, torch.inf)
        near = distance.topk(min(self.neighbours, size - 1), largest=False)
        offset = (torch.arange(n_books) * size).view(-1, 1, 1)
        flat = grid.flatten(0, 1)
        candidates = (near.indices + offset).flatten(0, 1)
        reach = near.values.flatten(0, 1)
        direction = (flat[candidates] - flat.unsqueeze(1)) / reach.unsqueeze(2)
        pull = (direction / (reach.unsqueeze(2) / 8 + self.delta)).nan_to_num(0.0)
        for start in range(0, len(self.index), 1 << 18):
            part = slice(start, start + (1 << 18))
            current = self.index[part]
            logits = torch.einsum("vkd,vd->vk", pull[current], self._gathered[part].float()) - 1
            best = logits.max(1)
            moves = best.values > 0
            rows = moves.nonzero().flatten()
            self.index[part][rows] = candidates[current[rows], best.indices[rows]]
            self._gathered[part][rows] = 0
            self.flipped += len(rows)

    def result(self) -> Codebook:
        """What has been learned, as it is stored."""
        old = self.encoding
        n_books, size = len(old.counts), old.table.shape[1]
        grid = self.table.detach().round().clamp(-8, 7).to(torch.int8).view(n_books, size, self.dim)
        codes = (self.index % size).view(old.codes.shape).int()
        bits = 16 if old.scales.row is None else 8
        scales = Scales.of(self.scales.detach().clamp_min(1e-8) if bits == 8 else self.scales.detach(), bits)
        return Codebook(old.shape, old.width, old.dim, old.group, codes, grid, scales, old.counts, old.order)


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates: of codewords in grid steps, of scales relative to their mean, of norms and biases."""

    codebook: float
    scale: float
    dense: float


class Student(nn.Module):
    """A network whose encoded matrices are `LearnedCodebook`s and whose norms and biases are open."""

    def __init__(
        self, module: nn.Module, tensors: Mapping[str, EncodedTensor], mapping_rate: float, neighbours: int, delta: float,
        prefix: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        self.module, self.learned = module, {}
        self.layouts, self.dense = {}, {}
        parameters = dict(module.named_parameters())
        for name, parameter in ((f"{prefix}{name}", parameter) for name, parameter in parameters.items()):
            tensor = tensors[name]
            if isinstance(tensor.encoding, Codebook) and tensor.encoding.on_int4_grid:
                self.learned[name] = LearnedCodebook(tensor.encoding, mapping_rate, neighbours, delta)
                self.layouts[name] = tensor.layout
            elif tensor.encoding.kind == "dense" and parameter.dim() == 1:
                self.dense[name] = nn.Parameter(tensor.decode())

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every open tensor by name, as a forward takes it."""
        found = {name: self.layouts[name].tensor(learned()).to(dtype) for name, learned in self.learned.items()}
        return found | {name: parameter.to(dtype) for name, parameter in self.dense.items()}

    def groups(self, rates: Rates) -> list[dict]:
        """Parameter groups of an optimiser."""
        scales = [learned.scales for learned in self.learned.values()]
        mean = sum(float(scale.detach().mean()) for scale in scales) / max(1, len(scales))
        return [
            {"params": [learned.table for learned in self.learned.values()], "lr": rates.codebook},
            {"params": scales, "lr": rates.scale * mean},
            {"params": list(self.dense.values()), "lr": rates.dense},
        ]

    def results(self) -> dict[str, EncodedTensor]:
        """What has been learned."""
        found = {name: EncodedTensor(learned.result(), self.layouts[name]) for name, learned in self.learned.items()}
        return found | {name: EncodedTensor.dense(parameter) for name, parameter in self.dense.items()}


def distill(
    student: Student, batches: Callable[[int], tuple[dict[str, Tensor], Tensor]], teacher_head: Tensor, head: nn.Linear,
    steps: int, rates: Rates, dtype: torch.dtype, advance: Callable[[str], None],
) -> Iterator[dict[str, float]]:  # fmt: skip
    """`steps` of Adam on KL(original ‖ student) per token; yields {"step", "kl", "flipped"} every 10 steps.

    batches(i) gives the forward's arguments and the original's head inputs (tokens, width) of step i. Gradients of the
    logits, softmax(student) − softmax(original), are formed a few rows at a time.
    """
    groups = student.groups(rates)
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    first = [group["lr"] for group in optimiser.param_groups]
    table, teacher_table = head.weight.detach().to(dtype), teacher_head.to(dtype)
    n_codes = sum(len(learned.index) for learned in student.learned.values())
    running, count = 0.0, 0
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        decay = warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group, rate in zip(optimiser.param_groups, first, strict=True):
            group["lr"] = rate * decay
        arguments, teacher_rows = batches(step)
        hidden = _head_input(student, head, arguments, dtype)
        rows = hidden.detach().flatten(0, -2)
        gradient, loss = _divergence(rows, table, teacher_rows.to(dtype), teacher_table)
        hidden.backward((gradient / len(rows)).view_as(hidden).to(hidden.dtype))
        optimiser.step()
        optimiser.zero_grad()
        for learned in student.learned.values():
            learned.move()
        running, count = running + loss, count + 1
        advance(f"KL {loss:.3f}")
        if count == 10 or step == steps - 1:
            flipped = sum(learned.flipped for learned in student.learned.values())
            yield {"step": step + 1, "kl": running / count, "flipped_fraction": flipped / max(1, n_codes)}
            running, count = 0.0, 0


def reconstruct(
    student: Student, prefix: str, forward: Callable[[nn.Module, int], Tensor], targets: list[Tensor],
    tokens: Tensor | None, channels: Tensor | None, steps: int, rates: Rates,
) -> dict[str, float]:  # fmt: skip
    """`steps` of Adam on the block's output error, Σ_t a_t Σ_c b_c (y − ŷ)²_tc over its mean square before; one batch each.

    The tokens' weights a and the channels' b are the gradient of the final loss, so that the few massive activations,
    which are most of the plain squared error, do not hide the rest (BRECQ's diagonal Fisher, arXiv 2102.05426, in rank
    one). forward(module, i) runs the block on batch i; targets (…, width) are what the original's block gave.
    """
    groups = student.groups(rates)
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    initial = [group["lr"] for group in optimiser.param_groups]
    starts = [0]
    for target in targets:
        starts.append(starts[-1] + target.shape[:-1].numel())
    losses = []
    for step in range(steps):
        for group, rate in zip(optimiser.param_groups, initial, strict=True):
            group["lr"] = rate * min(1.0, 2.0 * (1 - step / steps))
        i = step % len(targets)
        open_weights = {name.removeprefix(prefix): tensor for name, tensor in student.weights(torch.float32).items()}
        with torch.enable_grad():
            output = forward(_Calling(student.module, open_weights), i)
            error = (output - targets[i]).flatten(0, -2).pow(2)
            if channels is not None:
                error = error * channels
            error = error.mean(1)
            if tokens is not None:
                error = error * tokens[starts[i] : starts[i + 1]]
            loss = error.mean()
        losses.append(float(loss.detach()))
        (loss / max(losses[0], 1e-30)).backward()
        optimiser.step()
        optimiser.zero_grad()
        for learned in student.learned.values():
            learned.move()
    n_codes = sum(len(learned.index) for learned in student.learned.values())
    flipped = sum(learned.flipped for learned in student.learned.values())
    n = max(1, len(losses) // 4)
    return {
        "loss_before": sum(losses[:n]) / n, "loss_after": sum(losses[-n:]) / n,
        "flipped_fraction": flipped / max(1, n_codes),
    }  # fmt: skip


class _Calling(nn.Module):
    """A module that computes with other weights."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["replaced"] = module, weights

    def forward(self, *args, **kwargs):
        return functional_call(self.inner, self.replaced, args, kwargs)


class _Reached(Exception):
    pass


def _head_input(student: Student, head: nn.Linear, arguments: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The student's input of the head, with gradients."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple) -> None:
        caught.append(args[0])
        raise _Reached

    handle = head.register_forward_pre_hook(catch)
    try:
        first_tensor(functional_call(student.module, student.weights(dtype), (), arguments))
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


@torch.no_grad()
def _divergence(rows: Tensor, table: Tensor, teacher_rows: Tensor, teacher_table: Tensor) -> tuple[Tensor, float]:
    """∂KL/∂rows, and the mean KL over a sample of the rows."""
    parts, total, counted = [], 0.0, 0
    for part, original in zip(rows.split(_POSITIONS), teacher_rows.split(_POSITIONS), strict=True):
        target = functional.linear(original, teacher_table).float().softmax(-1)
        logits = functional.linear(part, table).float()
        sample = slice(0, 32)
        log_q = logits[sample].log_softmax(-1)
        total += float((target[sample] * (target[sample].clamp_min(1e-20).log() - log_q)).sum())
        counted += len(log_q)
        parts.append(((logits.softmax(-1) - target).to(table.dtype) @ table).float())
    return torch.cat(parts), total / counted
