"""Streamed block by block, a network computes what it computes as a whole: outputs, second moments, gradients."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError
from compressor.graph.blocks import layers, unfold_inputs
from compressor.ops.draws import draw
from compressor.sweeps.moments import layer_stages, second_moments
from compressor.sweeps.network import Network
from compressor.sweeps.survey import LARGEST_IMPORTANCE, Survey, head_inputs, head_of, survey
from tests import pico

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}


def network_of(directory, fast: bool = False) -> Network:
    return Network(open_checkpoint(directory), fast=fast)


def whole(directory) -> nn.Module:
    module = open_checkpoint(directory).build("cpu").requires_grad_(False)
    module.config.use_cache = False
    return module


@pytest.fixture(params=BLOCKS)
def model(request, checkpoints):
    return checkpoints(request.param), BLOCKS[request.param]


def test_blocks_are_found_in_order(model):
    directory, prefix = model
    network = network_of(directory)
    assert network.blocks == [f"{prefix}.{i}" for i in range(len(network.blocks))]
    assert len(network.blocks) > 1
    assert not any(name.startswith(prefix) for name in network.outside)
    inside = {name for block in network.blocks for name in network.names_in(block)}
    assert inside | set(network.outside) == set(network.module.state_dict())


@torch.no_grad()
def test_a_sweep_is_the_whole_forward(model):
    directory, _ = model
    network, module, batches = network_of(directory), whole(directory), pico.token_batches()
    visited = [name for name, _, _ in network.sweep(batches)]
    assert visited == network.blocks
    with network.tail() as run:
        found = [run(batch, state).logits for batch, state in zip(batches, network.last, strict=True)]
    for batch, logits in zip(batches, found, strict=True):
        torch.testing.assert_close(logits, module(**batch).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_the_block_that_is_due_is_in_memory(llama):
    network = network_of(llama)
    for name, block, _ in network.sweep(pico.token_batches()):
        real = {key for key, parameter in network.module.named_parameters() if not parameter.is_meta}
        assert real == {f"{name}.{key}" for key, _ in block.named_parameters()}
    assert all(parameter.is_meta for parameter in network.module.parameters())


def test_nothing_is_left_behind(model):
    network = network_of(model[0])
    head_inputs(network, pico.token_batches(), lambda: None)
    for name, module in network.module.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert "forward" not in vars(module), name


@torch.no_grad()
def test_a_replaced_tensor_is_what_the_network_computes_with(llama):
    network, module, batches = network_of(llama), whole(llama), pico.token_batches()
    other = 2 * module.model.embed_tokens.weight.data
    module.model.embed_tokens.weight.data = other  # tied: the head's as well
    network.replace("model.embed_tokens.weight", lambda: other)
    for _ in network.sweep(batches):
        pass
    with network.tail() as run:
        found = run(batches[0], network.last[0]).logits
    torch.testing.assert_close(found, module(**batches[0]).logits, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_what_a_block_is_given_changes_what_follows(llama):
    network, module, batches = network_of(llama), whole(llama), pico.token_batches()
    for name, block, _ in network.sweep(batches):
        if name.endswith(".1"):
            block.mlp.down_proj.weight.data *= 0.5
    module.model.layers[1].mlp.down_proj.weight.data *= 0.5
    with network.tail() as run:
        found = run(batches[2], network.last[2]).logits
    torch.testing.assert_close(found, module(**batches[2]).logits, rtol=1e-5, atol=1e-5)


STAGES = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
    ],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "bert": [
        ["attention.self.query", "attention.self.key", "attention.self.value"], ["attention.output.dense"],
        ["intermediate.dense"], ["output.dense"],
    ],
}  # fmt: skip


def caught_inputs(module: nn.Module, names: list[str], batches) -> dict[str, list[torch.Tensor]]:
    """The inputs of layers, by hooks on the whole model."""
    caught: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        layer = module.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: caught[name].append(unfold_inputs(layer, args[0]))
        )
    with torch.no_grad():
        for batch in batches:
            module(**batch)
    return caught


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", BLOCKS)
def test_second_moments_are_those_of_the_whole_model(checkpoints, name, weighted):
    directory = checkpoints(name)
    network, module, batches = network_of(directory), whole(directory), pico.token_batches()
    names = [f"{BLOCKS[name]}.1.{layer}.weight" for stage in STAGES[name] for layer in stage]
    inputs = {key: torch.cat(rows) for key, rows in caught_inputs(module, names, batches).items()}
    generator = torch.Generator().manual_seed(0)
    n_tokens = len(inputs[names[0]])
    importance = {key: torch.rand(n_tokens, generator=generator) for key in names} if weighted else {}
    found: dict[str, torch.Tensor] = {}
    for block_name, block, reached in network.sweep(batches):
        if not block_name.endswith(".1"):
            continue
        prefix = f"{block_name}."
        stages = layer_stages(network, block, prefix, reached[0])
        expected = [[f"{prefix}{layer}.weight" for layer in stage] for stage in STAGES[name]]
        assert [stage.names for stage in stages] == expected
        for stage in stages:
            of, _ = second_moments(network, block, layers(block, prefix), stage.names, stage.calls, reached, importance)
            found |= of
    for key, rows in inputs.items():
        weights = importance.get(key, torch.ones(n_tokens))
        expected = (rows.T * weights) @ rows / n_tokens
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-5)


def whole_gradients(directory, batches, seed: int):
    """Per layer and per block the mean-square gradient of every token, by autograd through the whole model."""
    module = whole(directory).requires_grad_(True)
    of_layers: dict[str, list[torch.Tensor]] = {}
    of_blocks: dict[str, list[torch.Tensor]] = {}

    def keep(store, key):
        def hook(_, __, output):
            output = output if isinstance(output, torch.Tensor) else output[0]
            output.register_hook(lambda gradient: store.setdefault(key, []).append(gradient.flatten(0, -2).pow(2)))

        return hook

    names = Network(open_checkpoint(directory), fast=False).blocks
    for name in names:
        block = module.get_submodule(name)
        block.register_forward_hook(keep(of_blocks, name))
        for weight, layer in layers(block, f"{name}.").items():
            layer.register_forward_hook(keep(of_layers, weight))
    generator = torch.Generator().manual_seed(seed)
    head_rows = []
    head_of(module).register_forward_pre_hook(lambda _, args: head_rows.append(args[0].detach().flatten(0, -2)))
    for batch in batches:
        logits = module(**batch).logits.flatten(0, -2)
        chances = torch.rand(len(logits), 1, generator=generator)
        labels = draw(logits.detach().softmax(-1), chances).flatten()
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return of_layers, of_blocks, torch.cat(head_rows)


def shares(values: torch.Tensor) -> torch.Tensor:
    return (values / values.mean()).clamp(max=LARGEST_IMPORTANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_importance_is_the_gradient_of_the_whole_model(checkpoints, tmp_path, name):
    directory, batches = checkpoints(name), pico.token_batches(size=3)
    found = survey(network_of(directory), batches, tmp_path, True, torch.Generator().manual_seed(4))
    of_layers, of_blocks, head_rows = whole_gradients(directory, batches, 4)
    assert found.importance.keys() == of_layers.keys() | of_blocks.keys()
    for key, parts in (of_layers | of_blocks).items():
        torch.testing.assert_close(
            found.importance[key],
            shares(torch.cat(parts).mean(1)),
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, k=key: f"{k}: {m}",
        )
    for key, parts in of_blocks.items():
        torch.testing.assert_close(found.channels[key], shares(torch.cat(parts).sum(0)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.head_moment, head_rows.T @ head_rows / len(head_rows), rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("hidden-*"))


def test_a_survey_without_gradients_gives_the_heads_moment_alone(bert, tmp_path):
    batches = pico.token_batches()
    found = survey(network_of(bert), batches, tmp_path, False, torch.Generator())
    rows = torch.cat(caught_inputs(whole(bert), ["cls.predictions.decoder"], batches)["cls.predictions.decoder"])
    torch.testing.assert_close(found.head_moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert not found.importance


def test_a_survey_is_packed_and_unpacked(llama, tmp_path):
    found = survey(network_of(llama), pico.token_batches(), tmp_path, True, torch.Generator().manual_seed(1))
    again = Survey.unpack(found.pack())
    assert again.importance.keys() == found.importance.keys()
    for first, second in ((found.importance, again.importance), (found.channels, again.channels)):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(again.head_moment, found.head_moment)
    assert Survey.unpack(Survey().pack()) == Survey()


def test_head_inputs_are_the_whole_models(checkpoints):
    directory, batches = checkpoints("llama", tied=False), pico.token_batches()
    expected = caught_inputs(whole(directory), ["lm_head"], batches)["lm_head"]
    for found, rows in zip(head_inputs(network_of(directory), batches, lambda: None), expected, strict=True):
        torch.testing.assert_close(found.float(), rows, rtol=1e-2, atol=1e-2)


def test_gradients_that_are_not_finite_are_refused_by_name(llama, tmp_path):
    network = network_of(llama)
    head = 1e30 * open_checkpoint(llama).read("model.embed_tokens.weight").float()
    network.replace("model.embed_tokens.weight", lambda: head)
    with pytest.raises(CheckpointError, match=r"the gradient at 'model.layers.2\S*' is not finite"):
        survey(network, pico.token_batches(), tmp_path, True, torch.Generator())


@torch.no_grad()
def test_layers_that_share_weights_are_one_block(checkpoints, tmp_path):
    directory = checkpoints("albert")
    network, module, batches = network_of(directory), whole(directory), pico.token_batches()
    assert (network.blocks, network.outside) == ([""], [])
    for name, block, reached in network.sweep(batches):
        assert (name, block) == ("", network.module)
        for batch, (args, kwargs) in zip(batches, reached, strict=True):
            torch.testing.assert_close(block(*args, **kwargs).logits, module(**batch).logits, rtol=1e-5, atol=1e-5)
        stages = layer_stages(network, block, "", reached[0])
        calls = {name.rsplit(".", 2)[1]: stage.calls for stage in stages for name in stage.names}
        assert (calls["query"], calls["ffn"], calls["embedding_hidden_mapping_in"]) == (4, 4, 1)
        names = [f"{ALBERT_LAYER}.attention.{part}.weight" for part in ("query", "key", "value")]
        moments, _ = second_moments(network, block, layers(block), names, 4, reached, {})
    rows = torch.cat(caught_inputs(module, names, batches)[names[0]])
    torch.testing.assert_close(moments[names[1]], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert survey(network_of(directory), batches, tmp_path, True, torch.Generator()).importance == {}


ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"


@torch.no_grad()
def test_groups_of_layers_that_are_called_twice_turn_out_to_be_one_block(checkpoints):
    directory = checkpoints("albert", n_groups=2)
    network, module, batches = network_of(directory), whole(directory), pico.token_batches()
    visited = []
    for name, block, reached in network.sweep(batches):
        visited.append(name)
        for batch, (args, kwargs) in zip(batches, reached, strict=True):
            torch.testing.assert_close(block(*args, **kwargs).logits, module(**batch).logits, rtol=1e-4, atol=1e-4)
    assert visited == network.blocks == [""]


class Parallel(nn.Module):
    """Alike layers that are called in order, but each on the same hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))

    def forward(self, x):
        return [head(x) for head in self.heads]


class Interrupted(Parallel):
    """Something is computed between the layers."""

    def forward(self, x):
        for head in self.heads:
            x = head(x).relu_()
        return x


@torch.no_grad()
@pytest.mark.parametrize("kind", [Parallel, Interrupted])
def test_alike_layers_that_are_no_chain_are_one_block(tmp_path, kind):
    pico.write_state_dict(kind, tmp_path / "weights.pt")
    network = Network(open_checkpoint(tmp_path / "weights.pt", arch=f"{__name__}:{kind.__name__}"), fast=False)
    assert network.blocks == ["heads.0", "heads.1", "heads.2"]
    assert [name for name, _, _ in network.sweep([{"": torch.randn(4, 9)}])] == network.blocks == [""]


@torch.no_grad()
def test_blocks_that_are_called_with_other_masks_stream_as_well(tmp_path):
    config = transformers.Gemma3TextConfig(
        vocab_size=pico.VOCABULARY, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40,
        num_key_value_heads=2, head_dim=6, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    directory = pico.saved(config, transformers.Gemma3ForCausalLM, tmp_path)
    network, module, batches = network_of(directory), whole(directory), pico.token_batches()
    for _ in network.sweep(batches):
        pass
    with network.tail() as run:
        found = run(batches[0], network.last[0]).logits
    torch.testing.assert_close(found, module(**batches[0]).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_that_do_not_run_in_bfloat16_are_run_in_float32(tmp_path, llama):
    config = transformers.DebertaConfig(
        vocab_size=pico.VOCABULARY, hidden_size=72, intermediate_size=100, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0,
    )  # fmt: skip
    directory = pico.saved(config, transformers.DebertaForMaskedLM, tmp_path / "deberta")
    quick, exact, batches = network_of(directory, fast=True), network_of(directory), pico.token_batches()
    assert len(quick.blocks) == 2
    for network in (quick, exact):
        for _ in network.sweep(batches):
            pass
    assert not quick.fast
    assert all(torch.equal(a, b) for a, b in zip(quick.last, exact.last, strict=True))
    untouched = network_of(llama, fast=True)
    next(untouched.sweep(batches))
    assert untouched.fast
