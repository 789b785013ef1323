"""Trellis codes: every setting as it was planned, error feedback, descent, and what they beat."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from compressor.core.contract import Statistics
from compressor.core.encoding import Codebook, describe, restore
from compressor.core.errors import PassError
from compressor.core.passes import Moves
from compressor.learning.learned import learnable
from compressor.ops.states import codes_of
from compressor.passes.jlcm import Jlcm
from compressor.passes.trellis import Trellis
from tests.pico import correlated, output_error

NAMES = {torch.uint8: "U8", torch.float16: "F16"}
SETTINGS = {
    "default": {},
    "two bits": {"width": 4},
    "three bits": {"width": 6, "window": 12},
    "a narrow window": {"width": 4, "window": 5},
    "three and a half bits": {"width": 7, "window": 11},
    "per row": {"group": "row"},
    "groups of 16": {"group": 16},
    "float scales": {"scale_bits": 16},
    "no descent": {"descent_rounds": 0},
}


def encoded(rows: int = 160, columns: int = 192, **settings) -> tuple[Codebook, float]:
    """The encoding of a matrix with correlated inputs, and its output's relative error."""
    weight, hessian = correlated(rows, columns)
    found = Trellis(**settings).encode(weight, Statistics(hessian), torch.Generator().manual_seed(0))
    return found, output_error(weight, found.decode(), hessian)


def naive_path(costs: torch.Tensor, width: int) -> list[int]:
    """The best states for costs (steps, states): each remembers the whole path that led to it."""
    n_states = costs.shape[1]
    paths = [[state] for state in range(n_states)]
    totals = costs[0].tolist()
    for row in costs[1:].tolist():
        met = []
        for state in range(n_states):
            before = [state >> width | code * (n_states >> width) for code in range(2**width)]
            best = min(before, key=totals.__getitem__)
            met.append((totals[best] + row[state], [*paths[best], state]))
        totals, paths = [total for total, _ in met], [path for _, path in met]
    return min(zip(totals, paths, strict=True))[1]


def naive_states(found: Codebook, weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Two columns at a time in float64: the path of least Σ (w − ŵ)(H⁻¹_JJ)⁻¹(w − ŵ)ᵀ; the rest makes up for it."""
    eye = torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian.double() + damping * hessian.double().diagonal().mean() * eye)
    current, scales, table = weight.double().clone(), found.scales.decode().double(), found.table[0].double()
    states = torch.empty(len(weight), weight.shape[1] // 2, dtype=torch.long)
    for j in range(states.shape[1]):
        here = [2 * j, 2 * j + 1]
        metric = torch.linalg.inv(inverse[here][:, here])
        gaps = current[:, None, here] - scales[:, j * 2 // found.group].view(-1, 1, 1) * table
        states[:, j] = torch.tensor(naive_path((gaps @ metric * gaps).sum(2), found.width))
        pull = metric @ inverse[here]
        current -= gaps[torch.arange(len(weight)), states[:, j]] @ pull
        inverse = inverse - inverse[:, here] @ pull
    return states


def test_paths_are_chosen_with_error_feedback():
    settings = {"width": 2, "window": 5, "group": 16, "descent_rounds": 0}
    weight, hessian = correlated(128, 32)
    found, error = encoded(128, 32, **settings)
    states = naive_states(found, weight, hessian, Trellis().damping)
    # A tie that float32 breaks the other way changes what comes after it.
    assert (found.index() == states).float().mean() > 0.97
    exact = dataclasses.replace(found, codes=codes_of(states, found.width, 5))
    assert error == pytest.approx(output_error(weight, exact.decode(), hessian), rel=0.02)


@pytest.mark.parametrize("shape", [(160, 192), (37, 101)], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_gives_the_parts_that_were_planned(name, shape):
    found, error = encoded(*shape, **SETTINGS[name])
    spec = Trellis(**SETTINGS[name]).spec_for("w", shape, "linear")
    parts = found.parts()
    assert {part: (NAMES[tensor.dtype], tuple(tensor.shape)) for part, tensor in parts.items()} == spec.parts(*shape)
    assert describe(found) == spec.describe(*shape)
    assert torch.equal(restore(describe(found), parts).decode(), found.decode())
    assert error < 0.2


def test_it_beats_vectors_of_as_many_bits():
    weight, hessian = correlated(1024, 512)
    vectors = Jlcm(width=10, dim=4).encode(weight, Statistics(hessian), torch.Generator().manual_seed(0))
    path, error = encoded(1024, 512)
    assert path.nbytes < 1.02 * vectors.nbytes
    assert error < 0.93 * output_error(weight, vectors.decode(), hessian)


def test_errors_are_made_up_for_in_the_columns_to_come():
    weight, hessian = correlated(160, 192)
    blind = Trellis(descent_rounds=0).encode(weight, Statistics(), torch.Generator())
    assert encoded(descent_rounds=0)[1] < 0.9 * output_error(weight, blind.decode(), hessian)


def test_each_round_of_descent_loses_less():
    losses = [encoded(descent_rounds=n)[1] for n in range(3)]
    assert losses[1] < 0.99 * losses[0]
    assert losses[2] <= losses[1]


def test_small_matrices_have_small_tables():
    assert encoded(32, 64)[0].table.shape == (1, 64, 2)
    assert encoded(160, 192)[0].table.shape == (1, 256, 2)
    assert Trellis().window_of((1536, 576)) == 12


def test_no_weight_was_dropped_before():
    weight, hessian = correlated(160, 192)
    with pytest.raises(PassError, match="a path cannot keep zeros"):
        Trellis().encode(weight, Statistics(hessian, kept=weight > 0), torch.Generator())


@pytest.mark.parametrize("settings", [{"width": 5, "window": 5}, {"width": 2, "window": 7}])
def test_a_window_is_of_two_or_three_codes(settings):
    with pytest.raises(ValidationError, match="write one of"):
        Trellis(**settings)


def test_scales_and_codewords_learn_and_paths_stay():
    found, _ = encoded()
    open_ = learnable(found, Moves(0.5))
    assert torch.equal(open_.result().decode(), found.decode())
    with torch.no_grad():
        open_.scales.mul_(1.5)
        open_.table.add_(1.0)
    open_().sum().backward()
    open_.move()
    changed = open_.result()
    assert torch.equal(changed.codes, found.codes)
    assert changed.window == found.window
    assert not torch.equal(changed.decode(), found.decode())
    torch.testing.assert_close(changed.decode(), open_().detach(), rtol=0.02, atol=1e-3)
