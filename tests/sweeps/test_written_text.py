"""Text that the original writes: drawn from its own distribution, reproducible, mixed in a recipe's share."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError, DataError
from compressor.core.options import RunOptions
from compressor.core.work import Work
from compressor.data.batches import calibration_batches, learning_batches, n_generated
from compressor.data.text import Text
from compressor.plan.recipe import Calibration, Distill, Recipe
from compressor.plan.recipe_file import load_recipe
from compressor.run.prepare import prepare
from compressor.sweeps.written_text import (
    WINDOWS_AT_ONCE,
    Roomy,
    SingleQueries,
    attend,
    generated_tokens,
    refuse_forgetful,
    sample_documents,
    start_token,
)
from tests import pico

MARK = pico.VOCABULARY + 7
"""A token that no text has."""


def recipe(calibration: Calibration, distill: Distill) -> Recipe:
    return load_recipe("llm-2bit").model_copy(update={"calibration": calibration, "distill": distill})


def drawn(llama, folder, n=5, seed=0):
    folder.mkdir(exist_ok=True)
    return generated_tokens(open_checkpoint(llama), llama, n, 6, folder, Work(folder, seed).generator, fast=False)


def naive_documents(module, first: int, rows: int, length: int, generator: torch.Generator) -> list[list[int]]:
    """Token by token without a cache: the first token whose cumulated probability exceeds the number drawn."""
    documents = [[first] for _ in range(rows)]
    for _ in range(length):
        numbers = torch.rand(rows, 1, generator=generator)
        for document, number in zip(documents, numbers[:, 0].tolist(), strict=True):
            logits = module(torch.tensor([document])).logits[0, -1].double().tolist()
            weights = [math.exp(value - max(logits)) for value in logits]
            cumulated = list(itertools.accumulate(weights))
            document.append(next(i for i, mass in enumerate(cumulated) if mass > number * cumulated[-1]))
    return [document[1:] for document in documents]


def test_documents_are_drawn_from_the_networks_own_distribution(llama):
    module = AutoModelForCausalLM.from_pretrained(llama).eval()
    found = sample_documents(module, 3, 4, 7, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert found.tolist() == naive_documents(module, 3, 4, 7, torch.Generator().manual_seed(1))
    assert len(set(map(tuple, found.tolist()))) == 4


@pytest.mark.parametrize(("heads", "shared", "scale"), [(6, 6, None), (6, 2, None), (3, 1, 0.2)])
def test_attention_of_one_query_is_the_definition(heads, shared, scale):
    random = torch.Generator().manual_seed(2)
    query = torch.randn(2, heads, 1, 5, generator=random)
    keys, values = torch.randn(2, shared, 7, 5, generator=random), torch.randn(2, shared, 7, 3, generator=random)
    found = attend(query, keys, values, scale)
    for i, h in itertools.product(range(2), range(heads)):
        mine = keys[i, h * shared // heads].double(), values[i, h * shared // heads].double()
        weights = [math.exp(float(query[i, h, 0].double() @ key) * (scale or 5**-0.5)) for key in mine[0]]
        wanted = sum(weight * value for weight, value in zip(weights, mine[1], strict=True)) / sum(weights)
        torch.testing.assert_close(found[i, h, 0].double(), wanted, rtol=1e-5, atol=1e-6)


class Watching(TorchFunctionMode):
    """Notes how many queries torch's own attention is asked for, each time that it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append(args[0].shape[-2])
        return func(*args, **(kwargs or {}))


def test_only_one_query_without_a_mask_is_attended_to_otherwise():
    generator = torch.Generator().manual_seed(0)
    two, one = (torch.randn(1, 2, n, 4, generator=generator) for n in (2, 1))
    attention = torch.nn.functional.scaled_dot_product_attention
    with Watching() as watching, SingleQueries():
        attention(two, two, two, is_causal=True)
        attention(one, two, two, attn_mask=torch.ones(1, 1, 1, 2, dtype=torch.bool))
        assert watching.seen == [2, 1]
        found = attention(one, two, two, scale=0.5)
    assert watching.seen == [2, 1]
    torch.testing.assert_close(found, attention(one, two, two, scale=0.5))


def test_what_is_kept_of_tokens_is_written_beside_what_is_there():
    kept = DynamicLayer()
    parts = [torch.randn(2, 3, n, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 3)]
    kept.update(parts[0], -parts[0])
    roomy = Roomy(kept, 6)
    keys, _ = roomy.update(parts[1], -parts[1])
    first = keys.data_ptr()
    keys, values = roomy.update(parts[2], -parts[2])
    assert keys.data_ptr() == first and roomy.get_seq_length() == 6
    torch.testing.assert_close(keys, torch.cat(parts, 2), rtol=0, atol=0)
    torch.testing.assert_close(values, -keys, rtol=0, atol=0)


def test_the_networks_own_attention_is_replaced(llama):
    module = AutoModelForCausalLM.from_pretrained(llama).eval()
    with Watching() as watching, torch.no_grad():
        sample_documents(module, 3, 2, 5, torch.Generator().manual_seed(1))
        assert watching.seen == []
        module(torch.tensor([[3]]))
    assert watching.seen == [1] * module.config.num_hidden_layers


def test_the_same_seed_draws_the_same_text_whatever_the_global_seed(llama, tmp_path):
    torch.manual_seed(1)
    first = drawn(llama, tmp_path / "a")
    torch.manual_seed(2)
    assert torch.equal(first, drawn(llama, tmp_path / "b"))
    assert not torch.equal(first, drawn(llama, tmp_path / "c", seed=9))
    assert first.shape == (5, 6)


def test_batches_that_are_finished_are_not_drawn_again(llama, tmp_path):
    whole = drawn(llama, tmp_path / "a", n=WINDOWS_AT_ONCE + 3)
    finished, last = (tmp_path / "a" / f"generated-{number}.safetensors" for number in (0, 1))
    save_file({"tokens": torch.full((WINDOWS_AT_ONCE, 6), MARK)}, finished)
    last.unlink()
    again = drawn(llama, tmp_path / "a", n=WINDOWS_AT_ONCE + 3)
    assert bool((again[:WINDOWS_AT_ONCE] == MARK).all())
    assert torch.equal(again[WINDOWS_AT_ONCE:], whole[WINDOWS_AT_ONCE:])


@pytest.mark.parametrize(
    ("added", "config", "expected"),
    [
        ([{"id": 5, "content": "<|endoftext|>"}], {"bos_token_id": 1}, 5),
        ([{"id": 5, "content": "<|im_start|>"}], {"bos_token_id": 1}, 1),
        ([], {"bos_token_id": None, "eos_token_id": [2, 4]}, 2),
    ],
)
def test_a_document_begins_after_the_separator_or_else_bos(llama, tmp_path, added, config, expected):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    checkpoint = open_checkpoint(llama)
    checkpoint.config = {**(checkpoint.config or {}), **config}
    assert start_token(checkpoint, tmp_path) == expected


def test_a_model_without_a_first_token_is_refused(llama, tmp_path):
    checkpoint = open_checkpoint(llama)
    checkpoint.config = {**(checkpoint.config or {}), "bos_token_id": None, "eos_token_id": None}
    with pytest.raises(DataError, match="names no token that text begins with; write bos_token_id in config.json, or"):
        start_token(checkpoint, tmp_path)


def test_what_is_no_decoder_writes_no_text(bert, tmp_path):
    with pytest.raises(DataError, match="writes no text; set generated to 0"):
        start_token(open_checkpoint(bert), tmp_path)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_the_share_of_generated_windows_is_the_recipes_and_they_are_spread(llama, share, expected):
    text, written = Text("text", (pico.text(1),)), torch.full((16, 16), MARK)
    chosen = recipe(Calibration(tokens=256, window=32, generated=share), Distill(tokens=256, generated=share, steps=1))
    for batches, n in ((calibration_batches(text, chosen, llama, 0, written), 8),
                       (learning_batches(text, chosen, llama, 0, written), 16)):  # fmt: skip
        rows = torch.cat([batch["input_ids"] for batch in batches])
        is_written = (rows == MARK).all(1)
        assert len(rows) == n
        assert int(is_written.sum()) == expected * n // 8
        assert bool(((rows == MARK).any(1) == is_written).all())
        assert int(is_written[: n // 2].sum()) == expected * n // 16


def test_real_windows_do_not_depend_on_what_is_generated_beside_them(llama):
    text, written = Text("text", (pico.text(1),)), torch.full((16, 16), MARK)
    mixed = recipe(Calibration(tokens=256, window=32, generated=0.5), Distill())
    plain = recipe(Calibration(tokens=128, window=32), Distill())
    rows = torch.cat([batch["input_ids"] for batch in calibration_batches(text, mixed, llama, 0, written)])
    alone = torch.cat([batch["input_ids"] for batch in calibration_batches(text, plain, llama, 0)])
    assert torch.equal(rows[(rows != MARK).all(1)], alone)


@pytest.mark.parametrize(
    ("calibration", "distill", "expected"),
    [
        (Calibration(), Distill(steps=4), 0),
        (Calibration(tokens=1024, window=64, generated=0.5), Distill(), 16),
        (Calibration(tokens=1024, window=64, generated=0.5), Distill(steps=2, tokens=8192, generated=0.5), 64),
        (Calibration(tokens=1024, window=64), Distill(tokens=8192, generated=0.5), 0),
    ],
)
def test_only_what_is_used_is_generated(calibration, distill, expected):
    assert n_generated(recipe(calibration, distill)) == expected


def test_networks_that_go_on_from_what_they_keep_may_write(llama, tmp_path):
    for model in (llama, pico.gpt2(tmp_path / "gpt2")):
        refuse_forgetful(open_checkpoint(model))


@pytest.mark.parametrize("kind", ["openai_gpt", "mamba"])
def test_a_network_that_would_read_its_whole_text_again_is_refused_before_any_work(tmp_path, kind):
    model = getattr(pico, kind)(tmp_path / "model")
    options = RunOptions(model=str(model), recipe="llm-2bit", output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot write text a token at a time .*set distill.generated=0"):
        prepare(options)
    prepare(dataclasses.replace(options, sets=("calibration.generated=0", "distill.generated=0")))
