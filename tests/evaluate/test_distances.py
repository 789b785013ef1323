"""How far stored tensors are from the original's: by the definition, whatever their layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoints import open_checkpoint
from compressor.core.contract import Statistics
from compressor.core.tensors import EncodedTensor, EncodedTensors, Layout, write_tensors
from compressor.evaluate.distances import weight_errors
from compressor.passes.registry import load_pass
from compressor.passes.settings.affine import AffineSettings
from tests import pico


def test_errors_are_relative_norms(tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.core.encoding._ROWS", 4)
    weight, _ = pico.correlated(10, 32)
    originals = {"plain": weight, "turned": weight.T.contiguous(), "half": weight.half(), "vector": weight[0].clone()}
    save_file(originals, tmp_path / "model.safetensors")
    method = load_pass(AffineSettings(bits=2, group=16))
    encoding = method.encode(weight, Statistics(), torch.Generator())
    tensors = {
        "plain": EncodedTensor(encoding, Layout((10, 32))),
        "turned": EncodedTensor(encoding, Layout((32, 10), transposed=True)),
        "half": EncodedTensor(encoding, Layout((10, 32))),
        "vector": EncodedTensor.dense(weight[0] + 1),
    }
    write_tensors(tmp_path / "stored.safetensors", tensors)
    found = weight_errors(
        open_checkpoint(tmp_path / "model.safetensors"), EncodedTensors([tmp_path / "stored.safetensors"])
    )
    for name, original in originals.items():
        lost = float((tensors[name].decode() - original.float()).norm() / original.float().norm())
        assert found[name] == pytest.approx(lost, abs=2e-6)
