"""Gradients of weights that were streamed block by block are those of the whole network, sequence by sequence."""

from __future__ import annotations

import functools
import gc
import os
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from compressor.checkpoints import open_checkpoint
from compressor.core.batch import Batch
from compressor.core.errors import CheckpointError
from compressor.graph.blocks import layers, layout_of
from compressor.sweeps.gradients import GradientFiles, gather_gradients, load_gradients, mask_token, masked, next_tokens
from compressor.sweeps.network import Network
from compressor.sweeps.survey import head_of, survey
from tests import pico

SMOLLM2 = Path(os.environ.get("COMPRESSOR_CACHE", Path(__file__).parents[2] / ".cache")) / "smollm2"


def network_of(path: Path, arch: str | None = None) -> Network:
    return Network(open_checkpoint(path, arch=arch), fast=False)


def whole(path: Path, arch: str | None = None) -> nn.Module:
    module = open_checkpoint(path, arch=arch).build("cpu").requires_grad_(True)
    if hasattr(module, "config"):
        module.config.use_cache = False
    return module


def singles(batches: list[Batch]) -> list[Batch]:
    return [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(len(batch[next(iter(batch))]))]  # fmt: skip  # noqa: E501


def of_the_whole(module: nn.Module, losses) -> list[dict[str, Tensor]]:
    """Per sequence the gradient of every layer's weight as its matrix, by autograd through the whole network."""
    head = head_of(module)
    found = {
        name: layer for name, layer in layers(module).items() if not isinstance(layer, nn.Embedding) and layer != head
    }
    gradients = []
    for loss in losses:
        loss(module).backward()
        of_layers = {name: layout_of(layer).matrix(layer.weight.grad) for name, layer in found.items()
                     if layer.weight.grad is not None}  # fmt: skip
        gradients.append({name: gradient.clone() for name, gradient in of_layers.items()})
        module.zero_grad()
    return gradients


def gathered(network: Network, batches: list[Batch], folder: Path, p=1, seed: int = 4) -> list[dict[str, Tensor]]:
    """Per sequence what was streamed."""
    seen: list[dict[str, Tensor]] = []

    def watch(sequence: int, name: str, gradient: Tensor) -> None:
        while len(seen) <= sequence:
            seen.append({})
        assert name not in seen[sequence]
        seen[sequence][name] = gradient.clone()

    gather_gradients(network, batches, GradientFiles(folder, p, watch=watch), torch.Generator().manual_seed(seed))
    return seen


def assert_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """To 1e-5 of each gradient's size."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert gradient.norm() > 0, name
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def assert_files(network: Network, folder: Path, p: int, expected: list[dict[str, Tensor]]) -> None:
    """A file per block holds the sums over sequences of its weights."""
    files = {}
    for block in [*network.blocks, *(["outside"] if network.blocks != [""] else [])]:
        loaded = load_gradients(folder, block)
        if block not in ("", "outside"):
            assert all(name.startswith(f"{block}.") for name in loaded)
        files |= loaded
    assert files.keys() == expected[0].keys()
    for name, total in files.items():
        rows = torch.stack([gradients[name].double() for gradients in expected])
        sums = rows.abs().sum(0) if p == 1 else rows.pow(2).sum(0).sqrt()
        torch.testing.assert_close(total.double(), sums, rtol=1e-3, atol=1e-5 * float(sums.max()))
    left = {path.name for path in folder.glob("*") if path.is_file()}
    assert not [name for name in left if not name.endswith(".safetensors")]


def assert_clean(network: Network) -> None:
    for name, module in network.module.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    for name, parameter in network.module.named_parameters():
        assert parameter.is_meta, name
        assert not parameter.requires_grad, name


def next_token_loss(batch: Batch, module: nn.Module) -> Tensor:
    logits = module(**batch).logits[0]
    return functional.cross_entropy(logits[:-1], batch["input_ids"][0, 1:])


MODELS = {"llama": {}, "llama, untied": {"tied": False}, "gpt2": {}}


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_of_the_next_token_in_the_text(checkpoints, tmp_path, name, p):
    directory, batches = checkpoints(name.partition(",")[0], **MODELS[name]), pico.token_batches()
    network = network_of(directory)
    found = gathered(network, batches, tmp_path, p)
    expected = of_the_whole(
        whole(directory), [functools.partial(next_token_loss, batch) for batch in singles(batches)]
    )  # fmt: skip
    assert_equal(found, expected)
    assert_files(network, tmp_path, p, expected)
    assert_clean(network)


def test_of_logits_that_are_not_the_heads_output(tmp_path):
    config = transformers.Gemma2Config(
        vocab_size=pico.VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        num_key_value_heads=2, head_dim=6, final_logit_softcapping=2.0,
    )  # fmt: skip
    directory, batches = pico.saved(config, transformers.Gemma2ForCausalLM, tmp_path / "model"), pico.token_batches(2)
    expected = of_the_whole(
        whole(directory), [functools.partial(next_token_loss, batch) for batch in singles(batches)]
    )  # fmt: skip
    assert_equal(gathered(network_of(directory), batches, tmp_path), expected)


def masked_losses(batches: list[Batch], seed: int = 4):
    generator = torch.Generator().manual_seed(seed)
    pairs = [masked(batch, None, generator) for batch in singles(batches)]

    def loss(pair, module: nn.Module) -> Tensor:
        batch, labels = pair
        return functional.cross_entropy(module(**batch).logits[0], labels[0], ignore_index=-100)

    return [functools.partial(loss, pair) for pair in pairs]


def test_of_masked_tokens(bert, tmp_path):
    """The head's transform lies behind the blocks, in a file of its own."""
    batches = pico.token_batches()
    network = network_of(bert)
    found = gathered(network, batches, tmp_path)
    expected = of_the_whole(whole(bert), masked_losses(batches))
    assert_equal(found, expected)
    assert_files(network, tmp_path, 1, expected)
    assert load_gradients(tmp_path, "outside").keys() == {"cls.predictions.transform.dense.weight"}


@pytest.mark.parametrize("n_groups", [1, 2])
def test_of_layers_that_share_weights(checkpoints, tmp_path, n_groups):
    """Each is used several times: its gradient is the sum over its uses before its size is taken."""
    directory, batches = checkpoints("albert", n_groups=n_groups), pico.token_batches()
    network = network_of(directory)
    found = gathered(network, batches, tmp_path)
    expected = of_the_whole(whole(directory), masked_losses(batches))
    assert_equal(found, expected)
    assert_files(network, tmp_path, 1, expected)
    assert_clean(network)


def class_losses(batches: list[Batch], seed: int = 4):
    generator = torch.Generator().manual_seed(seed)

    def loss(batch: Batch, module: nn.Module) -> Tensor:
        logits = module(batch[""])
        label = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        return functional.cross_entropy(logits, label.flatten())

    return [functools.partial(loss, batch) for batch in singles(batches)]


@pytest.mark.parametrize(("kind", "shape"), [(pico.ResNet, (3, 3, 12, 12)), (pico.Tied, (3, 70))])
def test_of_classes_drawn_from_the_network(tmp_path, kind, shape):
    """Convolutions, also grouped ones, and a weight of two layers, in a network without blocks."""
    pico.write_state_dict(kind, tmp_path / "network.pt")
    arch = f"tests.pico:{kind.__name__}"
    batches = [{"": torch.randn(shape, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    network = network_of(tmp_path / "network.pt", arch)
    (tmp_path / "work").mkdir()
    found = gathered(network, batches, tmp_path / "work")
    expected = of_the_whole(whole(tmp_path / "network.pt", arch), class_losses(batches))
    assert_equal(found, expected)
    assert_files(network, tmp_path / "work", 1, expected)
    assert_clean(network)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Layered(nn.Module):
    """Vectors of sequences: a projection before the blocks, one behind them, no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv1d(7, 24, 3, padding=1), nn.Linear(24, 5)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class Sharing(Layered):
    """Its last block has the weight of its first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].inner.weight = self.blocks[0].inner.weight


@pytest.mark.parametrize("kind", [Layered, Sharing])
def test_of_outputs_with_noise(tmp_path, kind):
    """Layers before and behind the blocks as well; blocks that share a weight are not streamed."""
    pico.write_state_dict(kind, tmp_path / "network.pt")
    arch = f"tests.sweeps.test_survey:{kind.__name__}"
    batches = [{"": torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    generator = torch.Generator().manual_seed(4)

    def loss(batch: Batch, module: nn.Module) -> Tensor:
        output = module(batch[""])
        noise = torch.randn(output.shape[1:], generator=generator)
        return 0.5 * (output - (output.detach() + noise)).pow(2).sum(-1).mean()

    network = network_of(tmp_path / "network.pt", arch)
    (tmp_path / "work").mkdir()
    found = gathered(network, batches, tmp_path / "work")
    losses = [functools.partial(loss, batch) for batch in singles(batches)]
    expected = of_the_whole(whole(tmp_path / "network.pt", arch), losses)
    assert_equal(found, expected)
    assert_files(network, tmp_path / "work", 1, expected)
    assert load_gradients(tmp_path / "work", "outside").keys() == {"enter.weight", "leave.weight"}
    assert_clean(network)


def test_the_survey_gathers_what_is_wanted(llama, tmp_path):
    batches = pico.token_batches()
    wanted = [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)]
    steps: list[None] = []
    network = network_of(llama)
    found = survey(
        network, batches, tmp_path, False, torch.Generator().manual_seed(0), lambda: steps.append(None), 1, wanted
    )
    assert found.head_moment is not None
    assert not found.importance
    assert len(steps) == 3 * 3
    assert {path.name for path in tmp_path.glob("gradients*")} == {
        f"gradients-{block}.safetensors" for block in ("model.layers.1", "model.layers.2", "outside")
    }
    assert load_gradients(tmp_path, "model.layers.1").keys() == {wanted[0]}
    both = survey(network_of(llama), batches, tmp_path, True, torch.Generator().manual_seed(0), weight_gradients=2)
    assert len(both.importance) == 3 * 8
    assert len(load_gradients(tmp_path, "model.layers.0")) == 7
    assert not list(tmp_path.glob("hidden-*"))


def test_a_survey_of_a_network_without_head_has_gradients_alone(tmp_path):
    pico.write_state_dict(pico.ResNet, tmp_path / "network.pt")
    batches = [{"": torch.randn(2, 3, 12, 12)}]
    network = network_of(tmp_path / "network.pt", "tests.pico:ResNet")
    found = survey(network, batches, tmp_path, True, torch.Generator(), weight_gradients=2)
    assert (found.importance, found.head_moment) == ({}, None)
    assert load_gradients(tmp_path, "")["stem.weight"].shape == (20, 75)


def live_bytes() -> int:
    """Of all real tensors that Python holds; those that other tests traced with have no memory."""
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter) and not found.is_meta:
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_number_of_blocks(checkpoints, tmp_path):
    """At every gradient of a block there are its own weights and sums, and those of no other."""
    peaks = []
    for n_layers in (2, 7):
        network = network_of(checkpoints("llama", n_layers=n_layers))
        gc.collect()
        before, peak = live_bytes(), [0]

        def watch(sequence: int, name: str, _: Tensor, peak=peak) -> None:
            if name.endswith("down_proj.weight"):
                peak[0] = max(peak[0], live_bytes())

        folder = tmp_path / f"work-{n_layers}"
        folder.mkdir()
        gather_gradients(network, pico.token_batches(), GradientFiles(folder, 1, watch=watch), torch.Generator())
        peaks.append(peak[0] - before)
    assert peaks[0] > 100_000
    assert peaks[1] < 1.05 * peaks[0]


def test_gradients_that_are_not_finite_are_refused_by_name(llama, tmp_path):
    network = network_of(llama)
    head = 1e30 * open_checkpoint(llama).read("model.embed_tokens.weight").float()
    network.replace("model.embed_tokens.weight", lambda: head)
    with pytest.raises(CheckpointError, match=r"the gradient of 'model.layers.2\S*' is not finite"):
        survey(network, pico.token_batches(), tmp_path, False, torch.Generator(), weight_gradients=1)
    assert not list(tmp_path.glob("hidden-*"))


def test_labels():
    ids = torch.tensor([[5, 6, 7, 8]])
    assert next_tokens({"input_ids": ids}).tolist() == [[6, 7, 8, -100]]
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert next_tokens(padded).tolist() == [[6, 7, -100, -100]]
    ids, kept = torch.arange(100, 140)[None], torch.tensor([[1] * 30 + [0] * 10])
    batch, labels = masked({"input_ids": ids, "attention_mask": kept}, 3, torch.Generator().manual_seed(0))
    chosen = (labels >= 0).flatten()
    assert int(chosen.sum()) == round(0.15 * 30)
    assert not bool(chosen[30:].any())
    assert (batch["input_ids"][0, chosen] == 3).all()
    assert torch.equal(labels[0, chosen], ids[0, chosen])
    assert torch.equal(batch["input_ids"][0, ~chosen], ids[0, ~chosen])


def test_the_mask_is_found_in_the_tokenizers_files(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[MASK]\nC\n")
    (tmp_path / "merges.txt").write_text("")
    assert mask_token([tmp_path / "merges.txt", tmp_path / "vocab.txt"]) == 2
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"content": "<mask>", "id": 50264}]}')
    assert mask_token([tmp_path / "tokenizer.json"]) == 50264
    assert mask_token([tmp_path / "merges.txt"]) is None


@pytest.mark.slow
def test_of_smollm2(tmp_path):
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is absent; run scripts/fetch_material smollm2")
    batches = pico.token_batches(1, 2, 48)
    expected = of_the_whole(whole(SMOLLM2), [functools.partial(next_token_loss, batch) for batch in singles(batches)])
    assert_equal(gathered(network_of(SMOLLM2), batches, tmp_path), expected)
