"""ReSTE against its definition and worked values, its baselines, and what it does to a network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressor.core.contract import Statistics
from compressor.core.encoding import Layout
from compressor.core.errors import CheckpointError
from compressor.core.signing import hard_sign, sign_inputs, signed_layers
from compressor.core.structure import Layer, Subject
from compressor.graph.blocks import layers
from compressor.learning.trainer import Fitting
from compressor.passes.reste import (
    Binarised,
    Estimator,
    Reste,
    binary_weight,
    ede_slope,
    exponent,
    reste_sign,
    reste_slope,
    ste_slope,
)
from tests.learning.training_case import EXAMPLE, examples, images, residual


def weights(*shape: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("z", "slope"), [(0.5, 0.52913), (1.0, 0.33333), (0.05, 4.64159), (1.6, 0.0), (-0.5, 0.52913), (-1.6, 0.0)]
)
def test_the_worked_slopes(z, slope):
    value = torch.tensor([z], requires_grad=True)
    reste_sign(value, 3.0).backward()
    assert float(value.grad) == pytest.approx(slope, abs=1e-5)


def test_the_worked_exponents():
    assert exponent(0.5, 3.0) == pytest.approx(1.58579, abs=1e-5)
    assert (exponent(0.0, 3.0), exponent(1.0, 3.0)) == (1.0, pytest.approx(3.0))


def test_the_sign_of_zero_is_positive():
    assert reste_sign(torch.tensor([-2.0, -0.0, 0.0, 1e-9]), 2.0).tolist() == [-1, 1, 1, 1]


@pytest.mark.parametrize(("o", "t", "m"), [(1.0, 1.5, 0.1), (1.7, 1.5, 0.1), (3.0, 1.2, 0.3)])
def test_the_gradient_by_the_paper(o, t, m):
    """A loop in float64: the slope of f is a difference quotient, below m that of the chord to (m, f(m))."""
    z = torch.tensor(
        [-2.0, -1.2, -0.7, -m, -m / 3, 0.0, m / 2, m * 1.01, 0.9, 1.19, 1.21, 1.49, 1.51], dtype=torch.float64
    )
    upstream = weights(len(z))
    given = z.clone().requires_grad_(True)
    (reste_sign(given, o, t, m) * upstream).sum().backward()

    def f(value: float) -> float:
        return math.copysign(abs(value) ** (1 / o), value)

    for at, g, found in zip(z.tolist(), upstream.tolist(), given.grad.tolist(), strict=True):
        slope = f(m) / m if abs(at) <= m else (f(at + 1e-6) - f(at - 1e-6)) / 2e-6
        assert found == pytest.approx(g * (0.0 if abs(at) > t else slope), rel=1e-6, abs=1e-12)


def test_at_the_start_reste_is_the_identity_within_t():
    z = torch.linspace(-2, 2, 41, dtype=torch.float64)
    assert torch.equal(reste_slope(z, 1.0), (z.abs() <= 1.5).double())
    assert torch.equal(ste_slope(z), (z.abs() <= 1).double())


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
def test_the_error_decay_estimator_by_the_paper(progress):
    """IR-Net, equations 10 and 11: g(x) = k·tanh(t·x)."""
    t = 10 ** (math.log10(0.1) + progress * (math.log10(10) - math.log10(0.1)))
    k = max(1 / t, 1)
    for at in (-1.3, -0.05, 0.0, 0.4, 2.0):
        wanted = (k * math.tanh(t * (at + 1e-6)) - k * math.tanh(t * (at - 1e-6))) / 2e-6
        found = ede_slope(torch.tensor([at], dtype=torch.float64), progress)
        assert float(found) == pytest.approx(wanted, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("scale", ["layer", "channel"])
@pytest.mark.parametrize("unit", ["raw", "mean"])
def test_the_gradient_of_a_binary_weight_by_the_paper(scale, unit):
    """∂L/∂W_ij = s_i·G_ij·f′(W_ij) + sgn(W_ij)·mean of G·sign(W) over what shares s_i: the scale is not held fast."""
    settings, (rows, columns) = Reste(scale=scale, unit=unit), (3, 7)
    estimator = Estimator(settings)
    estimator.n_steps = 10
    estimator.step(5, {}, 0.1)
    o = 1 + (1 - math.cos(math.pi * 0.6 / 2)) * 2
    assert estimator.entry() == {"o": pytest.approx(o, abs=1e-5)}
    weight, upstream = weights(rows, columns) * 0.4, weights(rows, columns, seed=5)
    given = weight.clone().requires_grad_(True)
    found = Binarised(Layout((rows, columns)), settings, estimator)(given)
    (found * upstream).sum().backward()
    values, grads = weight.tolist(), upstream.tolist()
    mean = sum(abs(v) for row in values for v in row) / (rows * columns)
    for i in range(rows):
        sharing = range(rows) if scale == "layer" else [i]
        n = len(sharing) * columns
        s = sum(abs(values[a][b]) for a in sharing for b in range(columns)) / n
        pull = sum(grads[a][b] * math.copysign(1, values[a][b]) for a in sharing for b in range(columns)) / n
        for j in range(columns):
            assert float(found[i, j].detach()) == pytest.approx(math.copysign(s, values[i][j]), rel=1e-12)
            u = mean if unit == "mean" else 1.0
            z = abs(values[i][j]) / u
            slope = 0.0 if z > 1.5 else z ** (1 / o - 1) / o if z > 0.1 else 0.1 ** (1 / o - 1)
            wanted = grads[i][j] * s * slope / u + pull * math.copysign(1, values[i][j])
            assert float(given.grad[i, j]) == pytest.approx(wanted, rel=1e-9)


def test_a_binary_weight_is_its_sign_times_its_mean_size():
    weight = torch.tensor([[[1.0, -3.0]], [[0.0, 2.0]]])
    assert binary_weight(weight).flatten().tolist() == [1.5, -1.5, 1.5, 1.5]
    assert binary_weight(weight, "channel").flatten().tolist() == [2.0, -2.0, 1.0, 1.0]


@pytest.mark.parametrize("scale", ["layer", "channel"])
def test_what_was_trained_is_stored_exactly(scale):
    method = Reste(scale=scale)
    first = method.encode(weights(5, 9).float(), Statistics(), torch.Generator())
    again = method.encode(first.decode(), Statistics(), torch.Generator())
    assert torch.equal(first.decode(), again.decode())
    assert first.nbytes == method.spec_for("w", (5, 9), "linear").nbytes(5, 9)


def test_signed_inputs_are_of_the_size_about_a_threshold_per_channel():
    layer = nn.Conv2d(3, 2, 1, bias=False)
    sign_inputs(layer)
    assert signed_layers(nn.Sequential(layer)) == ["0"]
    layer.input_threshold.data = torch.tensor([0.0, 1.0, -1.0])
    layer.input_size.fill_(0.5)
    x = images(4)
    wanted = torch.empty_like(x)
    for (n, c, i, j), value in zip(
        torch.cartesian_prod(*map(torch.arange, x.shape)).tolist(), x.flatten(), strict=True
    ):
        wanted[n, c, i, j] = 0.5 if value >= (0.0, 1.0, -1.0)[c] else -0.5
    torch.testing.assert_close(layer(x), functional.conv2d(wanted, layer.weight))


def subject(module: nn.Module, dense: tuple[str, ...] = ("stem", "head"), seed: int = 3) -> Subject:
    """A subject that has some layers stay dense."""

    def found() -> list[Layer]:
        return [
            Layer(name, each, Layout(tuple(each.weight.shape)), "stays" if name.startswith(dense) else "")
            for name, each in layers(module).items()
        ]

    return Subject(
        module, [{"": images(16, 8)}], None, None, torch.Generator(), lambda name: True, lambda share, note: None,
        lambda settings, teacher: Fitting(module, examples(), settings, seed, None, lambda share, note: None, teacher),
        found,
    )  # fmt: skip


SHORT = {"epochs": 12, "batch": 16, "rate": 0.05, "loss": "labels"}


def test_training_beats_rounding_to_signs():
    """The labels' loss of the network whose weights are merely replaced by signs, and after training so."""
    module, naive, data = residual(), residual(), examples()
    with torch.no_grad():
        for name, layer in layers(naive).items():
            if name.startswith("block"):
                layer.weight.copy_(binary_weight(layer.weight))
    outcome = Reste(**SHORT).fit(subject(module))
    losses = [float(functional.cross_entropy(each(data.inputs[""]), data.labels).detach()) for each in (naive, module)]
    assert losses[1] < 0.8 * losses[0]
    assert outcome.report["binary"] == ["block.0.weight", "block.3.weight"]
    assert outcome.report["dense"] == {"stem.0.weight": "stays", "head.weight": "stays"}
    assert [round(entry["o"], 2) for entry in outcome.report["training"]][-1] == 3.0
    for name, layer in layers(module).items():
        assert type(layer) in (nn.Conv2d, nn.Linear)  # no parametrization is left
        values = layer.weight.abs().unique()
        assert (len(values) == 1) == name.startswith("block")


@pytest.mark.parametrize("settings", [{"estimator": "ste"}, {"estimator": "ede"}, {"scale": "channel"},
                                      {"unit": "mean"}, {"activations": "binary"}, {"loss": "teacher"}])  # fmt: skip
def test_every_setting_learns_and_settles_at_what_is_stored(settings):
    module = residual()
    outcome = Reste(**(SHORT | settings)).fit(subject(module))
    log = outcome.report["training"]
    assert log[-1]["loss"] < log[0]["loss"]
    for layer in (module.block[0], module.block[3]):
        per_row = [row.abs().unique() for row in layer.weight]
        assert all(len(row) == 1 for row in per_row)
        assert (len(torch.cat(per_row).unique()) > 1) == (settings.get("scale") == "channel")
    assert signed_layers(module) == (["block.0", "block.3"] if settings.get("activations") else [])
    assert copy.deepcopy(module)(EXAMPLE).isfinite().all()


def test_thresholds_start_at_the_means_of_channels():
    module, dense = residual(), residual()
    batch = images(16, 8)
    method = Reste(**(SHORT | {"activations": "binary", "rate": 1e-12, "epochs": 1}))
    method.fit(subject(module))
    with torch.no_grad():
        reached = dense.stem(batch)
    means = reached.mean((0, 2, 3))
    torch.testing.assert_close(module.block[0].input_threshold.data, means)
    distance = (reached - means.view(1, -1, 1, 1)).abs().mean()
    torch.testing.assert_close(module.block[0].input_size, distance.view(1))
    hook = next(iter(module.block[0]._forward_pre_hooks.values()))
    assert hook.sign is hard_sign


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(CheckpointError, match="reste finds no layer to binarise; 'stem.0.weight' stays"):
        Reste(**SHORT).fit(subject(residual(), ("stem", "head", "block")))


def test_a_weight_that_is_taken_without_a_call_cannot_have_binary_inputs():
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return functional.conv2d(x, self.block.weight).mean((2, 3))

    with pytest.raises(CheckpointError, match=r"'block.weight': activations: binary puts signs before"):
        Reste(**(SHORT | {"activations": "binary"})).fit(subject(Sly()))
    assert Reste(**SHORT).fit(subject(Sly())).report["binary"] == ["block.weight"]
