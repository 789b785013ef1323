"""Recurrences over a text: as transformers computes them, and of any length once they are traced."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from compressor.core.errors import CheckpointError
from compressor.export import recurrences
from tests.export.networks import compressed, opened, rounded, traced_and_written

LENGTH = 70
"""Tokens: over a chunk of 64."""


def _modelling(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _delta(channels: bool) -> dict[str, Any]:
    keys, size = (4, 16) if channels else (2, 16)
    decays = torch.rand(2, LENGTH, 4, *([16] if channels else []))
    return {
        "query": torch.randn(2, LENGTH, keys, size), "key": torch.randn(2, LENGTH, keys, size), "g": -decays,
        "value": torch.randn(2, LENGTH, 4, 24), "beta": torch.rand(2, LENGTH, 4),
        "initial_state": torch.randn(2, 4, 16, 24), "output_final_state": True, "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip


def _mamba() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 10, LENGTH), "dt": torch.randn(2, 10, LENGTH), "A": -torch.rand(10, 6),
        "B": torch.randn(2, 6, LENGTH), "C": torch.randn(2, 6, LENGTH), "D": torch.randn(10),
        "z": torch.randn(2, 10, LENGTH), "delta_bias": torch.randn(10), "delta_softplus": True,
        "return_last_state": True,
    }  # fmt: skip


def _mamba2() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, LENGTH, 4, 10), "dt": torch.randn(2, LENGTH, 4), "A": -torch.rand(4),
        "B": torch.randn(2, LENGTH, 2, 6), "C": torch.randn(2, LENGTH, 2, 6), "D": torch.randn(4),
        "dt_bias": torch.randn(4), "dt_softplus": True, "dt_limit": (0.1, 2.0), "chunk_size": 16,
        "initial_states": torch.randn(2, 4, 10, 6), "return_final_states": True,
    }  # fmt: skip


def _looped(step, state: Tensor, inputs: tuple[Tensor, ...], dim: int) -> tuple[Tensor, Tensor]:
    found = []
    for token in zip(*(each.unbind(dim) for each in inputs), strict=True):
        state, given = step(state, token)
        found.append(given)
    return state, torch.stack(found, dim)


@pytest.mark.parametrize(
    ("kind", "name", "given"),
    [("qwen3_next", "torch_chunk_gated_delta_rule", partial(_delta, False)),
     ("kimi_linear", "chunk_kimi_delta_attention", partial(_delta, True)),
     ("mamba", "mamba_selective_scan", _mamba),
     ("mamba2", "mamba2_chunk_scan", _mamba2)],
)  # fmt: skip
def test_a_recurrence_gives_what_transformers_gives(kind, name, given, monkeypatch):
    torch.manual_seed(3)
    monkeypatch.setattr(recurrences, "scan", _looped)  # torch compiles each step first
    inputs = given()
    found, expected = getattr(recurrences, name)(**inputs), getattr(_modelling(kind), name)(**inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


class Remembering(nn.Module):
    """One layer of linear attention, by transformers' function, which reads a text in chunks of 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gates, self.head = nn.Embedding(50, 32), nn.Linear(32, 1), nn.Linear(32, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.table(input_ids)[:, :, None]
        gates = self.gates(hidden[:, :, 0])
        found, _ = torch_chunk_gated_delta_rule(hidden, hidden, hidden, -gates.exp(), gates)
        return self.head(found[:, :, 0])


class Counting(nn.Module):
    """The first token of each eight, in a loop over as many as a text has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.table(input_ids)
        return torch.stack([hidden[:, 8 * i] for i in range(hidden.shape[1] // 8)], 1)


def test_a_traced_recurrence_reads_texts_longer_than_its_example(tmp_path):
    torch.manual_seed(4)
    module = Remembering().eval()
    tensors = compressed(module, tmp_path, lambda weight: rounded(weight, 8, 16))
    example = {"input_ids": torch.ones(2, 16, dtype=torch.int64)}
    session = opened(traced_and_written(module, example, tensors, tmp_path, exact=True))
    ids = torch.randint(0, 50, (3, 2 * LENGTH))
    with torch.no_grad():
        expected = module(ids).numpy()
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_loop_whose_length_a_graph_would_fix_is_refused(tmp_path):
    module = Counting().eval()
    tensors = compressed(module, tmp_path, lambda weight: rounded(weight, 8, 16))
    example = {"input_ids": torch.ones(2, 16, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"fixes a size of Counting .* would be right where .*sequence_length"):
        traced_and_written(module, example, tensors, tmp_path)
