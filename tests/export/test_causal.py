"""Causal decoders of many architectures, traced with their cache, compute what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import nn

from compressor.core.options import RunOptions
from compressor.evaluate.session import DecoderSession, open_session
from compressor.export.causal import KeyValueCache, kv_cache, trace_decoder
from compressor.export.measured import TRACED, TRACED_WITH_CACHE
from compressor.export.module import export_module
from compressor.run import pipeline
from compressor.run.prepare import prepare
from scripts.family_models import DECODERS, FAMILIES, WINDOW, built
from tests import pico
from tests.export.networks import compressed, opened, rounded
from tests.export.test_decoder import run

NAMES = ("llama, heads of 20", "gpt2", "gpt_neo", "bloom", "gemma2", "gemma3", "minicpm3", "llama, dynamic rope")
IDS = np.random.default_rng(3).integers(2, 290, (2, 2 * WINDOW + 7))


Exported = Callable[[str], tuple[nn.Module, onnxruntime.InferenceSession]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A network by its name, which computes with the decoded weights, and its graph; each is traced once."""
    return cache(lambda name: _exported(name, tmp_path_factory.mktemp("causal")))


def _exported(name: str, folder: Path) -> tuple[nn.Module, onnxruntime.InferenceSession]:
    module = built(DECODERS[name])
    tensors = compressed(module, folder, lambda weight: rounded(weight, 8, 16))
    kept = kv_cache(module)
    assert isinstance(kept, KeyValueCache)
    graph = trace_decoder(module, kept, tensors, folder)
    return module, opened(export_module(graph, tensors, folder, exact=True))


def near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", [*NAMES[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_a_decoder_reads_all_at_once_and_step_by_step(exported, name):
    module, session = exported(name)
    assert [entry.name for entry in session.get_inputs()][:3] == [
        "input_ids", "attention_mask", "past_key_values.0.key"]  # fmt: skip
    with torch.no_grad():
        expected = module(torch.from_numpy(IDS)).logits.numpy()
    whole, _ = run(session, IDS)
    near(whole, expected)
    logits, past = run(session, IDS[:, : WINDOW - 2])
    parts = [logits]
    for start, stop in ((WINDOW - 2, WINDOW + 9), *((i, i + 1) for i in range(WINDOW + 9, IDS.shape[1]))):
        logits, past = run(session, IDS[:, start:stop], past)
        parts.append(logits)
    near(np.concatenate(parts, 1), expected)


def test_padding_stands_on_either_side(exported):
    module, session = exported("gemma3")
    with torch.no_grad():
        expected = module(torch.from_numpy(IDS[1:, :30])).logits.numpy()
    for at in (slice(6, None), slice(0, 30)):
        ids, mask = np.full((2, 36), 5), np.zeros((2, 36), np.int64)
        ids[0], mask[0] = IDS[0, :36], 1
        ids[1, at], mask[1, at] = IDS[1, :30], 1
        logits, _ = run(session, ids, mask=mask)
        near(logits[1:, at], expected)


def test_the_cache_is_named_and_shaped_as_that_of_the_written_graph(exported):
    (_, session), sizes = exported("minicpm3"), (("key", 16), ("value", 8))
    shapes = {entry.name: entry.shape for entry in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"], "attention_mask": ["batch_size", "total_sequence_length"],
        **{
            f"past_key_values.{i}.{part}": ["batch_size", 1, "past_sequence_length", size]
            for i in (0, 1) for part, size in sizes
        },
        "logits": ["batch_size", "sequence_length", 300],
        **{
            f"present.{i}.{part}": ["batch_size", 1, "total_sequence_length", size]
            for i in (0, 1) for part, size in sizes
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "takes no past_key_values"),
        ("lfm2", "keeps LinearAttentionLayer, which is not keys and values alone"),
        ("falcon_h1", "keeps LinearAttentionAndFullAttentionLayer, which is not keys and values alone"),
        ("cpmant", "keeps keys of shape (2, 4, 35, 16), not (batch, heads, length, size)"),
    ],
)
def test_what_is_no_keys_and_values_is_named(name, reason):
    found = kv_cache(built(DECODERS[name]))
    assert isinstance(found, str)
    assert reason in found


RECIPE = """
passes: [{pass: affine, bits: 8, group: 16}]
calibration: {tokens: 128, window: 32}
embeddings: {bits: 8, group: 16}
export: {activations: exact}
evaluation: {tokens: 96, window: 32, speed: false}
"""


def test_what_a_plan_takes_for_granted_was_measured():
    measured = json.loads((Path(__file__).parents[2] / "docs/measured/families.json").read_text())
    kinds: dict[tuple[bool, str], list[dict]] = {}
    for name, found in measured.items():
        family = FAMILIES[name]
        config = getattr(transformers, family.kind).config_class
        kinds.setdefault((family.is_decoder, config.model_type), []).append(found)
    wanted = [(True, kind) for kind in TRACED_WITH_CACHE] + [(False, kind) for kind in TRACED]
    assert [each for each in wanted if not all(found["run"] == 0 for found in kinds[each])] == []
    assert [kind for kind in TRACED_WITH_CACHE if not all(found["cache"] for found in kinds[True, kind])] == []


def test_a_run_delivers_a_cache_and_proves_it_in_steps(tmp_path):
    pico.gpt2(tmp_path / "gpt2")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    asked = RunOptions(model=str(tmp_path / "gpt2"), output=tmp_path / "out", recipe=str(tmp_path / "recipe.yaml"))
    assert not [note for note in prepare(asked).plan.notes if "cache" in note]
    artifact = pipeline.run(asked)
    assert artifact.report["proof"]["in_steps"]["max_relative_error"] < 1e-4
    genai = json.loads((artifact.directory / "genai_config.json").read_text())["model"]
    assert (genai["decoder"]["num_key_value_heads"], genai["decoder"]["head_size"], genai["context_length"]) == (
        3,
        24,
        64,
    )
    session = open_session(artifact.directory)
    assert isinstance(session, DecoderSession)
    whole = [*range(20, 29)]
    for token in session.generate(np.array(whole), 8, stop=()):
        assert token == session.logits(np.array([whole]))[0, -1].argmax()
        whole.append(token)
