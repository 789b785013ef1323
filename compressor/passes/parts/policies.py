"""The two policies of N2N, and the step of REINFORCE that trains them.

Ashok et al., "N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning", ICLR 2018,
arXiv 1709.06030. Both read the rows of the teacher's layers. Rows are scaled here to about 0 … 1, and blocks of a
transformer, whose rows are alike, have two more entries and a weight of their own each: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.core.errors import RecipeError
from compressor.core.files import whole
from compressor.core.students import ATTRIBUTES, MULTIPLIERS, Layer

HIDDEN = 30
_SCALE = (1 / 6, 1 / 7, 1 / 2, 1.0, 1 / 3, 1 / 4, 1 / 4)


def state_of(layers: Sequence[Layer], influence: Sequence[float] | None = None) -> Tensor:
    """Rows (layers, 7), scaled; (layers, 9) with `influence`: its logarithm, standardised, and the place."""
    rows = torch.tensor([layer.row() for layer in layers])
    rows[:, 3] = (1 + rows[:, 3]).log2() / 10
    rows = rows * torch.tensor(_SCALE)
    if influence is None:
        return rows
    places = torch.linspace(0, 1, len(layers))
    return torch.cat([rows, torch.stack([standardised(influence).float(), places], 1)], 1)


def standardised(influence: Sequence[float]) -> Tensor:
    """The logarithm of positive numbers, of mean 0 and deviation 1: (n,) float64."""
    logs = torch.tensor(influence, dtype=torch.float64).clamp_min(1e-12).log()
    return (logs - logs.mean()) / logs.std().clamp_min(1e-12)


class RemovalPolicy(nn.Module):
    """A bidirectional LSTM over layers, and keep or remove for each: (layers, features) to logits (layers,) of removal.

    n_own   layers that have a weight of their own beside what the LSTM says of them; 0: none
    """

    def __init__(self, n_features: int, n_own: int = 0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(n_features, HIDDEN, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, 2)
        self.own = nn.Parameter(torch.zeros(n_own))

    def forward(self, state: Tensor) -> Tensor:
        hidden, _ = self.lstm(state.unsqueeze(1))
        keep, remove = self.head(hidden[:, 0]).unbind(1)
        return remove - keep + (self.own if len(self.own) else 0.0)


class ShrinkagePolicy(nn.Module):
    """An LSTM that goes from decision to decision and is told what it chose last; a multiplier for each."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(n_features + len(ATTRIBUTES) + len(MULTIPLIERS), HIDDEN, num_layers=2)
        self.head = nn.Linear(HIDDEN, len(MULTIPLIERS))

    def roll_out(
        self, rows: Tensor, attributes: Tensor, n: int, generator: torch.Generator, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`n` rollouts at once.

        Args:
            rows: (decisions, features), of the layer that each decision is about.
            attributes: LongTensor (decisions,), numbers in ATTRIBUTES.
            chosen: (n, decisions) to score instead of drawing.

        Returns:
            Numbers in MULTIPLIERS (n, decisions); log π of each rollout (n,); mean entropy of a decision, in nats.
        """
        last, memory = torch.zeros(n, len(MULTIPLIERS)), None
        total, entropy, found = torch.zeros(n), torch.zeros(()), []
        for number, (row, attribute) in enumerate(zip(rows, attributes, strict=True)):
            which = nn.functional.one_hot(attribute, len(ATTRIBUTES)).to(row.dtype)
            step = torch.cat([torch.cat([row, which]).expand(n, -1), last], 1)
            output, memory = self.lstm(step.unsqueeze(0), memory)
            log_p = self.head(output[0]).log_softmax(1)
            draw = torch.multinomial(log_p.detach().exp(), 1, generator=generator)[:, 0]
            choice = draw if chosen is None else chosen[:, number]
            total = total + log_p.gather(1, choice.unsqueeze(1))[:, 0]
            entropy = entropy - (log_p.detach().exp() * log_p.detach()).sum(1).mean() / len(rows)
            last = nn.functional.one_hot(choice, len(MULTIPLIERS)).to(row.dtype)
            found.append(choice)
        return torch.stack(found, 1), total, entropy


def reinforce_loss(log_probabilities: Tensor, rewards: Tensor, baseline: float) -> Tensor:
    """−mean_i (R_i − b)·Σ_t log π(a_it): its gradient descends where the paper's ascends.

    Args:
        log_probabilities: (rollouts,), each the sum over its decisions.
        rewards: (rollouts,).
    """
    return -((rewards - baseline) * log_probabilities).mean()


class Learner:
    """A policy, its optimizer, and the running baseline of its rewards."""

    def __init__(self, policy: nn.Module, rate: float, own_rate: float, memory: float) -> None:
        self.policy, self.memory = policy, memory
        self.baseline: float | None = None
        own = [parameter for name, parameter in policy.named_parameters() if name == "own"]
        rest = [parameter for name, parameter in policy.named_parameters() if name != "own"]
        groups = [{"params": rest, "lr": rate}, {"params": [p for p in own if p.numel()], "lr": own_rate}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]])

    def learn(self, log_probabilities: Tensor, rewards: Sequence[float]) -> None:
        """One step; the first epoch has no earlier ones and is its own baseline."""
        found = torch.tensor(rewards, dtype=log_probabilities.dtype)
        mean = float(found.mean())
        baseline = mean if self.baseline is None else self.baseline
        self.optimizer.zero_grad()
        reinforce_loss(log_probabilities, found, baseline).backward()
        self.optimizer.step()
        self.baseline = mean if self.baseline is None else self.memory * self.baseline + (1 - self.memory) * mean


def save_policies(file: Path, policies: Mapping[str, nn.Module]) -> None:
    """Writes them whole or not at all."""
    weights = {
        f"{name}.{key}": tensor.detach().contiguous()
        for name, policy in policies.items()
        for key, tensor in policy.state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        save_file(weights, partial)


def load_policy(file: Path, name: str, policy: nn.Module) -> None:
    """Starts a policy from what another teacher taught it; weights of single layers are not taken over.

    Raises:
        RecipeError: The file cannot be read, or holds no policy of these shapes.
    """
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{file}: is no saved policy; {error}; give a file that policy_out wrote") from error
    wanted = policy.state_dict()
    found = {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}
    if "own" in wanted:
        found["own"] = wanted["own"]
    wrong = [key for key in wanted if key not in found or found[key].shape != wanted[key].shape]
    if wrong:
        raise RecipeError(
            f"{file}: holds no {name} policy that fits; '{wrong[0]}' is missing or of another shape; give one that was "
            "trained on the same kind of units"
        )
    policy.load_state_dict(found)
