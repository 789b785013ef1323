"""GBLM: which weights to drop, by their gradient and their input (Das et al., arXiv 2311.04902), and its baselines.

    gblm        S_ij = |W_ij|·‖X_j‖₂ + α·|W_ij|·‖G_ij‖_p, gradients once on the dense network
    wanda       S_ij = |W_ij|·‖X_j‖₂ (Sun et al., arXiv 2306.11695)
    magnitude   S_ij = |W_ij|
    sparsegpt   S_ij = w²/U_jj², and the kept weights make up for the dropped (Frantar and Alistarh, arXiv 2301.00774)

The paper prints norms over all calibration samples; its code has the mean over sequences of Σ_tokens x² under the root.
So α = 100 means something else in each, and both are variants here. It belongs to 128 sequences: for another number
gradients are rescaled to what 128 would have given, which the paper does not say. `importance` allocates shares by
OWL's rule (Yin et al., arXiv 2310.05175).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compressor.core.contract import Pruned, PruningPass, Statistics
from compressor.ops.error_feedback import error_feedback, inverse_factor
from compressor.ops.masked_fit import masked_fit
from compressor.ops.sums import mean
from compressor.passes.settings.fields import whole_share
from compressor.passes.settings.gblm import SPARSEGPT_COLUMNS, GblmSettings

SEQUENCES = 128
"""That α belongs to."""
OUTLIER = 5.0
"""Times the mean score: OWL's M."""
SPREAD = 0.08
"""Half of the range of allocated shares: OWL's λ."""


def activation_norm(sequences: list[Tensor]) -> Tensor:
    """√a_j, a_j = mean over sequences of Σ_tokens x_j²: a list of (tokens, in) to (in,)."""
    return torch.stack([rows.pow(2).sum(0) for rows in sequences]).mean(0).sqrt()


def gradient_magnitude(gradients: Iterable[Tensor], p: int, alpha: float) -> Tensor:
    """Σ_n |α·g_n| (p = 1) or √Σ_n (α·g_n)² (p = 2): (out, in) each to (out, in), summed in float32 or finer."""
    total: Tensor | None = None
    for gradient in gradients:
        wide = alpha * gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        size = wide.abs() if p == 1 else wide.pow(2)
        total = size if total is None else total.add_(size)
    if total is None:
        raise ValueError("no gradients to sum; give at least one")
    return total if p == 1 else total.sqrt_()


def gblm_score(weight: Tensor, activation_norm: Tensor, gradient_magnitude: Tensor) -> Tensor:
    """|W|⊙√a + |W|⊙G: weight and G (out, in), √a (in,), to (out, in); G has α in it."""
    return weight.abs() * activation_norm + weight.abs() * gradient_magnitude


def wanda_score(weight: Tensor, activation_norm: Tensor) -> Tensor:
    """|W|⊙√a: (out, in) and (in,) to (out, in)."""
    return weight.abs() * activation_norm


def lowest(scores: Tensor, n: int) -> Tensor:
    """The `n` lowest of each row, bool like scores (rows, columns); of equal ones the first."""
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(n, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    room = n - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


def lowest_of_runs(scores: Tensor, n: int, m: int) -> Tensor:
    """The `n` lowest of every run of `m` columns of a row, of a shorter last run ⌊r·n/m⌋; bool like (rows, columns)."""
    whole = scores.shape[1] // m * m
    dropped = torch.zeros_like(scores, dtype=torch.bool)
    if whole:
        dropped[:, :whole] = lowest(scores[:, :whole].reshape(-1, m), n).view(len(scores), whole)
    if whole < scores.shape[1]:
        rest = scores[:, whole:]
        dropped[:, whole:] = lowest(rest, rest.shape[1] * n // m)
    return dropped


def sparsegpt_prune(weight: Tensor, hessian: Tensor, sparsity: float) -> Tensor:
    """Ŵ (out, in), pruned and updated, from W (out, in) and H = 2·mean xxᵀ (in, in), whose scale does not matter.

    Per 128 columns the ⌊n·s⌋ lowest w²/U_jj² of the n weights are dropped; then column by column
    w_{j:} −= (w_j − ŵ_j)/U_jj·U_{j,j:}, with U the upper Cholesky factor of H⁻¹.
    """
    return sparsegpt(weight, hessian, sparsity)[0]


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, run: tuple[int, int] | None = None, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """As `sparsegpt_prune`, also by N:M (`run`), chosen per row when a run begins; and the kept weights, bool.

    Inputs that never come (H_jj = 0) lose their weights first, and the others need not make up for them.
    """
    weight = weight.masked_fill(hessian.diagonal() == 0, 0.0)
    factor = inverse_factor(hessian, damping)
    spread, kept = factor.diagonal(), torch.ones_like(weight, dtype=torch.bool)
    step = SPARSEGPT_COLUMNS if run is None else run[1]
    buffer = max(step, SPARSEGPT_COLUMNS // step * step)

    def values(begin: int, current: Tensor, _: Tensor) -> Tensor:
        if begin % step == 0:
            scores = (current[:, :step] / spread[begin : begin + step]).pow(2)
            if run is None:
                dropped = lowest(scores.reshape(1, -1), whole_share(scores.numel(), sparsity)).view_as(scores)
            else:
                dropped = lowest_of_runs(scores, *run)
            kept[:, begin : begin + step] = ~dropped
        return current[:, :1] * kept[:, begin : begin + 1]

    return error_feedback(weight, factor, 1, values, buffer), kept


def outlier_fraction(scores: Tensor) -> float:
    """The share of scores (out, in) above 5 times their mean (OWL's layerwise outlier distribution)."""
    return float(mean((scores > OUTLIER * mean(scores)).float()))


def allocate(outliers: Mapping[str, float], shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
    """Shares to drop per matrix of shape (out, in): the more outliers, the less, as OWL has it.

    Kept shares are the outlier fractions, stretched to a range of 2λ and moved so that the mean over *weights* (OWL
    takes it over layers) is `sparsity`. A share is a whole number of a row's columns; what rounding leaves goes to the
    matrices that lost most by it.
    """
    least, most = min(outliers.values()), max(outliers.values())
    spread = min(SPREAD, sparsity / 2, (1 - sparsity) / 2)
    raw = {name: 2 * spread * (value - least) / max(most - least, 1e-12) for name, value in outliers.items()}
    sizes = {name: shapes[name][0] * shapes[name][1] for name in outliers}
    mean = sum(raw[name] * size for name, size in sizes.items()) / sum(sizes.values())
    exact = {name: (sparsity - raw[name] + mean) * shapes[name][1] for name in outliers}
    columns = {name: int(value) for name, value in exact.items()}
    left = sparsity * sum(sizes.values()) - sum(shapes[name][0] * n for name, n in columns.items())
    for name in sorted(exact, key=lambda name: (columns[name] - exact[name], name)):
        if shapes[name][0] <= left + 0.5 and columns[name] + 1 < shapes[name][1]:
            columns[name] += 1
            left -= shapes[name][0]
    return {name: n / shapes[name][1] for name, n in columns.items()}


class Gblm(GblmSettings, PruningPass):
    """Says which weights stay; see the module for the scores."""

    def prune(self, matrix: Tensor, known: Statistics) -> Pruned:
        """sparsegpt changes what it keeps as well; the others do not. Without a gradient gblm is Wanda; without a
        hessian every input counts the same."""
        weight = matrix.float()
        sparsity = self.sparsity if known.sparsity is None else known.sparsity
        if self.score == "sparsegpt":
            found = Pruned(*sparsegpt(weight, 2 * known.moment(weight.shape[1]), sparsity, self.run, self.damping))
        else:
            kept = ~self._dropped(self.scores(weight, known), sparsity)
            found = Pruned(weight * kept, kept)
        if self.reconstruct == "none" or known.hessian is None:
            return found
        return Pruned(masked_fit(weight, found.kept, known.hessian, self.damping), found.kept)

    def scores(self, weight: Tensor, known: Statistics) -> Tensor:
        """S (out, in); the lowest are dropped."""
        if self.score == "magnitude":
            return weight.abs()
        norm = torch.ones(weight.shape[1], device=weight.device)
        if known.hessian is not None:
            norm = (known.hessian.diagonal() * max(1, known.window)).sqrt()
        if self.variant == "paper":
            norm = norm * SEQUENCES**0.5
        if self.score == "wanda" or known.gradient is None:
            return wanda_score(weight, norm)
        more = SEQUENCES / max(1, known.n_sequences)
        return gblm_score(weight, norm, self.alpha * (more if self.p == 1 else more**0.5) * known.gradient)

    def outliers(self, matrix: Tensor, gradient: Tensor) -> float:
        """The `outlier_fraction` of |W|⊙G, both (out, in)."""
        return outlier_fraction(matrix.abs() * gradient)

    def allocate(self, outliers: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
        """The `sparsity` of each matrix for its Statistics, from the `outliers` of each."""
        if not self.allocates:
            return dict.fromkeys(outliers, self.sparsity)
        return allocate(outliers, shapes, self.sparsity)

    def _dropped(self, scores: Tensor, sparsity: float) -> Tensor:
        if self.run is not None:
            return lowest_of_runs(scores, *self.run)
        if self.score == "magnitude":
            return lowest(scores.reshape(1, -1), whole_share(scores.numel(), sparsity)).view_as(scores)
        return lowest(scores, whole_share(scores.shape[1], sparsity))
