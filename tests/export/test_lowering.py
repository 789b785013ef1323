"""Every encoding, lowered for every operator and mode, computes in onnxruntime what `decode()` says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from compressor.core.encoding import Affine, Binary, Codebook, Dense, Encoding, Layout, Refined, Scales, describe
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.export.builder import GraphBuilder
from compressor.export.lowering import IR_VERSIONS, OPSETS, Lowering, form, least_version, refusal
from compressor.ops.widths import n_groups, rows_before

ROWS, COLUMNS = 52, 160


def affine(bits: int, group: int, zero: float | str = "middle", columns: int = COLUMNS, scale_bits: int = 16) -> Affine:
    generator = torch.Generator().manual_seed(bits + group)
    groups = n_groups(columns, group)
    codes = torch.randint(0, 2**bits, (ROWS, groups * group), generator=generator, dtype=torch.int32)
    scales = torch.rand(ROWS, groups, generator=generator) + 0.5
    if scale_bits == 16:
        scales *= torch.randn(ROWS, groups, generator=generator).sign()
    point = {"middle": 2.0 ** (bits - 1), "half": 2.0 ** (bits - 1) - 0.5}.get(zero, zero) if zero != "tensor" else (
        torch.randint(0, 2**bits, (ROWS, groups), generator=generator, dtype=torch.int32))  # fmt: skip
    return Affine((ROWS, columns), group, codes, Scales.of(scales, scale_bits), bits, point)


def codebook(
    width: int, dim: int, group: int = 32, books: int = 1, ordered: bool = False, free: bool = False,
    columns: int = COLUMNS,
) -> Codebook:  # fmt: skip
    generator = torch.Generator().manual_seed(width * 31 + dim)
    groups = n_groups(columns, group)
    codes = torch.randint(0, 2**width, (ROWS, groups * group // dim), generator=generator, dtype=torch.int32)
    table = torch.randint(-8, 8, (books, 2**width, dim), generator=generator).to(torch.int8)
    counts = tuple(ROWS // books + (1 if i < ROWS % books else 0) for i in range(books))
    scales = Scales.of(torch.randn(ROWS, groups, generator=generator))
    order = torch.randperm(ROWS, generator=generator) if ordered else None
    return Codebook(
        (ROWS, columns), width, dim, group, codes, table.half() / 3 if free else table, scales, counts, order
    )


def trellis(width: int, window: int, group: int = 32, columns: int = COLUMNS, free: bool = False) -> Codebook:
    generator = torch.Generator().manual_seed(width * 31 + window)
    groups, before = n_groups(columns, group), rows_before(width, window)
    codes = torch.randint(0, 2**width, (before + ROWS, groups * group // 2), generator=generator, dtype=torch.int32)
    table = torch.randint(-8, 8, (1, 2**window, 2), generator=generator).to(torch.int8)
    scales = Scales.of(torch.rand(ROWS, groups, generator=generator) + 0.5, 8)
    return Codebook(
        (ROWS, columns), width, 2, group, codes, table.half() / 3 if free else table, scales, (ROWS,), window=window
    )


def binary(per_row: bool) -> Binary:
    generator = torch.Generator().manual_seed(5)
    signs = torch.rand(ROWS, COLUMNS, generator=generator) > 0.5
    return Binary.of(signs, torch.rand(ROWS if per_row else 1, 1, generator=generator))


def dense(dtype: torch.dtype) -> Dense:
    return Dense((ROWS, COLUMNS), torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(6)).to(dtype))


def fine(bits: int, group: int, columns: int = COLUMNS) -> Affine:
    """Zero points of 8 bits over the range of codes."""
    encoding, steps = affine(bits, group, columns=columns), 2 ** (8 - bits)
    stored = torch.randint(0, 256, (ROWS, n_groups(columns, group)), generator=torch.Generator().manual_seed(bits))
    return replace(encoding, zero=stored / steps, zero_steps=steps)


def refined(bits: int, extra_bits: int) -> Refined:
    """Some rows with a second grid, the first and the last row among them."""
    extra, rows = affine(extra_bits, 32, "tensor"), torch.tensor([0, 3, 4, 17, ROWS - 1], dtype=torch.int32)
    n, zero = len(rows), extra.zero
    assert isinstance(zero, torch.Tensor)
    scales = Scales(extra.scales.values[:n] / 16)
    second = replace(extra, shape=(n, COLUMNS), codes=extra.codes[:n], scales=scales, zero=zero[:n])
    return Refined((ROWS, COLUMNS), affine(bits, 32, "tensor"), second, rows)


ENCODINGS: dict[str, Encoding] = {
    "float32": dense(torch.float32),
    "float16": dense(torch.float16),
    **{f"affine{bits}g{group}": affine(bits, group) for bits in (2, 3, 4, 8) for group in (16, 32, 64, 128)},
    **{f"affine{bits}whole": affine(bits, COLUMNS) for bits in (2, 3, 4, 8)},
    **{f"affine{bits}zeros": affine(bits, 32, "tensor") for bits in (2, 3, 4, 8)},
    **{f"affine{bits}zeros_g96": affine(bits, 96, "tensor") for bits in (2, 3, 4, 8)},
    **{f"affine{bits}half": affine(bits, 64, "half") for bits in (2, 3, 4)},
    **{f"affine{bits}odd": affine(bits, 53, columns=53) for bits in (2, 3, 4, 8)},
    **{f"affine{bits}fine": fine(bits, 32) for bits in (2, 3, 4)},
    **{f"affine{bits}fine_odd": fine(bits, 53, 53) for bits in (2, 3, 4)},
    "affine4fine_g96": fine(4, 96),
    "affine2zero1": affine(2, 32, 1.0),
    "affine3zero3": affine(3, 32, 3.0),
    "affine2rows51": replace(affine(2, 32), shape=(51, COLUMNS), codes=affine(2, 32).codes[:51],
                             scales=Scales(affine(2, 32).scales.values[:51])),
    "affine2rows8": affine(2, 64, scale_bits=8),
    "affine4rows8": affine(4, 32, scale_bits=8),
    **{
        f"codebook{width}x{dim}": codebook(width, dim)
        for width, dim in (
            (1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (4, 2), (5, 2), (6, 2), (8, 2), (3, 4), (4, 4), (8, 4),
            (7, 2), (9, 4), (10, 4), (11, 4), (12, 4), (16, 8),
        )
    },
    **{
        f"codebook{width}x{dim}books": codebook(width, dim, 64, 5, True)
        for width, dim in ((2, 1), (3, 1), (4, 2), (7, 2), (8, 4), (9, 4), (12, 4))
    },
    "codebook8x4ordered": codebook(8, 4, ordered=True),
    "codebook8x4whole": codebook(8, 4, COLUMNS),
    **{  # a whole row, which the kernel's block does not divide
        f"codebook{width}x{dim}row80": codebook(width, dim, 80, columns=80)
        for width, dim in ((3, 1), (4, 2), (5, 2), (6, 2), (7, 2), (8, 4), (9, 4), (12, 4))
    },
    "codebook6x2row108": codebook(6, 2, 108, 3, True, columns=108),
    **{
        f"trellis{width}w{window}": trellis(width, window)
        for width, window in ((2, 6), (4, 6), (4, 8), (4, 12), (5, 6), (5, 10), (5, 12), (6, 12), (7, 11), (7, 12))
    },
    "trellis5w12g64": trellis(5, 12, 64),
    "trellis5w12row108": trellis(5, 12, 108, 108),
    "refined3": refined(3, 4),
    "refined4": refined(4, 2),
    "binary": binary(True),
    "binary_one_scale": binary(False),
}  # fmt: skip


def graph_of(directory: Path, encoding: Encoding, operator: str, mode: str, layout: Layout | None = None):
    """(session, encoded tensor) of a graph with a single operator over tensor `w`."""
    tensor = EncodedTensor(encoding, layout or Layout(encoding.shape))
    write_tensors(directory / "model.safetensors", {"w": tensor})
    kind = ir.DataType.FLOAT if operator in ("matmul", "constant") else ir.DataType.INT64
    x = ir.Value(
        name="x", type=ir.TensorType(kind), shape=ir.Shape(["batch", "length", *([encoding.shape[1]] * (kind == 1))])
    )
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": OPSETS[mode], "com.microsoft": 1})
    builder = GraphBuilder(graph)
    lowering = Lowering(EncodedTensors([directory / "model.safetensors"]), builder, mode, True, directory)
    if operator == "matmul":
        y = lowering.matmul(x, "w")
    elif operator == "constant":
        y = builder.op("Identity", lowering.constant("w"))
    else:
        y = lowering.embedding(x, "w", tied=operator == "tied")
    y.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(y)
    lowering.close()
    ir.save(ir.Model(graph, ir_version=IR_VERSIONS[mode]), directory / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.optimized_model_filepath = str(directory / "optimised.onnx")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(directory / "model.onnx", options), tensor


def optimised_operators(directory: Path) -> list[str]:
    return [node.op_type for node in ir.load(directory / "optimised.onnx").graph]


def is_close(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["default", "compat", "standard"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_matmul_computes_with_the_decoded_matrix_and_folds_to_one_kernel(tmp_path, name, mode):
    encoding = ENCODINGS[name]
    if refusal(describe(encoding), "matmul", mode):
        pytest.skip(refusal(describe(encoding), "matmul", mode))
    session, tensor = graph_of(tmp_path, encoding, "matmul", mode)
    x = torch.randn(2, 3, encoding.shape[1], generator=torch.Generator().manual_seed(1))
    is_close(session.run(None, {"x": x.numpy()})[0], x @ tensor.decode().T)
    chosen = form(describe(encoding), mode)
    expected = "MatMulNBits" if chosen else "FusedMatMul" if mode != "standard" else "MatMul"
    beside = ["MatMul", "FusedMatMul", "Add"] if chosen and chosen.shifted else []
    if encoding.kind == "refined":
        expected, beside = "MatMulNBits", ["MatMulNBits", "Shape", "Expand", "ScatterElements"]
    assert sorted(optimised_operators(tmp_path)) == sorted([expected, *beside])


@pytest.mark.parametrize("operator", ["embedding", "tied"])
@pytest.mark.parametrize("mode", ["default", "compat", "standard"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_embedding_gives_the_decoded_rows(tmp_path, name, mode, operator):
    encoding = ENCODINGS[name]
    if refusal(describe(encoding), "embedding", mode):
        pytest.skip(refusal(describe(encoding), "embedding", mode))
    session, tensor = graph_of(tmp_path, encoding, operator, mode)
    ids = torch.tensor([[0, 3, 50], [50, 7, 7]])
    is_close(session.run(None, {"x": ids.numpy()})[0], tensor.decode()[ids])


@pytest.mark.parametrize("name", ENCODINGS)
def test_constant_folds_to_the_decoded_tensor(tmp_path, name):
    encoding = ENCODINGS[name]
    shape = (encoding.shape[0] // 13, 13, encoding.shape[1]) if encoding.shape[0] % 13 == 0 else (3, 17, COLUMNS)
    layout = Layout(shape) if name != "binary" else Layout((COLUMNS, ROWS), transposed=True)
    session, tensor = graph_of(tmp_path, encoding, "constant", "default", layout)
    found = session.run(None, {"x": np.zeros((1, 1, encoding.shape[1]), np.float32)})[0]
    is_close(found, tensor.decode())
    assert optimised_operators(tmp_path) in ([], ["Identity"])


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("operator", ["matmul", "constant"])
def test_scales_of_a_byte_stay_shares_of_their_row_where_there_is_a_single_one(tmp_path, n_rows, operator):
    whole = affine(4, COLUMNS, scale_bits=8)
    encoding = replace(whole, shape=(n_rows, COLUMNS), codes=whole.codes[:n_rows],
                       scales=Scales.of(whole.scales.decode()[:n_rows], 8))  # fmt: skip
    session, tensor = graph_of(tmp_path, encoding, operator, "default")
    x = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1))
    found = session.run(None, {"x": x.numpy()})[0]
    is_close(found, x @ tensor.decode().T if operator == "matmul" else tensor.decode())


@pytest.mark.parametrize(
    ("encoding", "operator", "mode", "reason"),
    [
        (codebook(8, 4, free=True), "matmul", "default", "free codewords only with --format safetensors"),
        (codebook(8, 4, free=True), "constant", "default", None),
        (affine(8, 32), "matmul", "compat", "8 bits crawl or fail in onnxruntime before 1.22"),
        (affine(8, 32, "half"), "matmul", "default", "a zero point of 127.5 at 8 bits has no kernel"),
        (affine(4, 24), "matmul", "default", "groups of 24 columns are no multiple of 16"),
        (affine(4, 24), "constant", "default", None),
        (trellis(5, 10), "embedding", "default", "a trellis cannot be read row by row"),
        (trellis(5, 10, free=True), "matmul", "default", "free codewords only with --format safetensors"),
        (codebook(5, 1), "matmul", "default", "single-weight codebooks have at most 4 bits"),
    ],
)
def test_refusals_state_their_reason(encoding, operator, mode, reason):
    found = refusal(describe(encoding), operator, mode)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_the_least_version_is_that_of_the_newest_kernel():
    four, two = describe(affine(4, 32)), describe(affine(2, 32))
    assert [least_version([four], mode) for mode in ("default", "compat", "standard")] == ["1.23", "1.20", "1.24"]
    assert [least_version([four, two], mode) for mode in ("default", "compat", "standard")] == ["1.29", "1.20", "1.29"]


def test_large_tensors_are_looked_up_in_pieces(tmp_path, monkeypatch):
    def n_nodes() -> int:
        return len(ir.load(tmp_path / "model.onnx").graph)

    whole = {}
    for name in ("codebook8x4books", "codebook9x4books", "affine3g32", "float16", "trellis5w12"):
        graph_of(tmp_path, ENCODINGS[name], "matmul", "default")
        whole[name] = n_nodes()
    monkeypatch.setattr("compressor.export.parts.FOLD_LIMIT", 4096)
    monkeypatch.setattr("compressor.export.lowering.FOLD_LIMIT", 4096)
    for name, n in whole.items():
        session, tensor = graph_of(tmp_path, ENCODINGS[name], "matmul", "default")
        assert n_nodes() > n, name
        x = torch.randn(1, 2, COLUMNS, generator=torch.Generator().manual_seed(1))
        is_close(session.run(None, {"x": x.numpy()})[0], x @ tensor.decode().T)
