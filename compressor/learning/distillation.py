"""Learning what the encodings leave continuous, and the codes themselves, by gradient.

A `LearnedMatrix` stands for one encoded matrix: its forward decodes, its backward gives the gradients of codewords and
scales and gathers what the codes would gain by moving (the proximal search of JLCM, arXiv 2309.17361). Codewords are
rounded to the int4 grid straight-through. `distill` learns all of a network at once on the original's predictions
(Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from compressor.core.encoding import Affine, Codebook, Refined, Scales
from compressor.core.memory import give_back
from compressor.core.tensors import EncodedTensor
from compressor.ops.schedules import rate_share

_POSITIONS = 512
_SAMPLED = 32


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, scales: Tensor, learned: LearnedMatrix) -> Tensor:
        values = learned.values(table.detach()).view(*scales.shape, -1)
        ctx.save_for_backward(scales, values)
        ctx.learned = learned
        return (values * scales.unsqueeze(2)).flatten(1)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        scales, values = ctx.saved_tensors
        learned = ctx.learned
        upstream = upstream.float().reshape(values.shape)
        to_scales = (upstream * values).sum(2)
        if not learned.learns_table:
            return None, to_scales, None
        to_values = (upstream * scales.unsqueeze(2)).reshape(-1, learned.dim)
        to_table = torch.zeros(learned.table.shape).index_add_(0, learned.index, to_values)
        learned.gather(to_values)
        return to_table, to_scales, None


class LearnedMatrix(nn.Module):
    """One encoded matrix with its scales, and for a codebook its table and codes, open to learning.

    table (n_codebooks·2**width, dim) in steps of the int4 grid, scales (rows, n_groups), index (rows·vectors,) into the
    table. A uniform grid has values in place of table and index. `mapping_rate` 0 leaves the codes alone; so does
    `keeps_zeros`, for a pruned matrix, with which a zero in a codeword stays one.
    """

    def __init__(
        self, encoding: Codebook | Affine, mapping_rate: float, neighbours: int, delta: float,
        keeps_zeros: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoding = encoding
        self.mapping_rate, self.neighbours, self.delta = 0.0 if keeps_zeros else mapping_rate, neighbours, delta
        if isinstance(encoding, Codebook):
            self.dim, size = encoding.dim, encoding.table.shape[1]
            book = torch.repeat_interleave(torch.arange(len(encoding.counts)), torch.tensor(encoding.counts))
            index = encoding.codes + (book * size).int().unsqueeze(1)
            self.table = nn.Parameter(encoding.table.float().flatten(0, 1))
            if keeps_zeros:
                open_places = self.table.detach() != 0
                self.table.register_hook(lambda gradient: gradient * open_places)
        else:
            self.dim, self.mapping_rate = 1, 0.0
            zero = encoding.zero.unsqueeze(2) if isinstance(encoding.zero, Tensor) else encoding.zero
            values = encoding.codes.view(len(encoding.codes), -1, encoding.group) - zero
            whole = bool((values == values.round()).all())
            self._values, index = values.to(torch.int16 if whole else torch.bfloat16).flatten(), torch.empty(0)
            self.table = nn.Parameter(torch.empty(0, 1), requires_grad=False)
        self.index = index.int().flatten()
        self.scales = nn.Parameter(encoding.scales.decode())
        self._gathered: Tensor | None = None
        self.flipped = 0

    @property
    def learns_table(self) -> bool:
        return isinstance(self.encoding, Codebook)

    def values(self, table: Tensor) -> Tensor:
        """The matrix without its scales, flat, in a small type that holds it exactly."""
        if not self.learns_table:
            return self._values
        grid = self.grid(table)
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(self.dim)
        if whole is None or not self._snaps:
            return grid[self.index].flatten()
        return grid.to(torch.int8).view(whole).flatten()[self.index].view(torch.int8)  # a codeword in one piece

    @property
    def _snaps(self) -> bool:
        return isinstance(self.encoding, Codebook) and self.encoding.on_int4_grid

    def grid(self, table: Tensor) -> Tensor:
        """The table as it will be stored: codewords on the int4 grid, where they are not free."""
        return table.round().clamp(-8, 7) if self._snaps else table

    def forward(self) -> Tensor:
        """The matrix (rows, columns) in its own row order."""
        stored = _Decode.apply(self.table, self.scales, self)[:, : self.encoding.shape[1]]
        order = getattr(self.encoding, "order", None)
        return stored if order is None else torch.zeros_like(stored).index_copy(0, order.long(), stored)

    @property
    def n_codes(self) -> int:
        return len(self.index)

    def parameter_groups(self, rates: Rates) -> list[dict]:
        """For an optimiser."""
        size = float(self.scales.detach().abs().mean())
        tables = [{"params": [self.table], "lr": rates.codebook}] if self.learns_table else []
        return [*tables, {"params": [self.scales], "lr": rates.scale * size}]

    def penalty(self, step: int, steps: int) -> float:
        """Nothing beside the loss."""
        return 0.0

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
        this is the summed `proximal_gradient` of the jlcm pass, distances in eighths of the grid.
        """
        if self._gathered is None:
            return
        assert isinstance(self.encoding, Codebook)
        candidates, pull = self._neighbours(self.encoding)
        for start in range(0, len(self.index), 1 << 18):
            part = slice(start, start + (1 << 18))
            current = self.index[part]
            logits = torch.einsum("vkd,vd->vk", pull[current], self._gathered[part].float()) - 1
            best = logits.max(1)
            rows = (best.values > 0).nonzero().flatten()
            self.index[part][rows] = candidates[current[rows], best.indices[rows]].int()
            self._gathered[part][rows] = 0
            self.flipped += len(rows)

    def _neighbours(self, encoding: Codebook) -> tuple[Tensor, Tensor]:
        """Per codeword its nearest others (n, k), and how a move to each is pulled: (C_k − c)/‖·‖ · 1/(‖·‖/8 + δ)."""
        n_books, size = len(encoding.counts), encoding.table.shape[1]
        flat = self.grid(self.table)
        grid = flat.view(n_books, size, self.dim)
        distance = torch.cdist(grid, grid)
        distance.masked_fill_(distance == 0, torch.inf)
        near = distance.topk(min(self.neighbours, size - 1), largest=False)
        offset = (torch.arange(n_books) * size).view(-1, 1, 1)
        candidates = (near.indices + offset).flatten(0, 1)
        reach = near.values.flatten(0, 1).unsqueeze(2)
        pull = (flat[candidates] - flat.unsqueeze(1)) / reach / (reach / 8 + self.delta)
        return candidates, pull.nan_to_num(0.0)

    def result(self) -> Codebook | Affine:
        """What has been learned, as it is stored."""
        old = self.encoding
        bits = 16 if old.scales.row is None else 8
        learned = self.scales.detach()
        scales = Scales.of(learned.clamp_min(1e-8) if bits == 8 else learned, bits)
        if isinstance(old, Affine):
            return dataclasses.replace(old, scales=scales)
        table = self.grid(self.table.detach()).to(old.table.dtype).view(old.table.shape)
        codes = (self.index % old.table.shape[1]).view(old.codes.shape).int()
        return Codebook(old.shape, old.width, old.dim, old.group, codes, table, scales, old.counts, old.order)


class LearnedTable(nn.Module):
    """A refined table, both of whose grids learn."""

    def __init__(self, encoding: Refined) -> None:
        super().__init__()
        self.encoding = encoding
        self.inner, self.extra = (LearnedMatrix(half, 0.0, 1, 1.0) for half in (encoding.inner, encoding.extra))
        self.n_codes = self.flipped = 0

    def forward(self) -> Tensor:
        """The table (rows, columns)."""
        return self.inner().index_add(0, self.encoding.rows.long(), self.extra())

    def parameter_groups(self, rates: Rates) -> list[dict]:
        """For an optimiser."""
        return [*self.inner.parameter_groups(rates), *self.extra.parameter_groups(rates)]

    def penalty(self, step: int, steps: int) -> float:
        """Nothing beside the loss."""
        return 0.0

    def move(self) -> None:
        """Codes stay."""

    def result(self) -> Refined:
        """What has been learned, as it is stored."""
        return dataclasses.replace(self.encoding, inner=self.inner.result(), extra=self.extra.result())


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates: of codewords in grid steps, of scales relative to their mean, of norms and biases."""

    codebook: float
    scale: float
    dense: float


class Student(nn.Module):
    """A network whose encoded matrices are `LearnedMatrix`es or a pass's own `learners`, with open norms and biases."""

    def __init__(
        self, module: nn.Module, tensors: Mapping[str, EncodedTensor], mapping_rate: float,
        neighbours: int = 4, delta: float = 0.1, prefix: str = "", pruned: Collection[str] = (),
        learners: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.module, self.learned = module, {}
        self.layouts, self.dense, self.stored = {}, {}, {}
        parameters = dict(module.named_parameters())
        for name, parameter in ((f"{prefix}{name}", parameter) for name, parameter in parameters.items()):
            tensor = tensors[name]
            if isinstance(tensor.encoding, Refined):
                self.learned[name], self.layouts[name] = LearnedTable(tensor.encoding), tensor.layout
            elif isinstance(tensor.encoding, (Affine, Codebook)):
                self.learned[name] = (learners or {}).get(name) or LearnedMatrix(
                    tensor.encoding, mapping_rate, neighbours, delta, name in pruned
                )
                self.layouts[name] = tensor.layout
            elif tensor.encoding.kind == "dense" and parameter.dim() == 1:
                self.dense[name] = nn.Parameter(tensor.decode())
                self.stored[name] = tensor.encoding.parts()["weight"].dtype

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every open tensor by name, as a forward takes it."""
        found = {name: self.layouts[name].tensor(learned()).to(dtype) for name, learned in self.learned.items()}
        return found | {name: parameter.to(dtype) for name, parameter in self.dense.items()}

    def groups(self, rates: Rates) -> list[dict]:
        """Parameter groups of an optimiser."""
        groups = [{"params": list(self.dense.values()), "lr": rates.dense}]
        for learned in self.learned.values():
            groups += learned.parameter_groups(rates)
        return [group for group in groups if group["params"]]

    def penalty(self, step: int, steps: int) -> Tensor | float:
        """What the matrices ask for beside the loss, at a step; 0 of most."""
        return sum(learned.penalty(step, steps) for learned in self.learned.values()) / max(1, len(self.learned))

    @property
    def flipped_fraction(self) -> float:
        """Moves of codes so far over the number of codes."""
        n_codes = sum(learned.n_codes for learned in self.learned.values())
        return sum(learned.flipped for learned in self.learned.values()) / max(1, n_codes)

    def results(self) -> dict[str, EncodedTensor]:
        """What has been learned."""
        found = {name: EncodedTensor(learned.result(), self.layouts[name]) for name, learned in self.learned.items()}
        dense = self.dense.items()
        return found | {name: EncodedTensor.dense(parameter, self.stored[name]) for name, parameter in dense}


def distill(
    student: Student, batches: Callable[[int], tuple[dict[str, Tensor], Tensor]], teacher_head: Tensor, head: nn.Linear,
    steps: int, rates: Rates, dtype: torch.dtype, advance: Callable[[str], None],
) -> Iterator[dict[str, float]]:  # fmt: skip
    """`steps` of Adam on KL(original ‖ student) per token; yields {"step", "kl", "flipped_fraction"} every 10 steps.

    batches(i) gives the forward's arguments and the original's head inputs (tokens, width) of step i. Gradients of the
    logits, softmax(student) − softmax(original), are formed a few rows at a time.
    """
    optimiser = torch.optim.Adam(student.groups(rates), betas=(0.9, 0.95), fused=True)
    initial = [group["lr"] for group in optimiser.param_groups]
    teacher_table = teacher_head.to(dtype)
    names = [name for name, parameter in student.module.named_parameters() if parameter is head.weight]
    running, count = 0.0, 0
    for step in range(steps):
        _set_rates(optimiser, initial, _cosine(step, steps))
        arguments, teacher_rows = batches(step)
        weights = student.weights(dtype)
        hidden = _head_input(student, head, arguments, weights)
        table = weights.get(names[0], head.weight.to(dtype))
        rows = hidden.detach().flatten(0, -2)
        found = _divergence(rows, table.detach(), teacher_rows.to(dtype), teacher_table, table.requires_grad)
        outputs, gradients = [hidden], [found.to_rows.view_as(hidden).to(hidden.dtype)]
        if found.to_table is not None:
            outputs.append(table)
            gradients.append(found.to_table.to(dtype))
        torch.autograd.backward(outputs, gradients)
        loss = found.loss
        del weights, hidden, table, rows, found, outputs, gradients  # before the next step makes its own
        optimiser.step()
        optimiser.zero_grad()
        for learned in student.learned.values():
            learned.move()
        give_back()
        running, count = running + loss, count + 1
        advance(f"KL {loss:.3f}")
        if count == 10 or step == steps - 1:
            yield {"step": step + 1, "kl": running / count, "flipped_fraction": student.flipped_fraction}
            running, count = 0.0, 0


def _cosine(step: int, steps: int) -> float:
    """The share of the full rate: up over the first tenth, down to a twentieth along half a cosine."""
    return rate_share(step, steps, rise=steps // 10, floor=0.05)


def _set_rates(optimiser: torch.optim.Optimizer, initial: list[float], share: float) -> None:
    for group, rate in zip(optimiser.param_groups, initial, strict=True):
        group["lr"] = rate * share


def reconstruct(
    student: Student, prefix: str, forward: Callable[[nn.Module, int], Tensor], targets: list[Tensor],
    tokens: Tensor | None, channels: Tensor | None, steps: int, rates: Rates,
    make: Callable[[list[dict]], torch.optim.Optimizer] | None = None,
) -> dict[str, float]:  # fmt: skip
    """`steps` of Adam, or what `make` makes, on the block's output error, Σ_t a_t Σ_c b_c (y − ŷ)²_tc, a batch each.

    The tokens' weights a and the channels' b are the gradient of the final loss, so that the few massive activations,
    which are most of the plain squared error, do not hide the rest (BRECQ's diagonal Fisher, arXiv 2102.05426, in rank
    one). forward(module, i) runs the block on batch i; targets (…, width) are what the original's block gave.
    """
    groups = student.groups(rates)
    optimiser = make(groups) if make else torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    initial = [group["lr"] for group in optimiser.param_groups]
    starts = [0]
    for target in targets:
        starts.append(starts[-1] + target.shape[:-1].numel())
    losses = []
    for step in range(steps):
        _set_rates(optimiser, initial, min(1.0, 2.0 * (1 - step / steps)))
        i = step % len(targets)
        with torch.enable_grad():
            decoded = student.weights(torch.float32)
            open_weights = {name.removeprefix(prefix): tensor for name, tensor in decoded.items()}
            output = forward(_Calling(student.module, open_weights), i)
            error = (output - targets[i]).flatten(0, -2).pow(2)
            if channels is not None:
                error = error * channels
            error = error.mean(1)
            if tokens is not None:
                error = error * tokens[starts[i] : starts[i + 1]]
            loss = error.mean()
            losses.append(float(loss.detach()))
            (loss / max(losses[0], 1e-30) + student.penalty(step, steps)).backward()
        optimiser.step()
        optimiser.zero_grad()
        for learned in student.learned.values():
            learned.move()
    n = max(1, len(losses) // 4)
    ends = {"loss_before": sum(losses[:n]) / n, "loss_after": sum(losses[-n:]) / n}
    return ends | {"flipped_fraction": student.flipped_fraction}


class _Calling(nn.Module):
    """A module that computes with other weights."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["replaced"] = module, weights

    def forward(self, *args, **kwargs):
        return functional_call(self.inner, self.replaced, args, kwargs)


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


@dataclass(frozen=True)
class _Found:
    to_rows: Tensor
    to_table: Tensor | None
    loss: float


@torch.no_grad()
def _divergence(rows: Tensor, table: Tensor, teacher_rows: Tensor, teacher_table: Tensor, wants_table: bool) -> _Found:
    """∂KL/∂rows and, if wanted, ∂KL/∂table, of the mean over rows; the mean KL itself over a sample of them."""
    parts, total, counted = [], 0.0, 0
    to_table = torch.zeros(table.shape) if wants_table else None
    for part, original in zip(rows.split(_POSITIONS), teacher_rows.split(_POSITIONS), strict=True):
        target = functional.linear(original, teacher_table).float().softmax(-1)
        logits = functional.linear(part, table).float()
        log_q = logits[:_SAMPLED].log_softmax(-1)
        sample = target[:_SAMPLED]
        total += float((sample * (sample.clamp_min(1e-20).log() - log_q)).sum())
        counted += len(log_q)
        difference = (logits.softmax(-1).sub_(target) / len(rows)).to(table.dtype)
        parts.append((difference @ table).float())
        if to_table is not None:
            to_table += difference.T @ part
    return _Found(torch.cat(parts), to_table, total / counted)
