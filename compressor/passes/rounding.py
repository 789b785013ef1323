"""Learned rounding: each weight goes to one of its two neighbours on the grid, whichever serves the layer's output.

AdaRound (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568), equations 21
to 25; BRECQ (Li et al., arXiv 2102.05426) for `unit: block`; SignRound (Cheng et al., "Optimize
Weight Rounding via Signed Gradient Descent", arXiv 2309.05516) for `optimizer: signsgd`. What is open to choice follows
Yvinec et al. (arXiv 2308.07662): the loss, the degrees of freedom, the grid, the variable and the optimiser.

Where this leaves the papers: rounding may start from error feedback (GPTQ), that is from the weight with the errors of
the columns before it fed forward; a weight beyond the grid may come one step inward; the loss counts as a share of
the start's, so that `penalty` means the same everywhere; a layer's inputs are those behind the compressed prefix on
both sides, and no activation follows, so that the squared error over all calibration rows comes from second moments,
tr(ŴHŴᵀ) − 2·tr(WHŴᵀ), in place of a sum over minibatches; and a matrix row (an output) that ends with a larger loss
than it started with goes back to its start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.contract import Learnable, Statistics, WeightPass
from compressor.core.encoding import Affine, Codebook, Scales
from compressor.core.passes import Rates
from compressor.core.spec import group_columns
from compressor.ops.descent import descend
from compressor.ops.error_feedback import inverse_factor
from compressor.ops.uniform import Fitted, Grid, LevelGrid, stored_scale
from compressor.passes.settings.rounding import RoundingSettings

ZETA, GAMMA = 1.1, -0.1
_WARM_UP = 0.2
_BETAS = (20.0, 2.0)
_SHRINK = (0.5, 1.5)


def initial_v(remainder: Tensor) -> Tensor:
    """V₀ = −ln(1.2/(r + .1) − 1), so that h(V₀) = r; remainders r = W/s − ⌊W/s⌋ in [0, 1], any shape."""
    return -torch.log((ZETA - GAMMA) / (remainder - GAMMA) - 1)


def soft_rounding(v: Tensor) -> Tensor:
    """h(V) = clip(1.2·σ(V) − .1, 0, 1), the rectified sigmoid (AdaRound, equation 23): from down, 0, to up, 1."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """Σ (1 − |2h − 1|^β), a scalar (AdaRound, equation 24): 0 where every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def beta_at(step: int, steps: int) -> float | None:
    """β of a step in 0 … steps − 1: none, and no penalty, in the first fifth; then from 20 to 2 in a straight line."""
    warm = int(_WARM_UP * steps)
    if step < warm:
        return None
    first, last = _BETAS
    return first + (last - first) * (step - warm) / max(1, steps - 1 - warm)


class SignDescent(torch.optim.SGD):
    """p ← p − rate·sgn(∂ℓ/∂p)."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.sign_()
        return super().step(closure)


def optimiser_of(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """By the name that settings have for it."""
    return SignDescent(groups) if name == "signsgd" else torch.optim.Adam(groups, fused=True)


class RoundedMatrix(Learnable):
    """One matrix (rows, columns) whose weights choose between two neighbours on their grid: ŵ = s·(low + gap·h − z).

    adam      h is soft, the rectified sigmoid of V, and hard in the end
    signsgd   h is hard in every step, the position on the grid + V rounded, V in [−½, ½]; gradients pass straight
              through, and a learned scale moves the position
    `v` (rows, columns padded to whole groups), `factor` and `shift` (rows, n_groups): of the scale, and of the zero.
    """

    def __init__(self, start: Fitted, shape: tuple[int, int], settings: RoundingSettings, mask: Tensor | None) -> None:
        super().__init__()
        self.start, self.shape, self.settings = start, shape, settings
        padding = start.due.shape[1] - shape[1]
        self.mask = None if mask is None else functional.pad(mask, (0, padding), value=True)
        learn = settings.learn
        self.soft = settings.optimizer == "adam" and "rounding" in learn
        self.factor = nn.Parameter(torch.ones_like(start.scale), requires_grad="scale" in learn)
        self.shift = nn.Parameter(torch.zeros_like(start.zero), requires_grad="zero" in learn)
        with torch.no_grad():
            scale, zero = self._grid()
            self._low, self._gap, share = self._place(self._position(scale, zero))
            up = start.codes > start.code_of(self._low)
            first = initial_v(share) if self.soft else torch.zeros_like(share)
            if self.soft:
                first = torch.where(up, first.clamp_min(0), first.clamp_max(-1e-6))
            else:
                first = torch.where(up == (share >= 0.5), first, torch.where(up, 1e-3, -1e-3))
        self.v = nn.Parameter(first, requires_grad="rounding" in learn)

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ŵ (rows, columns), differentiable."""
        scale, zero = self._grid()
        if self.soft:
            values = self._low + self._gap * soft_rounding(self.v)
        else:
            position = self._position(scale, zero)
            smooth = self.start.clamp(position + self._gap * self.v)
            values = smooth + (self._hard(position.detach()) - smooth).detach()
        return self._whole(values, scale, zero).to(dtype)

    def rounded(self) -> Tensor:
        """Ŵ (rows, columns) as it will be stored."""
        with torch.no_grad():
            scale, zero = self._grid()
            return self._whole(self._hard(self._position(scale, zero)), scale, zero)

    def penalty(self, step: int, steps: int) -> Tensor | float:
        """λ times the mean over weights of the rounding penalty at a step; 0 where rounding is not soft."""
        beta = beta_at(step, steps)
        if beta is None or not self.soft:
            return 0.0
        return self.settings.penalty * rounding_penalty(soft_rounding(self.v), beta) / self.v.numel()

    def parameter_groups(self, rates: Rates | None = None) -> list[dict]:
        """For an optimiser, by the pass's own rates."""
        own = self.settings
        rated = [(self.v, own.step_size), (self.factor, own.scale_rate), (self.shift, own.scale_rate * 2**own.bits)]
        return [{"params": [parameter], "lr": rate} for parameter, rate in rated if parameter.requires_grad]

    @torch.no_grad()
    def move(self) -> None:
        """After a step: within the bounds."""
        if not self.soft:
            self.v.clamp_(-0.5, 0.5)
        self.factor.clamp_(*_SHRINK)

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], rows: Tensor) -> None:
        """Puts back the rows (rows,) bool of an earlier `state_dict`."""
        for name, parameter in self.named_parameters():
            parameter[rows] = state[name][rows]

    @property
    def n_codes(self) -> int:
        return self.start.codes.numel()

    @property
    def flipped(self) -> int:
        """How many codes differ from the start's."""
        return int((self._codes() != self.start.codes).sum())

    def result(self) -> Affine | Codebook:
        """What has been learned, as it is stored: V ≥ 0 rounds up."""
        with torch.no_grad():
            scale, zero = self._grid()
        own, start, group = self.settings, self.start, self.start.group
        stored = Scales(scale.half())
        if own.scale_bits == 8:
            stored = Scales((scale / (start.top.float() / 255)).round().to(torch.uint8), start.top)
        codes = self._codes()
        if start.levels is not None:
            table = start.levels.to(torch.int8).view(1, -1, 1)
            return Codebook(self.shape, own.bits, 1, group, codes.int(), table, stored, (len(codes),))
        point = zero.int() if own.zero == "learned" else float(zero[0, 0])
        return Affine(self.shape, group, codes, stored, own.bits, point)

    @torch.no_grad()
    def _codes(self) -> Tensor:
        scale, zero = self._grid()
        codes = self.start.code_of(self._hard(self._position(scale, zero)))
        if self.mask is None:
            return codes
        nothing = self.start.code_of(zero.repeat_interleave(self.start.group, 1))
        return torch.where(self.mask, codes, nothing)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros (rows, n_groups) as they are stored, straight-through."""
        scale, zero = self.start.scale, self.start.zero
        if self.factor.requires_grad:
            free = scale * self.factor
            scale = free + (stored_scale(free, self.start.top, self.settings.scale_bits) - free).detach()
        if self.shift.requires_grad:
            free = zero + self.shift
            zero = free + (free.round().clamp(0, 2**self.settings.bits - 1) - free).detach()
        return scale, zero

    def _position(self, scale: Tensor, zero: Tensor) -> Tensor:
        grouped = self.start.due.view(*scale.shape, -1)
        return (grouped / scale.unsqueeze(2) + zero.unsqueeze(2)).flatten(1)

    def _place(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The level below, the gap to the one above, and the share of it that the position has gone, in [0, 1]."""
        low, gap = self.start.neighbours(position)
        return low, gap, ((position - low) / gap).clamp(0, 1)

    def _hard(self, position: Tensor) -> Tensor:
        if self.soft:
            return self._low + self._gap * (self.v >= 0)
        low, gap, share = self._place(position)
        return low + gap * (share + self.v >= 0.5)

    def _whole(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        grouped = values.view(*scale.shape, -1)
        matrix = ((grouped - zero.unsqueeze(2)) * scale.unsqueeze(2)).flatten(1)
        return (matrix if self.mask is None else matrix * self.mask)[:, : self.shape[1]]


class Moments:
    """Σ_t t·‖Wx − Ŵx‖² over all calibration rows, from H = Σ t·xxᵀ and P = WH; up to a constant per row."""

    def __init__(self, weight: Tensor, hessian: Tensor) -> None:
        self.weight, self.hessian, self.pull = weight, hessian, weight @ hessian

    def size(self, matrix: Tensor) -> Tensor:
        """The loss of Ŵ (out, in) were x̂ = x: what losses are a share of."""
        error = matrix - self.weight
        return ((error @ self.hessian) * error).sum()

    def rows(self, matrix: Tensor) -> Tensor:
        """Of each row of Ŵ (out, in): (out,)."""
        return ((matrix @ self.hessian - 2 * self.pull) * matrix).sum(1)

    def __call__(self, matrix: Tensor) -> Tensor:
        """A value whose gradient is the loss's, 2(ŴH − P), for a single product of matrices."""
        return (matrix * (2 * (matrix.detach() @ self.hessian - self.pull))).sum()


@torch.no_grad()
def learn(matrix: RoundedMatrix, loss: Moments) -> None:
    """`steps` of the settings' optimiser on loss / loss of the start + penalty·mean(1 − |2h − 1|^β)."""
    own = matrix.settings
    first = matrix.rounded()
    before, share = loss.rows(first), 1 / loss.size(first).clamp_min(1e-30)
    state = {name: parameter.clone() for name, parameter in matrix.state_dict().items()}
    optimiser = optimiser_of(own.optimizer, matrix.parameter_groups())
    initial = [group["lr"] for group in optimiser.param_groups]
    for step in range(own.steps):
        for group, rate in zip(optimiser.param_groups, initial, strict=True):
            group["lr"] = rate * (1 - step / own.steps)
        with torch.enable_grad():
            total = loss(matrix()) * share + matrix.penalty(step, own.steps)
            total.backward()
        optimiser.step()
        optimiser.zero_grad()
        matrix.move()
    matrix.restore(state, loss.rows(matrix.rounded()) > before)


class Rounding(RoundingSettings, WeightPass):
    """Learned rounding; see the module for the method."""

    def encode(self, matrix: Tensor, known: Statistics, generator: torch.Generator) -> Affine | Codebook:
        """Of a matrix (out, in); with `unit: block`, or where the hessian is not known, it is the start."""
        rounded = self.started(matrix, known)
        if not self.steps or self.unit == "block" or known.hessian is None:
            return rounded.result()
        loss = Moments(matrix.float(), known.hessian)
        if self.optimizer == "descent":
            return self._descended(rounded, loss, known.kept).result()
        learn(rounded, loss)
        return rounded.result()

    def _descended(self, matrix: RoundedMatrix, loss: Moments, mask: Tensor | None) -> RoundedMatrix:
        columns, padded = matrix.shape[1], matrix.start.due.shape[1]
        room = (0, padded - columns)
        mean = loss.hessian.diagonal().mean()
        hessian = loss.hessian + self.damping * mean * torch.eye(columns, device=mean.device)
        pull = loss.pull + self.damping * mean * loss.weight
        scale_bits = self.scale_bits if "scale" in self.learn else None
        hessian, pull = functional.pad(hessian, room + room), functional.pad(pull, room)
        return RoundedMatrix(
            descend(matrix.start, hessian, pull, self.steps, matrix.mask, scale_bits), matrix.shape, self, mask
        )

    def optimiser(self, groups: list[dict]) -> torch.optim.Optimizer:
        """For the steps on a block's output."""
        return optimiser_of(self.optimizer, groups)

    def learnable(self, matrix: Tensor, known: Statistics) -> RoundedMatrix | None:
        return self.started(matrix, known) if self.unit == "block" else None

    def started(self, weight: Tensor, known: Statistics) -> RoundedMatrix:
        """The matrix at its start, open to learning."""
        (rows, columns), hessian, mask = weight.shape, known.hessian, known.kept
        group = group_columns(self.group, columns)
        factor, emphasis = None, torch.ones(columns, device=weight.device)
        if self.start == "feedback" and hessian is not None:
            padding = -columns % group
            factor = inverse_factor(functional.pad(hessian, (0, padding, 0, padding)), self.damping)
            emphasis = factor.diagonal()[:columns].pow(-2)
        if self.grid == "codebook":
            start = LevelGrid(self.bits, group, self.scale_bits).fit(weight, emphasis, mask, factor)
        else:
            start = Grid(self.bits, group, self.zero, self.scale_bits).fit(weight, mask, factor)
        return RoundedMatrix(start, (rows, columns), self, mask)
