"""ReSTE: networks of binary weights, and of binary inputs, by a straight-through estimator that grows steeper.

Wu, Zheng, Liu, Zheng, "Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary
Neural Networks Training", ICCV 2023, arXiv 2308.06689. The forward has sign(z), the backward the derivative of
f(z) = sgn(z)·|z|^(1/o): 0 beyond |z| = t, and below |z| = m, where it would grow without bound, the slope of the chord.
o goes from 1, where f is the identity, to o_end: early gradients are stable, late ones those of something like sign.

    Ŵ = sign(W)·mean|W|       the mean over the layer, or an output channel; gradients go through it as well

To compare: `ste`, 1 for |z| ≤ 1, as the authors' code has it; `ede`, the error decay estimator of IR-Net (Qin et al.,
CVPR 2020, arXiv 1909.10788), k·t·(1 − tanh²(t·z)).

As the authors' code, z of a weight is the weight itself (`unit: raw`). Weights of a trained network are mostly smaller
than m, where f is a line: its slope m^(1/o − 1) then merely raises their learning rate, to 4.6 times at o = 3. With
`unit: mean`, which is ours, z is in units of the layer's mean |W|, and f acts where it is curved.

Also ours: the training starts at the given network's weights and may learn from its predictions; the network keeps its
order of layers, where the authors put the non-linearity before the batch norm; inputs are compared with a threshold per
channel that starts at the channel's mean (`core/signing.py` says why), and z of an input is in units of the layer's
mean distance from it. o changes with every step, not every epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.core.contract import Statistics, TrainedPass
from compressor.core.encoding import Binary, Layout
from compressor.core.errors import CheckpointError
from compressor.core.follower import Follower
from compressor.core.signing import SIZE, THRESHOLD, SignedInputs, hard_sign, input_channels, sign_inputs
from compressor.core.structure import Layer, Outcome, Subject
from compressor.ops.sums import mean
from compressor.passes.settings.reste import ResteSettings

CUT, FLAT = 1.5, 0.1
"""t and m."""
SHARPNESS = (0.1, 10.0)
"""Of EDE's t, at the start and the end."""
_TINY = 1e-12


def exponent(progress: float, o_end: float = 3.0) -> float:
    """o = 1 + (1 − cos(π·progress/2))·(o_end − 1), progress 0 … 1."""
    return 1 + (1 - math.cos(math.pi * progress / 2)) * (o_end - 1)


def reste_slope(z: Tensor, o: float, t: float = CUT, m: float = FLAT) -> Tensor:
    """0 for |z| > t; (1/o)·|z|^((1−o)/o) for m < |z| ≤ t; m^(1/o − 1), the slope of the chord, for |z| ≤ m."""
    size = z.abs()
    curved = size.clamp_min(m).pow((1 - o) / o) / o
    return torch.where(size > m, curved, m ** (1 / o - 1)).masked_fill(size > t, 0.0)


def ste_slope(z: Tensor) -> Tensor:
    """1 for |z| ≤ 1, 0 beyond."""
    return (z.abs() <= 1).to(z.dtype)


def ede_slope(z: Tensor, progress: float) -> Tensor:
    """k·t·(1 − tanh²(t·z)), t from 0.1 to 10 along a geometric line, k = max(1/t, 1)."""
    low, high = SHARPNESS
    t = low * (high / low) ** progress
    return max(1 / t, 1.0) * t * (1 - (t * z).tanh().square())


class _Sign(torch.autograd.Function):
    """sign(z), sign(0) = +1; backward multiplies with slope(z)."""

    @staticmethod
    def forward(ctx, z, slope):
        ctx.save_for_backward(z)
        ctx.slope = slope
        return hard_sign(z)

    @staticmethod
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        return upstream * ctx.slope(ctx.saved_tensors[0]), None


def reste_sign(z: Tensor, o: float, t: float = CUT, m: float = FLAT) -> Tensor:
    """sign(z), with `reste_slope` for its derivative."""
    return _Sign.apply(z, lambda z: reste_slope(z, o, t, m))


def binary_weight(weight: Tensor, scale: str = "layer", sign: Callable[[Tensor], Tensor] = hard_sign) -> Tensor:
    """sign(W)·mean|W|, the mean over all of W, or with `scale` channel over each of its first dimension.

    Zeros count as positive.
    """
    return sign(weight) * _mean_size(weight, scale)


def _mean_size(weight: Tensor, scale: str) -> Tensor:
    size = weight.abs()
    return mean(size) if scale == "layer" else size.flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))


class Estimator(Follower):
    """The derivative of sign, as it is at this point of the training."""

    remembers = ("progress", "o")

    def __init__(self, settings: ResteSettings) -> None:
        self.settings, self.n_steps = settings, 1
        self.progress, self.o = 0.0, 1.0

    def step(self, number: int, before: Mapping[str, Tensor], rate: float) -> None:
        self.progress = (number + 1) / self.n_steps
        self.o = exponent(self.progress, self.settings.o_end)

    def entry(self) -> dict[str, float]:
        return {"o": round(self.o, 5)} if self.settings.estimator == "reste" else {}

    def sign(self, z: Tensor) -> Tensor:
        """sign(z), differentiable."""
        return _Sign.apply(z, self._slope)

    def _slope(self, z: Tensor) -> Tensor:
        if self.settings.estimator == "ste":
            return ste_slope(z)
        return reste_slope(z, self.o) if self.settings.estimator == "reste" else ede_slope(z, self.progress)


class Binarised(nn.Module):
    """A parametrization: what a layer computes with, from the weight that is learned."""

    def __init__(self, layout: Layout, settings: ResteSettings, estimator: Estimator) -> None:
        super().__init__()
        self.layout, self.settings, self.estimator = layout, settings, estimator

    def forward(self, weight: Tensor) -> Tensor:
        matrix = self.layout.matrix(weight)
        return self.layout.tensor(binary_weight(matrix, self.settings.scale, self._sign))

    def _sign(self, weight: Tensor) -> Tensor:
        """Its derivative is slope(W), or with unit mean slope(W / u) / u, u = mean|W| held fast."""
        if self.settings.unit == "raw":
            return self.estimator.sign(weight)
        return self.estimator.sign(weight / mean(weight.detach().abs()).clamp_min(_TINY))


class Reste(ResteSettings, TrainedPass):
    """A training of signs, and its result; see the module."""

    def encode(self, matrix: Tensor, known: Statistics, generator: torch.Generator) -> Binary:
        """The signs of a matrix (out, in) and their scale; exactly the matrix where it was trained so."""
        return Binary.of(matrix >= 0, _mean_size(matrix.double(), self.scale).view(-1, 1))

    def fit(self, subject: Subject) -> Outcome:
        """The network with binary weights in its layers, trained."""
        layers = [layer for layer in subject.layers() if not layer.reason]
        if not layers:
            reasons = "; ".join(dict.fromkeys(f"'{layer.name}' {layer.reason}" for layer in subject.layers()))
            raise CheckpointError(
                f"{type(subject.module).__name__}: reste finds no layer to binarise; {reasons or 'none is selected'}; "
                "select others, or leave the pass out"
            )
        teacher = None if self.loss == "labels" else copy.deepcopy(subject.module)
        estimator = Estimator(self)
        hooks = _measured(subject, layers) if self.activations == "binary" else []
        for hook in hooks:
            hook.sign = estimator.sign
        for layer in layers:
            parametrize.register_parametrization(layer.module, "weight", Binarised(layer.layout, self, estimator))
        trainer = subject.trainer(self, teacher)
        estimator.n_steps = trainer.n_steps
        log = trainer.train(estimator)
        for layer in layers:
            self._settle(layer)
        for hook in hooks:
            hook.sign = hard_sign
        dense = {layer.name: layer.reason for layer in subject.layers() if layer.reason}
        report = {"training": log, "binary": [layer.name for layer in layers], "dense": dense}
        return Outcome(subject.module, report | {"activations": self.activations, "estimator": self.estimator})

    @torch.no_grad()
    def _settle(self, layer: Layer) -> None:
        """The layer as it was, with the weight that will be stored."""
        parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=False)
        weight = layer.module.weight
        assert isinstance(weight, nn.Parameter)
        stored = self.encode(layer.layout.matrix(weight), Statistics(), torch.Generator())
        weight.copy_(layer.layout.tensor(stored.decode()))


@torch.no_grad()
def _measured(subject: Subject, layers: list[Layer]) -> list[SignedInputs]:
    """Hooks that binarise the layers' inputs, about the mean of each channel on the calibration data, in units of
    their mean distance from it. Both are those of the dense network."""
    places = {layer.name: input_channels(layer.module)[1] for layer in layers}
    means = _mean_inputs(subject, layers, lambda name, x: x.movedim(places[name], 0).flatten(1).mean(1))

    def distance(name: str, x: Tensor) -> Tensor:
        return mean((x.movedim(places[name], -1) - means[name]).abs()).view(1)

    sizes = _mean_inputs(subject, layers, distance)
    hooks = [sign_inputs(layer.module) for layer in layers]
    for layer in layers:
        layer.module.get_parameter(THRESHOLD).copy_(means[layer.name])
        layer.module.get_buffer(SIZE).copy_(sizes[layer.name].clamp_min(1e-6))
    return hooks


def _mean_inputs(
    subject: Subject, layers: list[Layer], measure: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:  # fmt: skip
    """The mean over calls of what `measure` says of each layer's input."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def measuring(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: found[name].append(measure(name, inputs[0]))

    handles = [layer.module.register_forward_pre_hook(measuring(layer.name)) for layer in layers]
    try:
        for batch in subject.batches:
            subject.call(batch)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, values in found.items() if not values]
    if silent:
        raise CheckpointError(
            f"'{silent[0]}': activations: binary puts signs before a layer's forward, and the network takes its weight "
            f"without calling it ({len(silent)} such layers); write skip: ['{silent[0]}'], or activations: float"
        )
    return {name: torch.stack(values).mean(0) for name, values in found.items()}
