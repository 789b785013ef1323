"""Peak memory in the plan: each stage that a recipe asks for is counted, and a limit names what would keep it."""

from __future__ import annotations

import json
import math

import pytest

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import ResourceError
from compressor.plan.memory import BASE, refuse_beyond
from compressor.plan.planning import make_plan
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
