"""An encoder-decoder becomes an encoder and a decoder with a cache, which are proved, judged and written with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from compressor.core.artifact import Artifact
from compressor.core.errors import CheckpointError
from compressor.core.options import RunOptions
from compressor.evaluate.generation import generate_text
from compressor.evaluate.pair_session import PairSession, start_token
from compressor.export.encoder_decoder import paired_cache
from compressor.export.loading import decoded_checkpoint
from compressor.run import pipeline
from scripts.family_models import FAMILIES, PAIRS, Family, built, example

RECIPE = """
passes: [{pass: affine, bits: 8, group: 16}]
calibration: {samples: 4}
embeddings: {bits: 8, group: 16}
export: {activations: exact}
evaluation: {samples: 8, speed: false}
"""


def inputs(family: Family) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in example(family, 2).items()}


@pytest.mark.parametrize("name", PAIRS)
def test_what_a_decoder_keeps_is_found_without_weights(name):
    with torch.device("meta"):
        module = built(PAIRS[name])
    found = paired_cache(module, inputs(PAIRS[name]))
    assert not isinstance(found, str), found
    parts = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    assert found.sizes == {f"{i}.{part}": (4, 16) for i in (0, 1) for part in parts}


def test_what_is_no_encoder_decoder_is_told_why():
    found = paired_cache(built(FAMILIES["llama"]), {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
    assert found == "LlamaForCausalLM takes no encoder_outputs"


def test_a_config_that_does_not_say_how_to_begin_is_refused():
    assert start_token({"bos_token_id": 5}, Path("there")) == 5
    assert start_token({"bos_token_id": 5, "decoder_start_token_id": 7}, Path("there")) == 7
    with pytest.raises(CheckpointError, match="there: config.json does not say what its decoder begins with"):
        start_token({"bos_token_id": None}, Path("there"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    folder = tmp_path_factory.mktemp("pair")
    family = Family("T5ForConditionalGeneration", PAIRS["t5"].settings | {"decoder_start_token_id": 1}, "text pair")
    family.write(folder / "t5")
    np.savez(folder / "data.npz", **example(family, 16))
    (folder / "recipe.yaml").write_text(RECIPE)
    asked = RunOptions(
        model=str(folder / "t5"), output=folder / "out", recipe=str(folder / "recipe.yaml"),
        data=str(folder / "data.npz"),
    )  # fmt: skip
    return pipeline.run(asked), folder


@pytest.mark.slow
def test_both_graphs_are_proved_and_judged_by_their_predictions(made):
    report = made[0].report
    assert report["proof"]["in_steps"]["max_relative_error"] < 1e-4
    assert report["proof"]["paired"]["max_relative_error"] < 1e-4
    assert report["quality"]["ratio"] == pytest.approx(1, abs=0.05)
    assert report["quality"]["outputs"]["logits"]["agreement"] > 0.9
    assert {"encoder_model.onnx", "decoder_model_merged.onnx"} <= set(report["size"]["files"])


@pytest.mark.slow
def test_what_is_written_is_what_transformers_writes(made):
    artifact, folder = made
    from compressor.checkpoints import open_checkpoint
    from compressor.core.tensors import EncodedTensors

    original = open_checkpoint(str(folder / "t5"))
    tensors = EncodedTensors([artifact.directory / "model.safetensors"])
    network = decoded_checkpoint(original, tensors).build("cpu")
    tokenizer = Tokenizer.from_file(str(artifact.directory / "tokenizer.json"))
    ids = tokenizer.encode("the river under").ids
    expected = network.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, num_beams=1)[0, 1:].tolist()
    assert list(PairSession(artifact.directory).generate({"input_ids": np.array([ids])}, 9)) == expected
    assert tokenizer.decode(expected).startswith("".join(generate_text(artifact.directory, "the river under", 9)))


@pytest.mark.slow
def test_padding_of_what_is_read_changes_nothing(made):
    session = PairSession(made[0].directory)
    ids = np.random.default_rng(1).integers(2, 290, (1, 9))
    padded = np.concatenate([ids, np.full((1, 4), 7)], axis=1)
    mask = (np.arange(13) < 9)[None].astype(np.int64)
    decoder = np.array([[1, 20, 30]])
    alone = session.logits({"input_ids": ids, "decoder_input_ids": decoder})
    found = session.logits({"input_ids": padded, "attention_mask": mask, "decoder_input_ids": decoder})
    assert np.abs(found - alone).max() < 1e-5 * np.abs(alone).max()
