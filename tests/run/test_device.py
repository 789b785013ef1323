"""--device: a language model's run whose blocks are on a pretended GPU, to the host's bytes; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from compressor.core.device import device_of, repeatable
from compressor.core.errors import UsageError
from compressor.core.options import RunOptions
from compressor.learning.head import Head
from compressor.learning.objectives import Wanted, divergence
from compressor.plan.recipe_file import load_recipe
from compressor.run.identity import identity_of
from compressor.run.pipeline import run
from compressor.run.prepare import prepare
from tests import pico
from tests.core.interrupting import Interrupting
from tests.pretended_gpu import GPU, WrongPlace, pretended_gpu

SMALL = (
    "calibration.tokens=64", "calibration.window=16", "embeddings.sweeps=0", "evaluation.tokens=0",
    "evaluation.speed=false",
)  # fmt: skip
RECIPES = {
    "fast": """
imports: [llm-2bit-fast]
passes: [{pass: trellis, window: 6, select: '*layers.0.*q_proj*'}]
embeddings: {sweeps: 1, refined: 16}
""",
    "learned": """
imports: [llm-2bit]
passes: [{pass: trellis, window: 6, select: '*layers.1.*down_proj*'}]
embeddings: {refined: 16}
distill: {steps: 2, tokens: 128}
""",
    "pruned": """
passes: [{pass: gblm, select: '*experts.0.down*'}, {pass: affine, method: gptq, select: '*experts.0.down*', bits: 4}]
embeddings: {bits: 4, group: 16}
calibration: {token_importance: false}
""",
    "blocks": """
passes: [{pass: jlcm, select: '*layers.1.*dense.*', width: 4, dim: 2, group: 16, codebooks: 2, block_steps: 1}]
calibration: {inputs: prefix}
embeddings: {bits: 4, group: 16}
distill: {steps: 1, tokens: 16, mapping_rate: 0.1}
""",
    "encoder": """
imports: [encoder-4bit]
passes: [{pass: affine, select: '*query*'}]
calibration: {correct_means: true, token_importance: false}
""",
}
HEAVY = {
    "aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::linalg_cholesky_ex", "aten::cholesky_inverse",
    "aten::linalg_solve_triangular", "aten::embedding", "aten::silu", "aten::_fused_adam_",
}  # fmt: skip
"""Operators that blocks, their moments, error feedback and learning are made of."""


COMMON = {
    "vocab_size": pico.VOCABULARY, "hidden_size": 64, "intermediate_size": 76, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
"""Few columns: each operator takes its time to be watched."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(**COMMON, num_key_value_heads=1, tie_word_embeddings=True)
    return pico.saved(config, transformers.LlamaForCausalLM, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    """What each recipe is for: a mixture of experts, a decoder whose head has a bias, an encoder that is one block."""
    folder = tmp_path_factory.mktemp("sources")
    experts = transformers.MixtralConfig(**COMMON, num_key_value_heads=1, num_local_experts=3)
    return {
        "fast": model,
        "learned": model,
        "pruned": pico.saved(experts, transformers.MixtralForCausalLM, folder / "experts"),
        "blocks": pico.saved(transformers.PhiConfig(**COMMON), transformers.PhiForCausalLM, folder / "biased"),
        "encoder": pico.albert(folder / "albert"),
    }


@pytest.fixture(autouse=True)
def floats_alone(monkeypatch) -> None:
    """Processors that multiply bfloat16 would use it, and the pretended GPU has none."""
    monkeypatch.setattr("compressor.sweeps.network.fast_bfloat16", lambda device="cpu": False)


def options(model: Path, recipe: str, output: str = "out", sets: tuple[str, ...] = (), **changes) -> RunOptions:
    known = {"data": "calibration.txt", "format": "safetensors"}
    return RunOptions(str(model), recipe, Path(output), sets=sets, **(known | changes))


def weights(asked: RunOptions) -> bytes:
    return (run(asked).directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_gives_the_bytes_of_the_host_and_does_the_work(texts, sources, name):
    Path("recipe.yaml").write_text(RECIPES[name])
    of_host = weights(options(sources[name], "recipe.yaml", "host", SMALL))
    with pretended_gpu() as gpu:
        assert weights(options(sources[name], "recipe.yaml", "gpu", SMALL, device="cuda")) == of_host
    assert gpu.ran[True]["aten::addmm_"]
    assert bool(gpu.ran[True]["aten::_fused_adam_"]) == ("distill" in RECIPES[name])
    assert not HEAVY & gpu.ran[False].keys()


def test_a_resumed_run_is_on_the_gpu_again(texts, model):
    Path("recipe.yaml").write_text("""
passes: [{pass: affine, method: gptq, select: '*o_proj*', bits: 4}]
embeddings: {bits: 4, group: 16}
""")
    asked = options(model, "recipe.yaml", "gpu", (*SMALL, "calibration.tokens=32"), device="cuda")
    of_host = weights(replace(asked, output=Path("host"), device="cpu"))
    interrupting = Interrupting("encoding", 0)
    with pretended_gpu():
        with pytest.raises(KeyboardInterrupt):
            run(replace(asked, progress=interrupting))
        assert weights(replace(asked, resume=True)) == of_host


def test_the_pretended_gpu_notices_a_tensor_in_the_wrong_place():
    with pretended_gpu():
        there, here = torch.ones(3, 3).to(GPU), torch.ones(3, 3)
        assert [each.device for each in (there, there.T, there @ there, there.cpu(), here)] == [
            GPU, GPU, GPU, here.device, here.device,
        ]  # fmt: skip
        for wrong in (
            lambda: there @ here,
            lambda: there + torch.zeros(3),
            lambda: there[torch.tensor([0])],
            lambda: here.diagonal().add_(there[0]),
            lambda: torch.zeros(()).add_(there.sum()),
            lambda: there.numpy(),
            lambda: there.normal_(generator=torch.Generator()),
            lambda: torch.rand(3, device=GPU, generator=torch.Generator()),
        ):
            with pytest.raises(WrongPlace):
                wrong()


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ("gpu", "--device gpu: no such device; give cpu, cuda, cuda:1 for the second GPU, or auto"),
        ("mps", "--device mps: no such device; "),
        ("cuda", "--device cuda: torch of this environment sees no GPU; "),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_work(texts, model, monkeypatch, command, asked, error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = command(f"{model} -r llm-2bit-fast -o out --data calibration.txt --device {asked}")
    assert (said.status, said.err.startswith(f"Error: {error}")) == (2, True)
    assert not Path("out.partial").exists()


def test_auto_is_a_gpu_where_there_is_one_and_the_run_can_be_on_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto", "") == "cpu"
    with pretended_gpu():
        assert device_of("auto", "") == device_of("cuda", "") == device_of("cuda:0", "") == "cuda:0"
        assert device_of("auto", "lrp runs on cpu alone") == "cpu"
        with pytest.raises(UsageError, match="torch sees 1 GPU; the last one is cuda:0"):
            device_of("cuda:1", "")


@pytest.mark.parametrize(
    ("recipe", "changes", "error"),
    [
        ("llm-depth", {"sets": ("n2n.remove=1",)}, "n2n runs on cpu alone; leave it out"),
        ("llm-4bit", {"target_size": 100_000}, "widths are allocated on cpu alone, for --target-size and --max-loss"),
        ("llm-4bit", {"workers": 2, "sets": ("calibration.inputs=original",)}, "--workers 2: blocks are encoded side"),
    ],
)
def test_what_runs_on_the_host_alone_is_refused_by_name(texts, model, recipe, changes, error):
    with pretended_gpu(), pytest.raises(UsageError, match=f"--device cuda: .*{error}"):
        prepare(options(model, recipe, device="cuda", **changes))


def test_a_network_of_somebodys_own_runs_on_the_host_alone(here):
    pico.write_state_dict(pico.Tied, here / "weights.pt")
    np.savez("data.npz", x=np.zeros((30, 70), np.float32))
    asked = RunOptions(
        "weights.pt", "encoder-4bit", Path("out"), data="data.npz", arch="tests.pico:Tied", format="safetensors",
        sets=("evaluation.tokens=0", "evaluation.samples=0"),
    )  # fmt: skip
    with pretended_gpu():
        with pytest.raises(UsageError, match="runs on cpu alone, as all do but language models and encoders"):
            prepare(replace(asked, device="cuda"))
        assert prepare(replace(asked, device="auto")).device == "cpu"


def test_a_heads_bias_has_its_gradient_where_it_lies():
    with pretended_gpu():
        table, bias, rows = (torch.ones(shape).to(GPU) for shape in ((5, 3), (5,), (2, 3)))
        found = divergence(rows, Head(table, bias), rows, Head(table), Wanted(True, True))
        assert found.to_bias is not None and found.to_bias.device == GPU


def test_a_gpu_is_asked_to_add_up_in_one_order_while_blocks_are_computed(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    asked = torch.are_deterministic_algorithms_enabled
    with repeatable("cpu"):
        assert not asked()
    with repeatable("cuda:0"):
        assert asked() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert not asked()


def test_a_plan_says_where_blocks_lie_and_whose_memory_it_is(texts, model):
    with pretended_gpu():
        start = prepare(options(model, "llm-2bit-fast", device="auto"))
    assert start.device == "cuda:0"
    assert (
        "blocks are on cuda:0, Pretended; planned are memory of both together, and the time of a cpu"
        in start.plan.notes
    )


def test_a_run_on_the_host_is_not_resumed_on_a_gpu(texts, model):
    with pretended_gpu():
        asked, recipe = options(model, "llm-2bit-fast"), load_recipe("llm-2bit-fast", ())
        there, here = (identity_of(asked, recipe, {}, 1, device) for device in ("cuda:0", "cpu"))
    assert there.difference(here) == "device is cpu there and Pretended here"
