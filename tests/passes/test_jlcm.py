"""JLCM: its gradients at their worked values, its codes against a float64 loop, every setting, and what it beats."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compressor.core.contract import Statistics
from compressor.core.encoding import describe, restore
from compressor.core.passes import Moves
from compressor.learning.learned import learnable
from compressor.passes.affine import Affine
from compressor.passes.jlcm import Jlcm, codebook_gradient, proximal_gradient
from tests.pico import correlated, output_error

CODEBOOK = torch.tensor([-1.0, 0.0, 0.5, 2.0])
ROWS, COLUMNS = 37, 100
NAMES = {torch.uint8: "U8", torch.uint16: "U16", torch.float16: "F16"}


def encoded(seed: int = 3, rows: int = ROWS, columns: int = COLUMNS, **settings):
    weight, hessian = correlated(rows, columns)
    return Jlcm(**settings).encode(weight, Statistics(hessian), torch.Generator().manual_seed(seed))


def same_parts(first, second) -> None:
    assert describe(first) == describe(second)
    assert first.parts().keys() == second.parts().keys()
    for name, part in first.parts().items():
        assert torch.equal(part, second.parts()[name]), f"part {name} differs"


def test_the_proximal_gradient_moves_to_the_nearest_codeword():
    gradient = proximal_gradient(CODEBOOK, 1, -1.0, 0.0)
    assert gradient.tolist() == [1.0, 0.0, -2.0, -0.5]
    assert CODEBOOK[gradient.argmin()] == 0.5
    usual = -1.0 * (CODEBOOK - CODEBOOK[1])
    assert CODEBOOK[usual.argmin()] == 2.0


@pytest.mark.parametrize("upstream", [0.7, -2.0])
@pytest.mark.parametrize("current", range(4))
def test_the_proximal_gradient_by_its_formula(current, upstream):
    found = proximal_gradient(CODEBOOK, current, upstream, 0.1)
    for k in range(4):
        gap = float(CODEBOOK[k] - CODEBOOK[current])
        sign = (gap > 0) - (gap < 0)
        assert float(found[k]) == pytest.approx(upstream * sign / (abs(gap) + 0.1) if k != current else 0.0)


def test_the_codebook_gradient_sums_over_what_maps_to_a_codeword():
    upstream, indices = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2, 0, 2, 3])
    assert codebook_gradient(upstream, indices, 5, 2.0).tolist() == [-4.0, 0.0, 3.0, 6.0, 0.0]
    scale = torch.tensor([1.0, 2.0, 4.0, 0.5])
    assert codebook_gradient(upstream, indices, 5, scale).tolist() == [-4.0, 0.0, 3.0, 1.5, 0.0]


def naive_codes(encoding, weight, hessian, damping):
    """Vector by vector in float64: the codeword of least (w − ŵ)(H⁻¹_JJ)⁻¹(w − ŵ)ᵀ; the rest makes up for it."""
    dim, columns = encoding.dim, encoding.codes.shape[1] * encoding.dim
    padded = torch.zeros(columns, columns, dtype=torch.float64)
    padded[: len(hessian), : len(hessian)] = hessian.double()
    padded.diagonal()[padded.diagonal() == 0] = 1.0
    inverse = torch.linalg.inv(padded + damping * padded.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    current = torch.zeros(len(weight), columns, dtype=torch.float64)
    current[:, : weight.shape[1]] = weight.double()
    codes = torch.empty(len(weight), columns // dim, dtype=torch.long)
    scales, table = encoding.scales.decode().double(), encoding.table.double()
    book = [k for k, count in enumerate(encoding.counts) for _ in range(count)]
    rows = encoding.order.tolist() if encoding.order is not None else list(range(len(weight)))
    for j in range(columns // dim):
        here = list(range(j * dim, (j + 1) * dim))
        metric = torch.linalg.inv(inverse[here][:, here])
        pull = metric @ inverse[here]
        for stored, row in enumerate(rows):
            scale = scales[stored, j * dim // encoding.group].clamp_min(1e-12)
            gaps = current[row, here] - scale * table[book[stored]]
            codes[stored, j] = ((gaps @ metric) * gaps).sum(1).argmin()
            current[row] -= gaps[codes[stored, j]] @ pull
        inverse = inverse - inverse[:, here] @ pull
    return codes


@pytest.mark.parametrize("settings", [{"width": 4, "dim": 2}, {"width": 5, "dim": 4, "codebooks": 3, "group": 16}])
def test_codes_are_assigned_with_error_feedback(settings):
    weight, hessian = correlated(ROWS, COLUMNS)
    found = encoded(**settings, descent_rounds=0)
    expected = naive_codes(found, weight, hessian, Jlcm().damping)
    # A tie that float32 breaks the other way changes the rest of its row.
    assert (found.codes == expected).float().mean() > 0.97
    exact = dataclasses.replace(found, codes=expected.int())
    assert output_error(weight, found.decode(), hessian) == pytest.approx(
        output_error(weight, exact.decode(), hessian), rel=0.02
    )


SETTINGS = {
    "default": {},
    "width 8, dim 4": {"width": 8},
    "1 bit": {"width": 1, "dim": 1},
    "3 bits": {"width": 3, "dim": 1},
    "pairs": {"width": 5, "dim": 2},
    "odd width": {"width": 7, "dim": 4},
    "codebooks": {"width": 4, "dim": 2, "codebooks": 4},
    "codebooks, per row": {"width": 4, "dim": 4, "codebooks": 5, "group": "row"},
    "more codebooks than rows": {"width": 2, "dim": 1, "codebooks": 99},
    "per row": {"width": 6, "dim": 4, "group": "row"},
    "groups of 16": {"width": 6, "dim": 2, "group": 16},
    "group beyond the columns": {"width": 6, "dim": 4, "group": 128},
    "float scales": {"width": 6, "dim": 2, "scale_bits": 16},
    "free": {"width": 4, "dim": 2, "grid": "free"},
    "no k-means": {"width": 6, "dim": 2, "kmeans_iterations": 0},
    "damped": {"width": 6, "dim": 2, "damping": 0.1},
    "no descent": {"width": 6, "dim": 2, "descent_rounds": 0},
}


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (5, 37)], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_gives_the_parts_that_were_planned(name, shape):
    weight, hessian = correlated(*shape)
    encoding = encoded(rows=shape[0], columns=shape[1], **SETTINGS[name])
    spec = Jlcm(**SETTINGS[name]).spec_for("w", shape, "linear")
    parts = encoding.parts()
    assert {part: (NAMES[tensor.dtype], tuple(tensor.shape)) for part, tensor in parts.items()} == spec.parts(*shape)
    assert describe(encoding) == spec.describe(*shape)
    torch.testing.assert_close(restore(describe(encoding), parts).decode(), encoding.decode(), rtol=0, atol=0)
    assert output_error(weight, encoding.decode(), hessian) < 0.45  # one bit of a Gaussian leaves 0.36


def test_settings_matter():
    default = encoded(width=6, dim=2).parts()
    for change in ({"kmeans_iterations": 0}, {"damping": 0.5}, {"group": 16}, {"codebooks": 2}, {"descent_rounds": 0}):
        changed = encoded(width=6, dim=2, **change).parts()
        assert any(name not in changed or not torch.equal(changed[name], part) for name, part in default.items())


def test_codewords_lie_on_the_int4_grid():
    table = encoded(width=6, dim=2, codebooks=3).table
    assert table.dtype == torch.int8
    assert (int(table.min()), int(table.max())) >= (-8, -8)
    assert int(table.max()) <= 7
    assert len(table.unique()) > 8


def test_free_codewords_lose_less():
    weight, hessian = correlated(64, 192)
    losses = {}
    for grid in ("free", "int4"):
        encoding = Jlcm(width=4, dim=2, grid=grid).encode(weight, Statistics(hessian), torch.Generator().manual_seed(0))
        losses[grid] = output_error(weight, encoding.decode(), hessian)
    assert losses["free"] < losses["int4"]


def test_reordered_rows_decode_to_their_own_places():
    kinds = torch.arange(ROWS) % 4
    generator = torch.Generator().manual_seed(0)
    sources = (
        lambda n: torch.randn(n, generator=generator),
        lambda n: torch.rand(n, generator=generator) - 0.5,
        lambda n: torch.randn(n, generator=generator) ** 3,
        lambda n: torch.randn(n, generator=generator).sign() + 0.1 * torch.randn(n, generator=generator),
    )
    weight = torch.stack([0.02 * sources[kind](COLUMNS) for kind in kinds.tolist()])
    encoding = Jlcm(width=4, dim=1, codebooks=4).encode(weight, Statistics(torch.eye(COLUMNS)), torch.Generator())
    assert sorted(encoding.order.tolist()) == list(range(ROWS))
    assert encoding.order.tolist() != list(range(ROWS))
    distance = torch.cdist(encoding.decode(), weight)
    assert distance.argmin(1).tolist() == list(range(ROWS))
    assert (distance.diagonal() < 0.25 * weight.norm(dim=1)).all()


def test_a_permutation_of_stored_rows_changes_nothing():
    encoding = encoded(width=4, dim=2, codebooks=4)
    shuffle = torch.cat([rows.flip(0) for rows in torch.arange(ROWS).split(encoding.counts)])
    scales = dataclasses.replace(
        encoding.scales, values=encoding.scales.values[shuffle], row=encoding.scales.row[shuffle]
    )
    moved = dataclasses.replace(encoding, codes=encoding.codes[shuffle], order=encoding.order[shuffle], scales=scales)
    torch.testing.assert_close(moved.decode(), encoding.decode(), rtol=0, atol=0)


def test_it_beats_rounding_to_nearest_at_more_bits():
    weight, hessian = correlated(192, 256)
    mine = Jlcm(width=8, dim=4, group=64).encode(weight, Statistics(hessian), torch.Generator().manual_seed(0))
    naive = Affine(method="rtn", bits=2, group=32).encode(weight, Statistics(hessian), torch.Generator())
    assert mine.bits_per_weight < naive.bits_per_weight
    assert output_error(weight, mine.decode(), hessian) < 0.6 * output_error(weight, naive.decode(), hessian)


@pytest.mark.parametrize("settings", [{}, {"scale_bits": 16}, {"codebooks": 3, "group": 32}, {"group": "row"}])
def test_each_round_of_descent_loses_less(settings):
    weight, hessian = correlated(ROWS, COLUMNS)
    losses = [
        output_error(weight, encoded(width=6, dim=2, descent_rounds=n, **settings).decode(), hessian) for n in range(4)
    ]
    assert losses[1] < 0.97 * losses[0]
    assert losses[3] <= losses[2] <= losses[1]


def test_descent_keeps_what_was_dropped():
    weight, hessian = correlated(ROWS, COLUMNS)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    losses = []
    for n in (0, 2):
        method = Jlcm(width=8, dim=4, group=32, descent_rounds=n)
        found = method.encode(weight * mask, Statistics(hessian, kept=mask), torch.Generator().manual_seed(0)).decode()
        assert (found[~mask] == 0).all()
        losses.append(output_error(weight * mask, found, hessian))
    assert losses[1] < losses[0]


def test_more_codebooks_and_more_bits_lose_less():
    weight, hessian = correlated(96, 128)

    def error(**settings):
        encoding = Jlcm(dim=2, **settings).encode(weight, Statistics(hessian), torch.Generator().manual_seed(0))
        return output_error(weight, encoding.decode(), hessian)

    assert error(width=6) < error(width=5) < error(width=4)
    assert error(width=4, grid="free", codebooks=8) < error(width=4, grid="free")


@pytest.mark.parametrize("settings", [{}, {"width": 5, "dim": 2, "codebooks": 3}])
def test_the_same_seed_gives_the_same_bytes_whatever_the_global_seed(settings):
    torch.manual_seed(1)
    first = encoded(**settings)
    torch.manual_seed(2)
    same_parts(first, encoded(**settings))


def test_a_dead_input_and_a_row_of_zeros_are_encoded():
    weight, hessian = correlated(ROWS, COLUMNS)
    hessian[3] = hessian[:, 3] = 0.0
    weight[4] = 0.0
    decoded = Jlcm(width=6, dim=2).encode(weight, Statistics(hessian), torch.Generator()).decode()
    assert decoded.isfinite().all()
    assert decoded[4].abs().max() < 1e-3


@pytest.mark.parametrize("settings", [{}, {"width": 4, "dim": 1, "codebooks": 3, "scale_bits": 16}])
def test_no_learning_step_gives_exactly_what_was_assigned(settings):
    encoding = encoded(**settings)
    same_parts(learnable(encoding, Moves(0.1)).result(), encoding)
