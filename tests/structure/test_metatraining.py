"""The training of metanetworks: what a step's gradient is, and that it learns to make small channels smaller."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.core.batch import Examples
from compressor.core.errors import CheckpointError, DataError
from compressor.passes.metaprune import importance, rewrite
from compressor.passes.parts.metanetwork import Metanetwork, Shape, load_metanetwork
from compressor.passes.settings.metaprune import MetapruneSettings
from compressor.structure.metatraining import MetaTraining, metatrain, pruned_once
from tests.graph import zoo
from tests.learning.training_case import examples, images, residual, subject_of

SMALL = Shape(layers=1, width=8, share=0.05)
PRUNING = MetapruneSettings.model_validate({"fraction": 0.2, "epochs_before": 0, "epochs": 1, "batch": 16})


def learned(strength: float, rounds: int = 10):
    settings = MetaTraining(rounds, 64, 1e-2, rounds, strength, rounds)
    return metatrain([residual(0), residual(1)], [residual(2)], examples(), examples(32), settings, PRUNING, SMALL, 0,
                     lambda share, note: None)  # fmt: skip


def smallest(network: Metanetwork | None) -> float:
    """The least important channel beside the most important of its group, of a network that was never seen."""
    subject = subject_of(residual(5))
    if network is not None:
        rewrite(network, subject.surgeon.channels(subject.module), subject.module)
    tensors = dict(subject.module.named_parameters())
    return min(float(importance(group, tensors).min()) for group in subject.choosable())


def test_it_learns_from_the_loss_and_from_the_pull_to_make_small_channels_smaller():
    (without, log), (network, _) = learned(0.0), learned(0.1)
    assert [entry["round"] for entry in log] == list(range(11))
    assert log[-1]["loss"] < log[1]["loss"]
    assert [entry["round"] for entry in log if "pruned_loss" in entry] == [0, 10]
    assert smallest(network) < smallest(without)
    assert smallest(network) < smallest(None)


def test_it_is_the_same_again():
    (first, log), (second, other) = learned(0.1, 2), learned(0.1, 2)
    assert log == other
    for name, values in first.state_dict().items():
        assert torch.equal(values, second.state_dict()[name])


def test_a_network_of_the_population_is_pruned_and_trained():
    found = pruned_once(residual(), examples(), PRUNING, 0, lambda share, note: None)
    before = sum(p.numel() for p in residual().parameters())
    assert sum(p.numel() for p in found.parameters()) < before
    assert not torch.equal(found.head.bias, residual().head.bias)


def test_what_cannot_be_learned_from_is_refused():
    settings, advance = MetaTraining(1, 8), lambda share, note: None
    with pytest.raises(DataError, match="give data with labels"):
        metatrain(
            [residual()], [residual()], Examples({"": images(8)}), examples(), settings, PRUNING, SMALL, 0, advance
        )
    with pytest.raises(DataError, match="found 1 and 0"):
        metatrain([residual()], [], examples(), examples(), settings, PRUNING, SMALL, 0, advance)
    torch.manual_seed(0)
    with pytest.raises(CheckpointError, match="another family"):
        metatrain(
            [residual()], [copy.deepcopy(zoo.VGG()).eval()], *[square(16)] * 2, settings, PRUNING, SMALL, 0, advance
        )


def square(n: int) -> Examples:
    return Examples({"": torch.randn(n, 3, 16, 16)}, torch.zeros(n, dtype=torch.int64))


def test_the_script_trains_one_on_files(tmp_path):
    networks = []
    for seed in range(3):
        networks.append(str(tmp_path / f"{seed}.pt"))
        torch.save(residual(seed).state_dict(), networks[-1])
    data, output = examples(), tmp_path / "network.safetensors"
    np.savez(tmp_path / "train.npz", x=data.inputs[""].numpy(), labels=data.labels.numpy())
    root = Path(__file__).parents[2]
    asked = ["--arch", "tests.learning.training_case:residual", "--judges", "1", "--epochs", "0", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, root / "scripts" / "metatrain.py", *networks, "--data", tmp_path / "train.npz", "--output",
         output, "--examples", "16", "--layers", "1", "--width", "4", *asked],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [json.loads(line)["round"] for line in done.stdout.splitlines()] == [0, 1]
    assert load_metanetwork(output).shape == Shape(layers=1, width=4)
