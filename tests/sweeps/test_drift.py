"""Weights that make up for the drift of a layer's inputs: the least squares on them, and a network's outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.checkpoints import open_checkpoint
from compressor.core.tensors import EncodedTensors
from compressor.core.work import Work
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Calibration
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps.drift import ROWS_PER_COLUMN, Drift
from compressor.sweeps.encode import encode_network
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey
from tests import pico
from tests.conftest import Checkpoints

COLUMNS, ROWS = 6, 400
RECIPE = """
passes: [{{pass: affine, method: gptq, bits: 2, group: 16, zero: learned}}]
embeddings: {{bits: 16}}
calibration: {{drift: {drift}, token_importance: false}}
"""


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's inputs of a layer and the compressed network's, (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(ROWS, COLUMNS, generator=generator)
    mixing = torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    return original, original @ mixing + 0.1 * torch.randn(ROWS, COLUMNS, generator=generator)


def drift(network: nn.Module, **settings: float) -> Drift:
    return Drift(None, network, [], "", Calibration(**settings), Path("unused"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_whole_step_is_the_least_squares_on_what_the_original_gives(weighted):
    original, moved = inputs()
    tokens = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else torch.ones(ROWS)
    matrix = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(1))
    found = drift(nn.Module(), drift=1.0, drift_damping=1e-9)
    for part in (slice(0, 150), slice(150, ROWS)):
        found.add("w", original[part], moved[part], tokens[part] if weighted else None)
    moment = (moved.T * tokens) @ moved / ROWS
    root = tokens.double().sqrt().unsqueeze(1)
    expected = torch.linalg.lstsq(root * moved.double(), root * (original.double() @ matrix.double().T)).solution.T
    torch.testing.assert_close(found.corrected("w", matrix, moment, ROWS).double(), expected, rtol=1e-3, atol=1e-4)


def test_a_share_and_few_rows_shorten_the_step():
    original, moved = inputs()
    matrix, moment = torch.ones(1, COLUMNS), moved.T @ moved / ROWS
    steps = []
    for settings, rows in (({"drift": 1.0}, ROWS), ({"drift": 0.5}, ROWS), ({"drift": 1.0}, ROWS_PER_COLUMN * 3)):
        found = drift(nn.Module(), **settings)
        found.add("w", original * rows / ROWS, moved * rows / ROWS, None)
        found._sums["w"].mul_(ROWS / rows)  # the same mean of fewer rows
        steps.append(found.corrected("w", matrix, moment, rows) - matrix)
    torch.testing.assert_close(steps[1], 0.5 * steps[0])
    torch.testing.assert_close(steps[2], 0.5 * steps[0])


def test_without_drift_nothing_moves():
    original, _ = inputs()
    found = drift(nn.Module(), drift=1.0)
    found.add("w", original, original, None)
    matrix = torch.randn(3, COLUMNS)
    torch.testing.assert_close(found.corrected("w", matrix, torch.eye(COLUMNS), ROWS), matrix)


def outputs(folder: Path, source: Path, share: float) -> tuple[torch.Tensor, EncodedTensors]:
    """What the last block gives, decoded, on text that it was encoded with, and the tensors."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.format(drift=share))
    checkpoint, recipe = open_checkpoint(source), load_recipe(folder / "recipe.yaml")
    batches, network = pico.token_batches(), Network(checkpoint, fast=False)
    (folder / "work").mkdir()
    tensors, _ = encode_network(
        network, batches, recipe, make_plan(checkpoint, recipe), Survey(), Work(folder / "work", 0), lambda note: None
    )
    return torch.cat([state.flatten(0, -2) for state in network.last]), tensors


def test_a_network_comes_nearer_to_the_original(tmp_path: Path, checkpoints: Checkpoints):
    source = checkpoints("llama", n_layers=4)
    original = Network(open_checkpoint(source), fast=False)
    for _ in original.sweep(pico.token_batches()):
        pass
    wanted = torch.cat([state.flatten(0, -2) for state in original.last])
    errors = []
    for share in (0.0, 0.5):
        found, tensors = outputs(tmp_path / str(share), source, share)
        assert all(tensors[name].decode().isfinite().all() for name in tensors)
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.97 * errors[0]
