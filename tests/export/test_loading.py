"""Artifacts are torch modules again, and checkpoints like any other."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError
from compressor.evaluate.reference import original_outputs
from compressor.export.loading import decoded_checkpoint
from tests.export.networks import BERT, GPT2, Tied, compressed, first_output, pico, tokens


@pytest.fixture
def artifact(tmp_path):
    """(directory, the module with decoded weights) of a pico BERT."""
    module = pico("bert", BERT)
    compressed(module, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(module.config.to_dict()))
    (tmp_path / "compression.json").write_text(json.dumps({"source": {"arch": None}}))
    return tmp_path, module


def test_an_artifact_loads_as_a_module_again(artifact):
    directory, module = artifact
    loaded = compressor.load(directory)
    assert not loaded.training
    inputs = tokens(2, 9)
    torch.testing.assert_close(first_output(loaded, inputs), first_output(module, inputs), rtol=0, atol=0)


def test_an_artifact_of_a_custom_network_loads_by_its_reference(tmp_path):
    torch.manual_seed(0)
    module = Tied().eval()
    compressed(module, tmp_path)
    note = tmp_path / "compression.json"
    note.write_text(json.dumps({"source": {"arch": "tests.export.networks:Tied"}}))
    with pytest.raises(
        CheckpointError, match=r"names is not run; give arch='tests.export.networks:Tied' if you trust it"
    ):
        compressor.load(tmp_path)
    loaded = compressor.load(tmp_path, arch="tests.export.networks:Tied")
    assert loaded.head.weight is loaded.table.weight
    assert loaded.shift.dtype == torch.int64
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    note.write_text(json.dumps({"source": {}}))
    with pytest.raises(CheckpointError, match="its architecture is unknown"):
        compressor.load(tmp_path)
    assert compressor.load(tmp_path, arch="tests.export.networks:Tied").mix.shape == (32, 32)


def test_what_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no artifact, it has no compression\.json"):
        compressor.load(tmp_path)
    (tmp_path / "compression.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        compressor.load(tmp_path)


def test_a_decoded_checkpoint_runs_block_by_block(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    module = pico("gpt2", GPT2)
    module.save_pretrained(source)
    target.mkdir()
    tensors = compressed(module, target)
    decoded = decoded_checkpoint(open_checkpoint(source), tensors)
    decoded.check()
    assert decoded.family == "decoder"
    assert decoded.tied == {"lm_head.weight": "transformer.wte.weight"}
    windows = tokens(2, 11)["input_ids"]
    (found,) = original_outputs(decoded, [{"input_ids": windows.numpy()}])
    np.testing.assert_allclose(
        found["logits"], first_output(module, {"input_ids": windows}).numpy(), rtol=1e-5, atol=1e-5
    )


def test_the_digits_network_has_the_names_of_its_weights(tmp_path):
    from scripts.networks import digit_cnn

    state = digit_cnn().state_dict()
    assert state["fc_layers.0.weight"].shape == (256, 1152)
    save_file(state, tmp_path / "model.safetensors")
    open_checkpoint(tmp_path / "model.safetensors", arch="scripts.networks:digit_cnn").check()
