"""How well a network will train, told from one gradient per sample.

Zhang and Jia, "GradSign: Model Performance Inference with Theoretical Insights", ICLR 2022, arXiv 2110.08616.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def gradsign(gradients: Iterable[Tensor]) -> float:
    """Σ_θ |Σ_i sgn ∂ℓ(x_i)/∂θ|: (samples, …) per tensor; higher is better, between networks of one size."""
    return float(sum(gradient.sign().sum(0).abs().double().sum() for gradient in gradients))
