"""Scores, masks and SparseGPT's update against loops in float64 written from their papers; every setting varied."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from compressor.core.contract import Statistics
from compressor.core.errors import RecipeError
from compressor.passes.gblm import (
    Gblm,
    activation_norm,
    allocate,
    gblm_score,
    gradient_magnitude,
    lowest,
    lowest_of_runs,
    outlier_fraction,
    sparsegpt,
    sparsegpt_prune,
    wanda_score,
)
from compressor.plan.recipe_file import load_recipe
from tests.pico import correlated, output_error

ROWS, COLUMNS = 21, 300  # crosses SparseGPT's blocks of 128 columns twice


def inputs(n_sequences: int = 5, tokens: int = 17, columns: int = COLUMNS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = torch.rand(columns, generator=generator) + 0.1
    return [size * torch.randn(tokens, columns, generator=generator) for _ in range(n_sequences)]


def gradients(n_sequences: int = 5, rows: int = ROWS, columns: int = COLUMNS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [1e-3 * torch.randn(rows, columns, generator=generator) for _ in range(n_sequences)]


def weight_and_statistics(p: int = 1, rows: int = ROWS, columns: int = COLUMNS) -> tuple[torch.Tensor, Statistics]:
    """A weight, and what a sweep would know of it: 5 sequences of 17 tokens."""
    weight, _ = correlated(rows, columns)
    tokens = torch.cat(inputs(columns=columns))
    gradient = gradient_magnitude(gradients(rows=rows, columns=columns), p, 1.0)
    return weight, Statistics(tokens.T @ tokens / len(tokens), gradient, 5, 17)


def by_the_paper(weight, sequences, samples, p: int, alpha: float, paper: bool = False):
    """S_ij = |W_ij|·‖X_j‖₂ + α·|W_ij|·‖G_ij‖_p; the authors' code divides Σx² by the number of sequences."""
    scores = torch.zeros_like(weight)
    for i, j in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        squares = sum(float(x) ** 2 for rows in sequences for x in rows[:, j])
        activation = math.sqrt(squares if paper else squares / len(sequences))
        values = [abs(float(gradient[i, j])) for gradient in samples]
        norm = sum(values) if p == 1 else math.sqrt(sum(value**2 for value in values))
        scores[i, j] = abs(float(weight[i, j])) * activation + alpha * abs(float(weight[i, j])) * norm
    return scores


def test_the_worked_values():
    sequences = [torch.tensor([[1.0, 0, 2], [1, 1, 0]]), torch.tensor([[2.0, 1, 0], [0, 0, 2]])]
    norm = activation_norm(sequences)
    torch.testing.assert_close(norm, torch.tensor([1.73205, 1.0, 2.0]), rtol=1e-5, atol=1e-5)
    weight = torch.tensor([[0.5, -1, 2], [-0.2, 0.3, 0.3]])
    expected = torch.tensor([[0.866025, 1, 4], [0.34641, 0.3, 0.6]])
    torch.testing.assert_close(wanda_score(weight, norm), expected, rtol=1e-5, atol=1e-5)
    _, kept = Gblm(score="wanda", sparsity=0.4).prune(
        weight, Statistics(sum(x.T @ x for x in sequences) / 4, n_sequences=2, window=2)
    )
    assert kept.tolist() == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize(("p", "alpha"), list(itertools.product((1, 2), (1.0, 100.0))))
def test_the_score_by_the_paper(p, alpha):
    weight = correlated(7, 13)[0].double()
    sequences, samples = [x.double() for x in inputs(columns=13)], [g.double() for g in gradients(rows=7, columns=13)]
    found = gblm_score(weight, activation_norm(sequences), gradient_magnitude(samples, p, alpha))
    torch.testing.assert_close(found, by_the_paper(weight, sequences, samples, p, alpha), rtol=1e-12, atol=1e-14)
    wanda = by_the_paper(weight, sequences, samples, p, 0.0)
    torch.testing.assert_close(wanda_score(weight, activation_norm(sequences)), wanda, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("p", "variant"), list(itertools.product((1, 2), ("reference", "paper"))))
def test_the_pass_scores_as_128_sequences_would(p, variant):
    """α belongs to 128 sequences: what five gave is scaled to what 128 such would have given."""
    weight, known = weight_and_statistics(p, 7, 13)
    samples = [g.double() for g in gradients(rows=7, columns=13)]
    found = Gblm(p=p, variant=variant, alpha=10.0).scores(weight, known).double()
    factor = 128 / 5 if p == 1 else math.sqrt(128 / 5)
    activation = math.sqrt(128 / 5) if variant == "paper" else 1.0
    sequences = [activation * x.double() for x in inputs(columns=13)]
    expected = by_the_paper(weight.double(), sequences, samples, p, 10 * factor, variant == "paper")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_sums_of_gradients_do_not_overflow():
    found = gradient_magnitude([torch.full((2, 3), 600.0, dtype=torch.float16)] * 4, 1, 100.0)
    torch.testing.assert_close(found, torch.full((2, 3), 240_000.0))
    with pytest.raises(ValueError, match="no gradients"):
        gradient_magnitude([], 1, 1.0)


def lowest_by_sorting(values: list[float], n: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (values[i], i))[:n])


@pytest.mark.parametrize("n", [0, 1, 17, 37])
def test_the_lowest_of_a_row_with_ties(n):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 5, (9, 37), generator=generator).float()  # nearly all are ties
    for row, found in zip(scores.tolist(), lowest(scores, n), strict=True):
        assert set(found.nonzero().flatten().tolist()) == lowest_by_sorting(row, n)


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 24), (4, 8, 24), (2, 4, 27), (1, 3, 20), (4, 8, 5)])
def test_the_lowest_of_runs(n, m, columns):
    scores = torch.randint(0, 4, (6, columns), generator=torch.Generator().manual_seed(1)).double()
    found = lowest_of_runs(scores, n, m)
    for row, dropped in zip(scores.tolist(), found, strict=True):
        expected = set()
        for begin in range(0, columns, m):
            run = row[begin : begin + m]
            count = n if len(run) == m else len(run) * n // m
            expected |= {begin + i for i in lowest_by_sorting(run, count)}
        assert set(dropped.nonzero().flatten().tolist()) == expected


def naive_sparsegpt(weight, hessian, sparsity, run=None):
    """Frantar and Alistarh, algorithm 1, column by column, each column's error straight to all that follow."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    n_rows, n_columns = weight.shape
    for j in range(n_columns):
        if hessian[j, j] == 0:
            hessian[j, j] = 1.0
            weight[:, j] = 0.0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(n_columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).T.contiguous()
    kept = torch.ones_like(weight, dtype=torch.bool)
    for j in range(n_columns):
        if run is None and j % 128 == 0:
            columns = range(j, min(j + 128, n_columns))
            entries = [(float(weight[i, k] / upper[k, k]) ** 2, i, k) for i in range(n_rows) for k in columns]
            for _, i, k in sorted(entries)[: int(len(entries) * sparsity)]:
                kept[i, k] = False
        if run is not None and j % run[1] == 0:
            columns = range(j, min(j + run[1], n_columns))
            for i in range(n_rows):
                entries = sorted((float(weight[i, k] / upper[k, k]) ** 2, k) for k in columns)
                for _, k in entries[: len(entries) * run[0] // run[1]]:
                    kept[i, k] = False
        error = (weight[:, j] - weight[:, j] * kept[:, j]) / upper[j, j]
        weight[:, j] *= kept[:, j]
        for k in range(j + 1, n_columns):
            weight[:, k] -= error * upper[j, k]
    return weight, kept


@pytest.mark.parametrize(("shape", "setting"), [
    ((21, 300), 0.5), ((5, 130), 0.3), ((40, 61), 0.7), ((21, 300), (2, 4)), ((9, 270), (4, 8)), ((7, 202), (2, 5)),
])  # fmt: skip
def test_sparsegpt_by_the_paper(shape, setting):
    weight, hessian = (tensor.double() for tensor in correlated(*shape))
    hessian[3] = hessian[:, 3] = 0.0  # an input that never comes
    run = setting if isinstance(setting, tuple) else None
    expected, kept = naive_sparsegpt(weight, hessian, setting, run)
    found, found_kept = sparsegpt(weight, hessian, 0.5 if run else setting, run)
    assert torch.equal(found_kept, kept)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    if run is None:
        torch.testing.assert_close(sparsegpt_prune(weight, hessian, setting), expected, rtol=1e-8, atol=1e-12)


def test_the_scale_of_the_hessian_does_not_matter_and_arguments_stay():
    weight, hessian = correlated(ROWS, COLUMNS)
    first = sparsegpt_prune(weight, hessian, 0.5)
    torch.testing.assert_close(sparsegpt_prune(weight, 2 * hessian, 0.5), first, rtol=1e-4, atol=1e-6)
    for found, kept in zip((weight, hessian), correlated(ROWS, COLUMNS), strict=True):
        assert torch.equal(found, kept)


EVERY = [
    {"score": score, "p": p, "variant": variant, **share}
    for score, p, variant, share in itertools.product(
        ("gblm", "wanda", "magnitude", "sparsegpt"), (1, 2), ("reference", "paper"),
        ({"sparsity": 0.29}, {"sparsity": 0.9}, {"pattern": "2:4"}, {"pattern": "4:8"}, {"pattern": "1:3"}),
    )
]  # fmt: skip


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (5, 37), (130, 3)])
def test_every_setting_keeps_as_many_as_it_says(shape):
    for settings in EVERY:
        method = Gblm(**settings)
        weight, known = weight_and_statistics(method.p, *shape)
        pruned, kept = method.prune(weight, known)
        assert int(kept.sum()) == method.kept(*shape), settings
        assert bool((pruned[~kept] == 0).all()), settings
        assert torch.equal(weight, correlated(*shape)[0]), settings
        if method.score != "sparsegpt":
            assert torch.equal(pruned[kept], weight[kept]), settings


def test_whole_numbers_are_not_lost_to_rounding():
    weight = torch.rand(3, 100)
    _, kept = Gblm(score="wanda", sparsity=0.29).prune(weight, Statistics(torch.eye(100)))
    assert kept.sum(1).tolist() == [71, 71, 71]


def test_rows_are_pruned_by_themselves_except_by_magnitude():
    weight, known = weight_and_statistics()
    weight = weight * torch.linspace(0.1, 3, ROWS).unsqueeze(1)
    counts = {score: Gblm(score=score).prune(weight, known)[1].sum(1) for score in ("gblm", "wanda", "magnitude")}
    assert (counts["gblm"] == COLUMNS // 2).all()
    assert (counts["wanda"] == COLUMNS // 2).all()
    assert counts["magnitude"][0] < COLUMNS // 4 < 3 * COLUMNS // 4 < counts["magnitude"][-1]


@pytest.mark.parametrize(
    "changed", [{"alpha": 0.0}, {"alpha": 1e4}, {"p": 2}, {"variant": "paper"}, {"score": "wanda"}]
)
def test_settings_of_the_score_matter(changed):
    weight, known = weight_and_statistics()
    first = Gblm().prune(weight, known)[1]
    assert not torch.equal(first, Gblm(**changed).prune(weight, known)[1])


def test_without_gradients_gblm_is_wanda():
    weight, known = weight_and_statistics()
    bare = Statistics(known.hessian, None, 5, 17)
    assert torch.equal(Gblm().prune(weight, bare)[1], Gblm(score="wanda").prune(weight, known)[1])
    for score in ("gblm", "wanda", "sparsegpt"):  # nor a hessian: rows by magnitude
        kept = Gblm(score=score).prune(weight, Statistics())[1]
        assert weight[kept].abs().mean() > 2 * weight[~kept].abs().mean()


def test_what_each_score_needs():
    data, both = frozenset({"data"}), frozenset({"data", "gradients"})
    assert [Gblm(score=score).needs for score in ("gblm", "wanda", "sparsegpt")] == [both, data, data]
    assert Gblm(score="magnitude").needs == frozenset()
    assert Gblm(score="magnitude", allocation="importance").needs == both
    assert [Gblm(p=2).gradient_norm, Gblm(score="wanda").gradient_norm] == [2, None]


def test_sparsegpt_beats_wanda_beats_magnitude_on_a_layers_output():
    weight, hessian = correlated(64, COLUMNS)
    known = Statistics(hessian, None, 5, 17)
    errors = [
        output_error(weight, Gblm(score=score).prune(weight, known)[0], hessian)
        for score in ("sparsegpt", "wanda", "magnitude")
    ]
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


@pytest.mark.parametrize("setting", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("score", ["gblm", "wanda", "magnitude", "sparsegpt"])
def test_kept_weights_make_up_for_the_dropped_ones_and_no_others_come_back(score, setting):
    weight, known = weight_and_statistics()
    plain = Gblm(score=score, **setting).prune(weight, known)
    found = Gblm(score=score, reconstruct="layer", damping=1e-3, **setting).prune(weight, known)
    assert torch.equal(found.kept, plain.kept) or score == "sparsegpt"  # whose choice hangs on the damping
    assert bool((found.matrix[~found.kept] == 0).all())
    assert output_error(weight, found.matrix, known.hessian) < 0.9 * output_error(weight, plain.matrix, known.hessian)
    assert "data" in Gblm(score=score, reconstruct="layer").needs


def test_weights_with_gradients_stay():
    """Where inputs are alike, what the loss depends on is kept."""
    weight = torch.ones(4, 40)
    gradient = torch.zeros(4, 40)
    gradient[:, ::2] = 1e-3
    _, kept = Gblm().prune(weight, Statistics(torch.eye(40), gradient, 128, 1))
    assert torch.equal(kept, gradient > 0)


def test_shares_keep_their_mean_and_follow_the_outliers():
    outliers = {"a": 0.01, "b": 0.05, "c": 0.02, "d": 0.011}
    shapes = {"a": (30, 50), "b": (64, 100), "c": (10, 333), "d": (200, 70)}
    for sparsity in (0.05, 0.5, 0.7, 0.99):
        shares = allocate(outliers, shapes, sparsity)
        dropped = {name: shares[name] * rows * columns for name, (rows, columns) in shapes.items()}
        total = sum(rows * columns for rows, columns in shapes.values())
        assert abs(sum(dropped.values()) - sparsity * total) <= 200  # a column of the matrix with most rows
        assert all(0 <= share <= 1 for share in shares.values())
        assert max(shares.values()) - min(shares.values()) <= 0.16 + 0.03
    shares = allocate(outliers, shapes, 0.5)
    assert shares["b"] < shares["c"] < shares["d"] <= shares["a"] + 0.02
    assert allocate({"a": 0.1}, {"a": (3, 10)}, 0.5) == {"a": 0.5}
    assert Gblm(sparsity=0.3).allocate(outliers, shapes) == dict.fromkeys(outliers, 0.3)
    assert Gblm(allocation="importance").allocate(outliers, shapes) == shares


def test_an_allocated_share_is_what_is_dropped():
    weight, known = weight_and_statistics()
    known = Statistics(known.hessian, known.gradient, 5, 17, 0.4)
    for score in ("gblm", "wanda", "magnitude", "sparsegpt"):
        kept = Gblm(score=score, allocation="importance").prune(weight, known)[1]
        assert abs(float(kept.float().mean()) - 0.6) < 0.001


def test_outliers_are_above_five_times_the_mean():
    scores = torch.ones(10, 10)
    scores[0, :3] = torch.tensor([100.0, 50.0, 2.0])
    assert outlier_fraction(scores) == pytest.approx(0.02)


@pytest.mark.parametrize(("settings", "message"), [
    ("pattern: '4:4'", "pattern 4:4 drops 4 of 4, which leaves nothing; write as 2:4"),
    ("pattern: '2:4', sparsity: 0.6", "pattern 2:4 is a sparsity of 0.5, not 0.6; leave one out"),
    ("pattern: '2:4', allocation: importance", "pattern 2:4 is the same share everywhere"),
    ("sparsity: 1.0", "sparsity is 1.0; it should be less than 1"),
    ("score: wandb", "score is 'wandb'; it should be 'gblm', 'wanda', 'magnitude' or 'sparsegpt'"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"passes: [{{pass: gblm, {settings}}}, {{pass: affine}}]\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
    with pytest.raises(ValidationError):
        Gblm(pattern="two:four")
