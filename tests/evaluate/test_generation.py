"""A language model whose graph keeps no cache: what its plan says, how it is judged, and that it still speaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from compressor.core.artifact import Artifact
from compressor.core.errors import CheckpointError, DataError
from compressor.core.options import RunOptions
from compressor.evaluate.generation import generate_text
from compressor.evaluate.session import open_session
from compressor.run.pipeline import run
from compressor.run.prepare import prepare
from tests import pico

RECIPE = """
passes: [{pass: affine, bits: 4, group: 16, method: gptq}]
calibration: {tokens: 240, window: 24}
embeddings: {bits: 8, group: 16}
evaluation: {tokens: 96, window: 32, speed: false}
"""
TEMPLATE = "{% for each in messages %}{{ each.role }}: {{ each.content }} {% endfor %}the green"


@pytest.fixture(scope="module")
def asked(module_here) -> RunOptions:
    """A GPT with the template of a chat, texts, and a recipe."""
    pico.openai_gpt(module_here / "gpt")
    (module_here / "gpt" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (module_here / "recipe.yaml").write_text(RECIPE)
    for i, name in enumerate(("calibration", "evaluation")):
        (module_here / f"{name}.txt").write_text(pico.text(1 + i))
    texts = {"data": "calibration.txt", "eval": "evaluation.txt"}
    return RunOptions(model="gpt", output=Path("out"), recipe="recipe.yaml", **texts)


@pytest.fixture(scope="module")
def made(asked) -> Artifact:
    return run(asked)


def test_the_plan_says_that_there_will_be_no_cache(asked, llama):
    why = "OpenAIGPTLMHeadModel takes no past_key_values"
    assert [note for note in prepare(asked).plan.notes if note.startswith("no KV cache") and why in note]
    known = prepare(RunOptions(model=str(llama), output=Path("other"), recipe="recipe.yaml", data="calibration.txt"))
    assert not [note for note in known.plan.notes if "cache" in note]


def test_it_is_judged_as_a_language_model_and_by_no_cosine(made):
    quality = made.report["quality"]
    assert quality["ratio"] == pytest.approx(quality["perplexity"] / quality["original_perplexity"])
    assert quality["kl_divergence"] > 0
    assert 0.5 < quality["top1_agreement"] < 1
    assert quality.get("cosine") is None


def test_each_token_follows_from_the_whole_text_before_it(made):
    tokenizer = Tokenizer.from_file(str(made.directory / "tokenizer.json"))
    ids = tokenizer.encode("the river under").ids
    session, expected = open_session(made.directory), []
    for _ in range(8):
        logits = session.run({"input_ids": np.array([[*ids, *expected]])})["logits"]
        expected.append(int(logits[0, -1].argmax()))
    assert len(set(expected)) > 1
    assert "".join(generate_text(made.directory, "the river under", 8)) == tokenizer.decode(expected)


def test_a_chat_is_asked_in_the_tokenizers_template(made, command):
    answer = command("generate", str(made.directory), "red hill", "--chat", "-n", "6")
    written = command("generate", str(made.directory), "user: red hill the green", "-n", "6")
    assert answer.out and written.out == f"user: red hill the green{answer.out}"


def test_without_a_template_there_is_no_chat(made, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text((made.directory / name).read_text())
    with pytest.raises(CheckpointError, match="no template of a chat can be used"):
        next(generate_text(tmp_path, "red hill", 6, chat=True))


@pytest.mark.parametrize("file, content", [("tokenizer.json", '{"model": 3}'), ("config.json", "[1, 2]")])
def test_a_damaged_file_of_it_is_named(made, tmp_path, file, content):
    shutil.copytree(made.directory, tmp_path / "small")
    (tmp_path / "small" / file).write_text(content)
    with pytest.raises((CheckpointError, DataError), match=file):
        list(generate_text(tmp_path / "small", "the river", 2))
