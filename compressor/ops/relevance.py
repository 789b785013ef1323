"""Rules of layer-wise relevance propagation through one linear layer.

Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance propagation", PLOS
ONE 2015; Montavon et al., "Layer-wise relevance propagation: an overview", 2019, whose names of the rules these are.

A layer is given by `forward(x, w)`, linear in both, and by `backward(w, s)`, its transpose in x. So the same rule
serves matrices and convolutions. Relevance that bias terms would take stays with the inputs. sgn 0 is +1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-9
"""Added to denominators that a rule leaves bare: where one is 0 there is nothing to share out."""


def away_from_zero(z: Tensor, epsilon: float) -> Tensor:
    """z + ε·sgn z."""
    return z + torch.where(z >= 0, epsilon, -epsilon)


def epsilon_rule(
    forward: Forward, backward: Backward, x: Tensor, w: Tensor, r: Tensor, epsilon: float = 1e-6
) -> Tensor:
    """R_i = Σ_j x_i·w_ij / (z_j + ε·sgn z_j)·R_j."""
    return x * backward(w, r / away_from_zero(forward(x, w), epsilon))


def gamma_rule(forward: Forward, backward: Backward, x: Tensor, w: Tensor, r: Tensor, gamma: float = 0.25) -> Tensor:
    """As ε with ε → 0, of the weights w + γ·w⁺."""
    return epsilon_rule(forward, backward, x, w + gamma * w.clamp(min=0), r, TINY)


def alpha_beta_rule(
    forward: Forward, backward: Backward, x: Tensor, w: Tensor, r: Tensor, alpha: float = 2.0, beta: float = 1.0
) -> Tensor:
    """α times the shares of the positive products x_i·w_ij, less β times those of the negative; α − β = 1."""
    above, below = x.clamp(min=0), x.clamp(max=0)
    plus, minus = w.clamp(min=0), w.clamp(max=0)

    def shared(over: Tensor, under: Tensor) -> Tensor:
        """Of the products of positive inputs with `over` and of negative ones with `under`."""
        s = r / away_from_zero(forward(above, over) + forward(below, under), TINY)
        return above * backward(over, s) + below * backward(under, s)

    found = alpha * shared(plus, minus)
    return found - beta * shared(minus, plus) if beta else found


def zplus_rule(forward: Forward, backward: Backward, x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """The positive products only: α = 1, β = 0. For inputs of both signs x⁺w⁺ + x⁻w⁻."""
    return alpha_beta_rule(forward, backward, x, w, r, 1.0, 0.0)


def zbox_rule(
    forward: Forward, backward: Backward, x: Tensor, w: Tensor, r: Tensor, low: Tensor | float, high: Tensor | float
) -> Tensor:
    """x·w − low·w⁺ − high·w⁻, for inputs that lie in a box, as pixels do; bounds broadcast to x."""
    least, most = torch.zeros_like(x) + low, torch.zeros_like(x) + high
    plus, minus = w.clamp(min=0), w.clamp(max=0)
    z = forward(x, w) - forward(least, plus) - forward(most, minus)
    s = r / away_from_zero(z, TINY)
    return x * backward(w, s) - least * backward(plus, s) - most * backward(minus, s)


RULES: dict[str, Callable[..., Any]] = {
    "epsilon": epsilon_rule,
    "zplus": zplus_rule,
    "alpha_beta": alpha_beta_rule,
    "gamma": gamma_rule,
    "zbox": zbox_rule,
}
