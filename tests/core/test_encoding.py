"""Encodings within encodings: nothing is lost beside the inner one, and the bytes are those of the plan."""

from __future__ import annotations

import pytest
import torch

from compressor.core.contract import Statistics
from compressor.core.encoding import Dense, Refined, Sparse, describe, restore
from compressor.core.spec import AffineSpec, CodebookSpec, DenseSpec, sparse_spec
from compressor.core.tensors import EncodedTensor, EncodedTensors, Layout, write_tensors
from compressor.passes.registry import load_pass
from compressor.passes.settings.affine import AffineSettings
from compressor.passes.settings.jlcm import JlcmSettings
from compressor.plan.recipe import Embeddings
from tests import pico
from tests.pretended_gpu import GPU, pretended_gpu

ROWS, COLUMNS = 29, 90
INNER = [
    AffineSettings(bits=8, group=64),
    AffineSettings(bits=4, group=32, zero="learned", scale_bits=8),
    AffineSettings(bits=3, group="row", method="gptq"),
    AffineSettings(bits=2, group=16, zero="learned"),
    JlcmSettings(width=3, dim=1, group=64),
    JlcmSettings(width=4, dim=1, group="row", grid="free"),
]


def pruned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight that is zero outside of its mask, the mask, and the inputs' second moment."""
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    mask = weight.abs() > weight.abs().median(1, keepdim=True).values
    return weight * mask, mask, hessian


def encoded(settings) -> Sparse:
    weight, mask, hessian = pruned()
    inner = load_pass(settings).encode(weight, Statistics(hessian, kept=mask), torch.Generator().manual_seed(3))
    return Sparse(inner.shape, inner)


@pytest.mark.parametrize("settings", INNER, ids=str)
def test_a_sparse_encoding_decodes_to_what_its_inner_one_does(settings, tmp_path):
    sparse = encoded(settings)
    layout = Layout((ROWS, COLUMNS))
    write_tensors(tmp_path / "t.safetensors", {"t": EncodedTensor(sparse, layout)})
    again = EncodedTensors([tmp_path / "t.safetensors"])["t"]
    assert again.encoding.kind == "sparse"
    assert torch.equal(again.decode(), sparse.inner.decode())
    assert describe(again.encoding) == describe(sparse)


@pytest.mark.parametrize("settings", INNER, ids=str)
def test_its_bytes_are_those_of_the_plan(settings):
    sparse = encoded(settings)
    kept = int(sparse.mask.sum())
    spec = sparse_spec(settings.spec_for("w", (ROWS, COLUMNS), "linear"), ROWS, COLUMNS, kept)
    assert spec.kind == "sparse"
    parts = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sparse.parts().items()}
    assert {name: shape for name, (_, shape) in parts.items()} == {
        name: shape for name, (_, shape) in spec.parts(ROWS, COLUMNS).items()
    }
    assert sparse.nbytes == spec.nbytes(ROWS, COLUMNS)
    assert {**spec.describe(ROWS, COLUMNS)} == describe(sparse)


@pytest.mark.parametrize("settings", [*INNER, None], ids=str)
def test_it_is_rebuilt_where_its_parts_lie(settings):
    plain = Sparse((ROWS, COLUMNS), Dense((ROWS, COLUMNS), pruned()[0].half()))
    sparse = plain if settings is None else encoded(settings)
    with pretended_gpu():
        again = restore(describe(sparse), {name: part.to(GPU) for name, part in sparse.parts().items()})
        assert again.decode().device == GPU
        assert torch.equal(again.decode().cpu(), sparse.decode())


def test_plain_values_are_kept_as_they_are():
    weight, mask, _ = pruned()
    sparse = Sparse((ROWS, COLUMNS), Dense((ROWS, COLUMNS), weight.half()))
    assert torch.equal(sparse.mask, mask)
    again = restore(describe(sparse), sparse.parts())
    assert torch.equal(again.decode(), weight.half().float())
    spec = sparse_spec(DenseSpec(dtype="F16"), ROWS, COLUMNS, int(mask.sum()))
    assert sparse.nbytes == spec.nbytes(ROWS, COLUMNS) < 2 * ROWS * COLUMNS


def test_codewords_of_several_weights_are_not_thinned():
    spec = CodebookSpec(width=8, dim=4)
    assert sparse_spec(spec, ROWS, COLUMNS, 10) is spec


def test_a_mask_that_costs_more_than_it_saves_is_left_out():
    spec = AffineSpec(bits=2, group=32)
    assert sparse_spec(spec, 64, 128, 64 * 128 * 6 // 10) is spec
    assert sparse_spec(spec, 64, 128, 64 * 128 * 4 // 10).kind == "sparse"


@pytest.mark.parametrize(
    "settings",
    [
        *INNER,
        AffineSettings(bits=4, group=32, method="hqq", zero="learned"),
        JlcmSettings(width=7, dim=2, group=64),
        JlcmSettings(width=9, dim=4, group=64),
        JlcmSettings(width=6, dim=4, group=64, codebooks=3),
        JlcmSettings(width=8, dim=4, group=32, feedback=False),
    ],
    ids=str,
)
def test_what_was_dropped_stays_dropped(settings):
    """And what was kept is still near, so that the passes do not simply drop the rest as well."""
    weight, mask, hessian = pruned()
    decoded = (
        load_pass(settings).encode(weight, Statistics(hessian, kept=mask), torch.Generator().manual_seed(3)).decode()
    )
    assert bool((decoded[~mask] == 0).all())
    error = float(torch.trace((decoded - weight) @ hessian @ (decoded - weight).T))
    assert error < 0.35 * float(torch.trace(weight @ hessian @ weight.T))


def test_codewords_find_the_pattern_of_two_in_four():
    """2:4 at 11 bits for four weights: six patterns and two values each, nearly as good as these values at 8 bits."""
    weight, hessian = pico.correlated(256, 128)
    kept = weight.abs().view(256, -1, 4).topk(2, 2).indices
    mask = torch.zeros(256, 32, 4, dtype=torch.bool).scatter_(2, kept, True).view(256, 128)
    weight = weight * mask
    method = load_pass(JlcmSettings(width=11, dim=4, group=64, kmeans_iterations=4, descent_rounds=0))
    encoding = method.encode(weight, Statistics(hessian, kept=mask), torch.Generator().manual_seed(3))
    decoded = encoding.decode()
    assert bool((decoded[~mask] == 0).all())
    assert float((decoded - weight).norm() / weight.norm()) < 0.15
    assert encoding.bits_per_weight < 2.75 + 0.3 + 8 * 4096 / (256 * 128)  # codes, scales, the table


def test_refined_rows_are_nearer_and_the_others_as_they_were(tmp_path, monkeypatch):
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    tables = Embeddings(bits=3, group=32, zero="learned", refined=5)
    spec = tables.spec("embed_tokens.weight", ROWS)
    first = load_pass(tables.method()).encode(weight, Statistics(hessian), torch.Generator())
    rows = torch.tensor([0, 4, 5, 20, 28])
    second = load_pass(tables.extra()).encode((weight - first.decode())[rows], Statistics(hessian), torch.Generator())
    refined = Refined((ROWS, COLUMNS), first, second, rows)
    write_tensors(tmp_path / "t.safetensors", {"t": EncodedTensor(refined, Layout((ROWS, COLUMNS)))})
    stored = EncodedTensors([tmp_path / "t.safetensors"])
    assert describe(stored["t"].encoding) == describe(refined) == spec.describe(ROWS, COLUMNS)
    with monkeypatch.context() as patch:  # whether it is there is told without reading it
        patch.setattr(EncodedTensors, "__getitem__", lambda *_: pytest.fail("was read"))
        assert [name in stored for name in ("t", "t.inner", "t.extra", "t.other", "u")] == [True] * 3 + [False] * 2
    assert {name: tuple(part.shape) for name, part in refined.parts().items()} == {
        name: shape for name, (_, shape) in spec.parts(ROWS, COLUMNS).items()
    }
    assert refined.nbytes == spec.nbytes(ROWS, COLUMNS)
    others = [row for row in range(ROWS) if row not in rows.tolist()]
    decoded = stored["t"].decode()
    assert torch.equal(decoded[others], first.decode()[others])
    lost = (decoded - weight)[rows].norm() / (first.decode() - weight)[rows].norm()
    assert lost < 0.25  # 4 bits of what error feedback left, which is not uniform
    assert torch.equal(stored["t.inner"].decode(), first.decode())
    assert torch.equal(stored["t.extra"].decode(), second.decode())


def test_tables_of_positions_are_not_refined():
    tables = Embeddings(bits=3, refined=5)
    assert tables.spec("model.embed_tokens.weight", 100).kind == "refined"
    assert tables.spec("transformer.wpe.weight", 100).kind == "affine"
    assert tables.spec("embeddings.position_embeddings.weight", 100).kind == "affine"
    assert tables.spec("model.embed_tokens.weight", 5).kind == "affine"


@pytest.mark.parametrize("settings", [*INNER, "refined"], ids=str)
def test_pieces_are_the_matrix_a_few_rows_at_a_time(settings, monkeypatch):
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    if settings == "refined":
        tables = Embeddings(bits=3, group=32, zero="learned", refined=3)
        first = load_pass(tables.method()).encode(weight, Statistics(hessian), torch.Generator())
        rows = torch.tensor([0, 8, 28])
        assert torch.equal(first.of_rows(rows), first.decode()[rows])
        second = load_pass(tables.extra()).encode((weight - first.decode())[rows], Statistics(), torch.Generator())
        whole = Refined((ROWS, COLUMNS), first, second, rows.int())
    else:
        whole = encoded(settings)
    expected = whole.decode()
    monkeypatch.setattr("compressor.core.encoding._ROWS", 8)
    pieces = [(rows, piece.clone()) for rows, piece in whole.pieces()]
    assert [rows.start for rows, _ in pieces] == [0, 8, 16, 24]
    assert torch.equal(torch.cat([piece for _, piece in pieces]), expected)
    assert torch.equal(whole.decode(), expected)
