"""Learned rounding: by the papers, on matrices whose sizes do not divide, and in whole runs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from compressor.core.contract import Statistics
from compressor.core.encoding import Codebook
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensors
from compressor.ops.descent import descend
from compressor.ops.uniform import Grid
from compressor.passes.affine import Affine
from compressor.passes.rounding import (
    Moments,
    RoundedMatrix,
    Rounding,
    beta_at,
    initial_v,
    learn,
    rounding_penalty,
    soft_rounding,
)
from compressor.run.pipeline import run
from tests import pico

ROWS, COLUMNS = 29, 90


def encoded(**settings):
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    return Rounding(**{"group": 32} | settings).encode(weight, Statistics(hessian), torch.Generator())


def error(encoding) -> float:
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    return pico.output_error(weight, encoding.decode(), hessian)


def test_the_worked_values():
    v = initial_v(torch.tensor([0.0, 0.25, 0.5, 0.75]))
    torch.testing.assert_close(v, torch.tensor([-2.3979, -0.8873, 0.0, 0.8873]), atol=1e-4, rtol=0)
    assert float(rounding_penalty(torch.tensor([0.25]), 2.0)) == pytest.approx(0.75)


def test_soft_rounding_by_the_paper():
    """h(V) = clip(σ(V)(ζ − γ) + γ, 0, 1), in float64, and its inverse at the start."""
    v = torch.linspace(-6, 6, 41, dtype=torch.float64)
    expected = [min(max(1.2 / (1 + math.exp(-float(x))) - 0.1, 0.0), 1.0) for x in v]
    torch.testing.assert_close(soft_rounding(v), torch.tensor(expected, dtype=torch.float64))
    remainders = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(soft_rounding(initial_v(remainders)), remainders)


def test_the_penalty_by_the_paper():
    h = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for beta in (2.0, 7.5, 20.0):
        expected = sum(1 - abs(2 * float(x) - 1) ** beta for x in h.flatten())
        assert float(rounding_penalty(h, beta)) == pytest.approx(expected)
    assert float(rounding_penalty(torch.tensor([0.0, 1.0]), 2.0)) == 0.0


def test_the_schedule_waits_a_fifth_of_the_steps_and_falls_from_twenty_to_two():
    found = [beta_at(step, 50) for step in range(50)]
    assert found[:10] == [None] * 10
    assert (found[10], found[49]) == (20.0, 2.0)
    falls = [before - after for before, after in itertools.pairwise(found[10:])]
    assert falls == pytest.approx([18 / 39] * 39)


def test_v_of_zero_and_more_rounds_up():
    weight = torch.tensor([[0.5, 0.25, -0.25, 1.0]])
    start = Grid(4, 4, "middle", 16).fit(weight)
    matrix = RoundedMatrix(start, (1, 4), Rounding(group=16, optimizer="adam"), None)
    low = (weight / start.scale + start.zero).floor()
    with torch.no_grad():
        matrix.v.copy_(torch.tensor([[0.0, -1e-6, 3.0, -3.0]]))
    expected = (low.clamp(0, 14) + torch.tensor([[1, 0, 1, 0]])).to(torch.uint8)
    assert torch.equal(matrix.result().codes, expected)


@pytest.mark.parametrize("optimizer", ["adam", "signsgd", "descent"])
@pytest.mark.parametrize(("start", "method"), [("nearest", "rtn"), ("feedback", "gptq")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_steps_are_the_start(optimizer, start, method, bits):
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    found = encoded(optimizer=optimizer, start=start, bits=bits, steps=0)
    plain = Affine(method=method, bits=bits, group=32).encode(weight, Statistics(hessian), torch.Generator())
    assert torch.equal(found.decode(), plain.decode())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learn": ["rounding", "scale"]},
        {"scale_bits": 8, "zero": "learned"},
        {"optimizer": "adam", "steps": 200},
        {"optimizer": "signsgd", "steps": 200},
        {"optimizer": "signsgd", "steps": 200, "learn": ["rounding", "scale", "zero"], "zero": "learned"},
    ],
    ids=str,
)
def test_learning_beats_rounding_to_nearest_and_its_start(bits, settings):
    nearest = error(encoded(bits=bits, start="nearest", steps=0, zero=settings.get("zero", "middle")))
    for start in ("nearest", "feedback"):
        before = error(encoded(bits=bits, start=start, **settings | {"steps": 0}))
        after = error(encoded(bits=bits, start=start, **settings))
        assert after <= before * (1 + 1e-6)
        assert after <= nearest * (1 + 1e-6)
    assert after < 0.8 * nearest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_error_feedback(bits):
    feedback = error(encoded(bits=bits, steps=0))
    assert error(encoded(bits=bits)) < 0.95 * feedback
    assert error(encoded(bits=bits, learn=["rounding", "scale"])) < 0.9 * feedback


def test_descent_by_the_definition():
    """One column at a time to the grid point of least loss, in float64 and by trying every point."""
    weight, hessian = pico.correlated(5, 24, seed=3)
    start = Grid(2, 8, "middle", 16).fit(weight)
    found = descend(start, hessian, weight @ hessian, 2)
    scale = start.scale.double().repeat_interleave(8, 1)
    codes = start.codes.double()
    w, h = weight.double(), hessian.double()

    def loss(trial: torch.Tensor) -> torch.Tensor:
        difference = (trial - 2) * scale - w
        return ((difference @ h) * difference).sum(1)

    for _ in range(2):
        for j in range(24):
            trials = []
            for q in range(4):
                trial = codes.clone()
                trial[:, j] = q
                trials.append(loss(trial))
            codes[:, j] = torch.stack(trials).argmin(0).double()
    assert float((found.codes.double() != codes).double().mean()) < 0.02  # ties in float32
    assert float(loss(found.codes.double()).sum()) == pytest.approx(float(loss(codes).sum()), rel=1e-3)


def test_the_loss_is_that_of_the_outputs():
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    other = weight + 0.01 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    loss = Moments(weight, hessian)
    difference = float(loss.rows(other).sum() - loss.rows(weight).sum())
    assert difference == pytest.approx(float(loss.size(other)), rel=1e-2)


def test_rows_never_end_worse_than_they_started():
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    settings = Rounding(group=32, bits=2, optimizer="signsgd", steps=30, rate=0.4)
    matrix, loss = settings.started(weight, Statistics(hessian)), Moments(weight, hessian)
    before = loss.rows(matrix.rounded())
    learn(matrix, loss)
    assert bool((loss.rows(matrix.rounded()) <= before).all())


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam", "steps": 30}, {"grid": "codebook", "bits": 3}], ids=str)
def test_what_is_masked_stays_zero(settings):
    weight, hessian = pico.correlated(ROWS, COLUMNS)
    mask = weight.abs() > weight.abs().median()
    found = Rounding(group=32, **settings).encode(weight * mask, Statistics(hessian, kept=mask), torch.Generator())
    assert bool((found.decode()[~mask] == 0).all())
    assert float((found.decode() - weight * mask).norm() / (weight * mask).norm()) < 0.4


def test_a_codebook_takes_levels_of_the_int4_grid():
    found = encoded(grid="codebook", bits=3)
    assert isinstance(found, Codebook)
    assert found.on_int4_grid
    assert len(set(found.table.flatten().tolist())) == 8
    assert error(found) <= error(encoded(grid="codebook", bits=3, steps=0)) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "codebook", "bits": 4}, "takes some of the 16 levels"),
        ({"grid": "codebook", "bits": 2, "zero": "learned"}, "grid codebook has no zero point"),
        ({"unit": "block"}, "optimizer descent moves codes"),
        ({"learn": ["rounding", "zero"], "optimizer": "adam"}, "the same for every group"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Rounding(**settings)


TAIL = """
embeddings: {bits: 32}
calibration: {tokens: 512, window: 64}
evaluation: {tokens: 256, window: 64, speed: false}
"""


@pytest.mark.parametrize("optimizer", ["adam", "signsgd"])
def test_a_block_learns_in_a_run(tmp_path, optimizer):
    """The unit is the block: codes differ from the start's, and the artifact proves itself."""
    llama, decoded = pico.llama(tmp_path / "llama"), []
    for steps in (0, 24):
        settings = f"bits: 3, group: 32, unit: block, optimizer: {optimizer}, steps: {steps}"
        recipe = tmp_path / f"{steps}.yaml"
        recipe.write_text(f"passes: [{{pass: rounding, {settings}}}]{TAIL}")
        artifact = run(RunOptions(model=str(llama), recipe=str(recipe), output=tmp_path / f"out{steps}"))
        decoded.append(EncodedTensors([tmp_path / f"out{steps}" / "model.safetensors"]))
        assert artifact.report["proof"]["exact"]["max_relative_error"] < 1e-3
    learning = artifact.report["learning"]
    assert all(entry["loss_after"] < entry["loss_before"] for entry in learning if "block" in entry)
    assert any(entry["flipped_fraction"] > 0 for entry in learning)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(decoded[0][name].decode(), decoded[1][name].decode())


def test_convolutions_learn_in_a_run(tmp_path, monkeypatch):
    """The recipe cnn-4bit on a network with depthwise convolutions: nearer to the original than rounding to nearest."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, n in (("calibration", 24), ("evaluation", 40)):
        np.savez(f"{name}.npz", image=generator.standard_normal((n, 3, 12, 12)).astype(np.float32))
    pico.write_state_dict(pico.ResNet, tmp_path / "model.pt")
    errors = []
    for steps in (0, 4):
        sets = (
            "calibration.samples=24",
            "calibration.correct_means=false",
            "evaluation.speed=false",
            "rounding.bits=3",
            "gates.promised_loss=null",
            f"rounding.steps={steps}",
        )
        if not steps:
            sets += ("rounding.start=nearest",)
        artifact = run(
            RunOptions(
                model="model.pt",
                recipe="cnn-4bit",
                arch="tests.pico:ResNet",
                data="calibration.npz",
                eval="evaluation.npz",
                output=tmp_path / f"out{steps}",
                sets=sets,
            )
        )
        assert artifact.report["proof"]["exact"]["max_relative_error"] < 1e-3
        errors.append(artifact.report["quality"]["mean_relative_error"])
    assert errors[1] < 0.8 * errors[0]
