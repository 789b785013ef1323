"""Peak memory in the plan: each stage that a recipe asks for is counted, and a limit names what would keep it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import ResourceError
from compressor.plan.memory import BASE, peak_memory, refuse_beyond
from compressor.plan.planning import make_plan
from compressor.plan.recipe import TOKENS_PER_BATCH
from compressor.plan.recipe_file import load_recipe

LEARNING = "distill.steps=8"
FEW = ("calibration.tokens=4096", "calibration.token_importance=false", "evaluation.tokens=0")
WIDTH, INNER, VOCABULARY, LAYERS = 512, 1024, 200, 60
"""Of a small table: the blocks have the peak."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": INNER, "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """Headers of a network that is large enough to count; the file's bytes are a hole."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        block = {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (128, WIDTH), "self_attn.v_proj": (128, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return open_checkpoint(tmp_path)


def peak(checkpoint, *sets: str) -> int:
    return make_plan(checkpoint, load_recipe("llm-2bit-fast", [*FEW, *sets])).peak_memory


@pytest.mark.parametrize(("drift", "n"), [(0.0, 2), (0.5, 4)])
def test_states_of_a_block_are_counted_twice_each_in_four_bytes(checkpoint, drift, n):
    width, share = checkpoint.config["hidden_size"], f"calibration.drift={drift}"
    more = peak(checkpoint, share, "calibration.tokens=8192") - peak(checkpoint, share)
    assert more == pytest.approx(n * 4 * width * 4096, abs=1)


@pytest.mark.parametrize(("method", "more"), [("rtn", False), ("gptq", True)])
def test_drift_costs_nothing_where_no_pass_looks_at_inputs(checkpoint, method, more):
    def cost(share: float) -> tuple[int, float]:
        sets = [
            f"affine.method={method}",
            "affine.sweeps=0",
            "calibration.token_importance=false",
            f"calibration.drift={share}",
        ]
        plan = make_plan(checkpoint, load_recipe("llm-4bit", sets))
        return plan.peak_memory, plan.cpu_seconds

    with_drift, without = cost(0.5), cost(0.0)
    assert (with_drift[0] > without[0], with_drift[1] > without[1]) == (more, more)


@pytest.mark.parametrize("setting", [LEARNING, "calibration.token_importance=true", "calibration.generated=0.5"])
def test_what_a_recipe_asks_for_costs_memory(checkpoint, setting):
    assert peak(checkpoint, setting) > peak(checkpoint) > BASE


def test_inputs_of_blocks_are_not_there_while_a_table_of_its_own_is_encoded(checkpoint):
    config = {**CONFIG, "vocab_size": 20_000}
    tensors = make_plan(checkpoint, load_recipe("llm-2bit-fast", FEW)).tensors
    large = [replace(each, shape=(20_000, WIDTH)) if each.role == "embedding" else each for each in tensors]
    few, many = (
        peak_memory(large, config, load_recipe("llm-2bit-fast", [*FEW, f"calibration.tokens={n}"]))
        for n in (2048, 4096)
    )
    assert few == many


def test_a_forward_of_a_batch_is_counted_by_what_layers_give(checkpoint):
    plan = make_plan(checkpoint, load_recipe("llm-4bit", FEW))
    wider = [replace(each, matrix=(2 * each.matrix[0], each.matrix[1])) for each in plan.tensors]
    recipe = load_recipe("llm-4bit", FEW)
    more = peak_memory(wider, CONFIG, recipe) - peak_memory(plan.tensors, CONFIG, recipe)
    assert more == 4 * TOKENS_PER_BATCH * (3 * WIDTH + 2 * 128 + 2 * INNER)


def test_logits_of_a_batch_and_the_whole_network_are_counted_where_a_pass_makes_it_smaller(checkpoint):
    plan = make_plan(checkpoint, load_recipe("llm-width", FEW))
    weights = 4 * sum(math.prod(each.shape) for each in plan.tensors)
    assert plan.peak_memory > BASE + 2 * weights + 3 * 4 * TOKENS_PER_BATCH * VOCABULARY


def test_evaluation_is_counted(checkpoint):
    several = {**CONFIG, "vocab_size": 50_000}
    plan = make_plan(checkpoint, load_recipe("llm-4bit", FEW))
    large = [replace(each, shape=(50_000, 64)) if each.role == "embedding" else each for each in plan.tensors]
    proved, judged = (
        peak_memory(large, several, load_recipe("llm-4bit", [*FEW[:2], f"evaluation.tokens={n}"])) for n in (0, 4096)
    )
    assert judged > max(proved, BASE + 2 * 4 * 512 * 50_000)  # a window's logits, the original's and the artifact's


def test_more_text_to_learn_from_costs_no_memory(checkpoint):
    assert peak(checkpoint, LEARNING, "distill.tokens=65536") == peak(checkpoint, LEARNING, "distill.tokens=32768")


def test_a_limit_is_refused_with_what_would_keep_it(checkpoint):
    recipe = load_recipe("llm-2bit-fast", [*FEW, LEARNING])
    plan, without = make_plan(checkpoint, recipe), peak(checkpoint)
    refuse_beyond(plan.peak_memory, plan, checkpoint.config, recipe)
    with pytest.raises(ResourceError, match=r"^--max-ram: llm-2bit-fast needs about .*--set distill\.steps=0$"):
        refuse_beyond(without, plan, checkpoint.config, recipe)


def test_a_limit_that_nothing_keeps_says_so(checkpoint):
    recipe = load_recipe("llm-2bit-fast", [*FEW, LEARNING])
    plan = make_plan(checkpoint, recipe)
    with pytest.raises(ResourceError, match=r"distill\.steps=0.*; for less give another recipe"):
        refuse_beyond(BASE // 2, plan, checkpoint.config, recipe)
