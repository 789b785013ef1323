"""Learning: decoding is differentiated right, codes move where the proximal gradient points, distillation helps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressor.checkpoints import open_checkpoint
from compressor.core.contract import Statistics
from compressor.core.encoding import Affine, Binary, Codebook, Layout, Scales, describe
from compressor.core.passes import BlockLearning, Moves, Rates
from compressor.core.tensors import EncodedTensor
from compressor.graph.blocks import block_names
from compressor.learning.distillation import distill
from compressor.learning.head import Head
from compressor.learning.learned import LearnedCodebook, learnable
from compressor.learning.reconstruction import reconstruct
from compressor.learning.student import Student
from compressor.passes.affine import Affine as AffinePass
from compressor.passes.jlcm import Jlcm, codebook_gradient, proximal_gradient
from compressor.sweeps.survey import head_of
from tests import pico

ROWS, COLUMNS = 23, 50
SETTINGS = {
    "vectors": Jlcm(width=5, dim=4, group=16),
    "codebooks": Jlcm(width=3, dim=2, codebooks=3, group=32, scale_bits=16),
    "free": Jlcm(width=3, dim=2, grid="free", group="row"),
    "uniform": AffinePass(bits=3, group=16),
    "uniform, half": AffinePass(bits=2, group=32, zero="half", scale_bits=8),
    "uniform, zeros": AffinePass(bits=3, group=16, zero="learned"),
}


def encoded(name: str):
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    return SETTINGS[name].encode(weight, Statistics(hessian), torch.Generator().manual_seed(0))


def learned(name: str, mapping_rate: float = 0.0):
    return learnable(encoded(name), Moves(mapping_rate))


def same_parts(first, second) -> None:
    assert describe(first) == describe(second)
    for name, part in first.parts().items():
        assert torch.equal(part, second.parts()[name]), f"part {name} differs"


def naive_decode(encoding, table: torch.Tensor | None, scales: torch.Tensor) -> torch.Tensor:
    """Weight by weight in the dtype of `scales`, differentiable; rows in their own order."""
    rows, columns = encoding.shape
    lines: list[torch.Tensor | None] = [None] * rows
    book = [k for k, count in enumerate(getattr(encoding, "counts", (rows,))) for _ in range(count)]
    order = range(rows) if getattr(encoding, "order", None) is None else encoding.order.tolist()
    for stored, row in enumerate(order):
        values = []
        for column in range(columns):
            group = column // encoding.group
            if isinstance(encoding, Codebook):
                code = int(encoding.codes[stored, column // encoding.dim])
                value = table[book[stored], code, column % encoding.dim]
            else:
                zero = encoding.zero if isinstance(encoding.zero, float) else int(encoding.zero[stored, group])
                value = int(encoding.codes[stored, column]) - zero
            values.append(value * scales[stored, group])
        lines[row] = torch.stack(values)
    return torch.stack(lines)


@pytest.mark.parametrize("name", SETTINGS)
def test_forward_is_decode(name):
    matrix = learned(name)
    torch.testing.assert_close(matrix().detach(), matrix.encoding.decode(), rtol=0, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_decoding_in_float64(name):
    matrix = learned(name)
    encoding = matrix.encoding
    upstream = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    matrix().backward(upstream)
    scales = encoding.scales.decode().double().requires_grad_()
    table = encoding.table.double().requires_grad_() if isinstance(encoding, Codebook) else None
    naive_decode(encoding, table, scales).backward(upstream.double())
    torch.testing.assert_close(matrix.scales.grad.double(), scales.grad, rtol=1e-4, atol=1e-6)
    if table is not None:
        torch.testing.assert_close(matrix.table.grad.double(), table.grad.flatten(0, 1), rtol=1e-4, atol=1e-6)


def test_gradients_reach_a_transposed_layer():
    matrix = learned("vectors")
    x = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(2))
    weight = Layout((COLUMNS, ROWS), transposed=True).tensor(matrix())
    (x @ weight).pow(2).sum().backward()
    other = learned("vectors")
    functional.linear(x, other()).pow(2).sum().backward()
    torch.testing.assert_close(matrix.table.grad, other.table.grad, rtol=1e-4, atol=1e-6)


def test_the_tables_gradient_is_the_codebook_gradient_of_the_pass():
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    method = Jlcm(width=3, dim=1, group="row", scale_bits=16)
    encoding = method.encode(weight, Statistics(hessian), torch.Generator().manual_seed(0))
    matrix = LearnedCodebook(encoding, Moves())
    upstream = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    matrix().backward(upstream)
    scale = encoding.scales.decode().expand(ROWS, COLUMNS).flatten()
    expected = codebook_gradient(upstream.flatten(), encoding.codes.long().flatten(), 8, scale)
    torch.testing.assert_close(matrix.table.grad.flatten(), expected, rtol=1e-4, atol=1e-6)


def test_codewords_are_rounded_straight_through():
    matrix = learned("vectors")
    before = matrix().detach()
    with torch.no_grad():
        matrix.table += 0.3
    torch.testing.assert_close(matrix().detach(), before, rtol=0, atol=0)
    with torch.no_grad():
        matrix.table += 0.4
    assert not torch.equal(matrix().detach(), before)
    assert int(matrix.result().table.max()) <= 7


def one_dimensional(mapping_rate: float = 100.0, neighbours: int = 7) -> LearnedCodebook:
    """Codes 0 … 7 of a table with uneven gaps, one row each; scales 1."""
    table = torch.tensor([-8, -5, -4, -1, 0, 2, 6, 7], dtype=torch.int8).view(1, 8, 1)
    codes = torch.arange(8, dtype=torch.int32).repeat_interleave(2).view(16, 1)
    encoding = Codebook((16, 1), 3, 1, 1, codes, table, Scales.of(torch.ones(16, 1)), (16,))
    return LearnedCodebook(encoding, Moves(mapping_rate, neighbours))


def test_codes_move_to_where_the_summed_proximal_gradient_is_least():
    matrix = one_dimensional()
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(16, 1, generator=generator) for _ in range(3)]
    before = matrix.index.clone()
    for gradient in upstream:
        matrix().backward(gradient)
    matrix.move()
    codebook = matrix.encoding.table.float().flatten() / 8  # distances in eighths of the grid
    for row in range(16):
        steps = [
            proximal_gradient(codebook, int(before[row]), float(g[row] / g.pow(2).mean().sqrt()), 0.1) for g in upstream
        ]
        total = sum(steps)
        expected = int(total.argmin()) if float(total.min()) < -1 / 100 else int(before[row])
        assert int(matrix.index[row]) == expected, row
    assert matrix.flipped == int((matrix.index != before).sum()) > 8


def test_codes_wait_until_a_logit_overtakes_the_current_one():
    matrix = one_dimensional(mapping_rate=0.02)
    upstream = torch.full((16, 1), -1.0)
    moved_after = None
    for step in range(1, 60):
        matrix().backward(upstream)
        matrix.move()
        if matrix.flipped and moved_after is None:
            moved_after = step
    # The nearest codeword is at 1/8: 0.02·steps/(1/8 + 0.1) passes 1 with step 12.
    assert moved_after == 12


def test_a_mapping_rate_of_zero_leaves_the_codes():
    matrix = learned("vectors")
    matrix().sum().backward()
    matrix.move()
    assert matrix.flipped == 0
    assert torch.equal(matrix.result().codes, matrix.encoding.codes)


def test_codes_stay_in_the_codebook_of_their_row():
    matrix = learned("codebooks", mapping_rate=50.0)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        matrix().backward(torch.randn(ROWS, COLUMNS, generator=generator))
        matrix.move()
    book = torch.repeat_interleave(torch.arange(3), torch.tensor(matrix.encoding.counts)).unsqueeze(1)
    assert torch.equal(matrix.index.view(ROWS, -1) // 8, book.expand(ROWS, matrix.index.numel() // ROWS).int())
    assert matrix.flipped > 0
    torch.testing.assert_close(matrix.result().decode(), matrix().detach(), rtol=1e-3, atol=1e-6)


def test_copies_of_a_codeword_attract_nobody():
    matrix = one_dimensional()
    with torch.no_grad():
        matrix.table.zero_()
    matrix().backward(torch.ones(16, 1))
    matrix.move()
    assert matrix.flipped == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_without_a_step_the_result_is_the_encoding(name):
    same_parts(learned(name).result(), encoded(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_result_stores_what_was_learned(name):
    matrix = learned(name)
    with torch.no_grad():
        matrix.scales *= 1.25
        if isinstance(matrix.encoding, Codebook):
            matrix.table += 0.75
    torch.testing.assert_close(matrix.result().decode(), matrix().detach(), rtol=2e-3, atol=1e-5)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(48, 72), nn.LayerNorm(72), nn.Linear(72, 48, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


def student_of(module: nn.Module, settings, prefix: str = "", mapping_rate: float = 0.0) -> Student:
    """A student that starts from encoded matrices; the module itself is left with the decoded ones."""
    tensors = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            encoding = settings.encode(parameter.data, Statistics(), torch.Generator().manual_seed(0))
            tensors[f"{prefix}{name}"] = EncodedTensor(encoding, Layout(tuple(parameter.shape)))
        else:
            tensors[f"{prefix}{name}"] = EncodedTensor.dense(parameter.data, torch.float16)
        parameter.data = tensors[f"{prefix}{name}"].decode()
    return Student(module.requires_grad_(False), tensors, Moves(mapping_rate), prefix)


def test_a_students_results_are_its_tensors_where_nothing_was_learned():
    module = pico.lively(Layers(), 0)
    student = student_of(module, SETTINGS["vectors"], "blocks.3.")
    results = student.results()
    assert results.keys() == {f"blocks.3.{name}" for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(results[f"blocks.3.{name}"].decode(), parameter, rtol=0, atol=0)
    assert results["blocks.3.norm.weight"].encoding.parts()["weight"].dtype == torch.float16


RATES = Rates(codebook=0.03, scale=0.01, dense=1e-3)


@torch.no_grad()  # as the encoding sweep calls it
@pytest.mark.parametrize("name", ["vectors", "uniform"])
def test_reconstruction_nears_the_originals_output(name):
    module = pico.lively(Layers(), 0)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 30, 48, generator=generator) for _ in range(3)]
    targets = [module(x) for x in inputs]
    tokens, channels = torch.rand(180, generator=generator), torch.rand(48, generator=generator)
    student = student_of(module, SETTINGS[name], "b.", mapping_rate=0.02)

    def steps(student: Student, n: int, rates: Rates) -> dict[str, float]:
        learning = BlockLearning(n, rates)
        return reconstruct(
            student, "b.", lambda block, i: block(inputs[i]), targets, tokens, channels, learning,
            SETTINGS[name].optimiser,
        )  # fmt: skip

    # Every kind of parameter on its own has to lower the loss, or it does not learn.
    for rates in (RATES, dataclasses.replace(RATES, dense=1e-12), Rates(1e-12, 0.01, 1e-12)):
        learner = Student(module, student.results(), Moves(), "b.")
        found = steps(learner, 30, rates)
        assert found["loss_after"] < 0.95 * found["loss_before"]

    def loss(tensors) -> float:
        replaced = {name.removeprefix("b."): tensor.decode() for name, tensor in tensors.items()}
        total = 0.0
        for i, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            error = (torch.func.functional_call(module, replaced, (x,)) - y).pow(2).flatten(0, 1)
            total += float(((error * channels).mean(1) * tokens[60 * i : 60 * (i + 1)]).mean())
        return total

    before = loss(student.results())
    steps(student, 60, RATES)
    assert loss(student.results()) < 0.9 * before


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_distillation_lowers_the_divergence(tmp_path, tied):
    directory = pico.llama(tmp_path, tied)
    teacher, module = (open_checkpoint(directory).build("cpu").requires_grad_(False) for _ in range(2))
    batches = pico.token_batches(n_batches=4, size=4)
    rows = []
    head_of(teacher).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        originals = [teacher(**batch).logits.log_softmax(-1) for batch in batches]
    student = student_of(module, Jlcm(width=6, dim=2, group=16), mapping_rate=0.02)

    @torch.no_grad()
    def divergence() -> float:
        weights = {name: tensor.decode() for name, tensor in student.results().items()}
        total = 0.0
        for batch, original in zip(batches, originals, strict=True):
            logits = torch.func.functional_call(module, weights, (), batch).logits
            total += float(
                functional.kl_div(logits.log_softmax(-1), original, reduction="none", log_target=True).sum(-1).mean()
            )
        return total / len(batches)

    before = divergence()
    entries = list(
        distill(
            student, lambda i: (batches[i % 4], rows[i % 4]), Head(head_of(teacher).weight), head_of(module), 24, RATES,
            torch.float32, lambda note: None,
        )
    )  # fmt: skip
    assert [entry["step"] for entry in entries] == [10, 20, 24]
    assert divergence() < 0.8 * before
    assert 0 < student.flipped_fraction == entries[-1]["flipped_fraction"]
    assert all(not child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize("mapping_rate", [0.0, 0.02], ids=["codes stay", "codes move"])
def test_blocks_that_decode_when_they_are_due_learn_what_the_whole_network_learns(tmp_path, mapping_rate):
    checkpoint = open_checkpoint(pico.llama(tmp_path, tied=True))
    batches = pico.token_batches(n_batches=2, size=4)
    found = []
    for blocks in ((), block_names(checkpoint.build())):
        module = checkpoint.build("cpu").requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        rows = [
            torch.randn(batch["input_ids"].numel(), module.config.hidden_size, generator=generator) for batch in batches
        ]
        teacher = Head(head_of(module).weight.detach().clone())
        student = student_of(module, Jlcm(width=6, dim=2, group=16), mapping_rate=mapping_rate)
        entries = distill(
            student, lambda i, rows=rows: (batches[i % 2], rows[i % 2]), teacher, head_of(module), 12, RATES,
            torch.float32, lambda note: None, blocks,
        )  # fmt: skip
        found.append((list(entries), student.results()))
    (plain, whole), (streamed, parts) = found
    assert streamed == plain
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name].decode(), tensor.decode(), rtol=1e-5, atol=1e-7)


def test_affine_codes_and_zeros_stay(tmp_path):
    matrix = learned("uniform, zeros", mapping_rate=1.0)
    matrix().sum().backward()
    matrix.move()
    found = matrix.result()
    assert isinstance(found, Affine)
    assert torch.equal(found.codes, matrix.encoding.codes)
    assert torch.equal(found.zero, matrix.encoding.zero)


@pytest.mark.parametrize("rows", [1, ROWS], ids=["one scale", "a scale per row"])
def test_scales_of_signs_are_learned(rows):
    generator = torch.Generator().manual_seed(0)
    signs, scale = torch.rand(ROWS, COLUMNS, generator=generator) > 0.5, torch.rand(rows, 1, generator=generator) + 0.5
    matrix = learnable(Binary.of(signs, scale), Moves())
    upstream = torch.randn(ROWS, COLUMNS, generator=generator)
    matrix().backward(upstream)
    by_row = (upstream.double() * (2 * signs.double() - 1)).sum(1, keepdim=True)
    expected = by_row if rows > 1 else by_row.sum(0, keepdim=True)
    torch.testing.assert_close(matrix.scales.grad.double(), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        matrix.scales *= 1.25
    torch.testing.assert_close(matrix.result().decode(), matrix().detach(), rtol=1e-3, atol=1e-5)
    assert torch.equal(matrix.result().codes, signs)
