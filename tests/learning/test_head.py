"""Logits are the network's own: divided, multiplied, softly capped, with a bias; and so are gradients by them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch.nn import functional

from compressor.checkpoints import open_checkpoint
from compressor.learning.head import Head, Logits
from compressor.learning.objectives import Wanted, divergence
from compressor.sweeps.backward import find_logits, head_of, label_gradient
from compressor.sweeps.network import Network
from compressor.sweeps.survey import head_inputs, measure_logits
from tests import pico

SIZES = {
    "vocab_size": pico.VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
NETWORKS = {
    "granite": ("Granite", {"logits_scaling": 8.0}, Logits(1 / 8)),
    "cohere": ("Cohere", {"logit_scale": 0.0625}, Logits(0.0625)),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 6}, Logits(1.0, 2.0)),
    "phi": ("Phi", {"num_attention_heads": 3, "num_key_value_heads": 3}, Logits()),
    "llama": ("Llama", {}, Logits()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_learned_on_are_the_originals_own_logits(tmp_path, name):
    kind, settings, expected = NETWORKS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | settings))
    directory = pico.saved(config, getattr(transformers, f"{kind}ForCausalLM"), tmp_path)
    network, batches = Network(open_checkpoint(directory), fast=False), pico.token_batches()
    rows = head_inputs(network, batches, lambda: None)
    measure_logits(network, batches[0])
    assert network.logits is not None
    assert network.logits.scale == pytest.approx(expected.scale, rel=1e-5)
    assert (network.logits.cap is None) == (expected.cap is None)
    module = open_checkpoint(directory).build("cpu")
    found = head_of(module)
    assert found is not None and (found.bias is not None) == (name == "phi")
    with torch.no_grad():
        head = Head(found.weight.float(), found.bias, network.logits)
        for batch, row in zip(batches, rows, strict=True):
            own = module(**batch).logits.flatten(0, -2).softmax(-1)
            torch.testing.assert_close(head(row.float()).softmax(-1), own, rtol=0.03, atol=1e-4)


@pytest.mark.parametrize("logits", [Logits(), Logits(0.125), Logits(3.0, 2.5)], ids=["plain", "scaled", "capped"])
def test_gradients_of_the_divergence_are_those_by_differentiation(logits):
    generator = torch.Generator().manual_seed(0)
    rows, original_rows, table, original, bias = (
        torch.randn(shape, generator=generator) for shape in ((600, 7), (600, 7), (11, 7), (11, 7), (11,))
    )
    parts = [part.clone().requires_grad_(True) for part in (rows, table, bias)]
    wanted = Head(original, None, logits)(original_rows).log_softmax(-1)
    own = Head(parts[1], parts[2], logits)(parts[0]).log_softmax(-1)
    functional.kl_div(own, wanted, reduction="batchmean", log_target=True).backward()
    found = divergence(rows, Head(table, bias, logits), original_rows, Head(original, None, logits), Wanted(True, True))
    for part, gradient in zip(parts, (found.to_rows, found.to_table, found.to_bias), strict=True):
        torch.testing.assert_close(gradient, part.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_labels_are_those_of_capped_logits(checkpoints):
    network = Network(open_checkpoint(checkpoints("llama", tied=False)), fast=False)
    network.logits = Logits(0.5, 1.5)
    head = head_of(network.module)
    assert head is not None
    with network.loaded(network.outside):
        rows = torch.randn(9, head.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
        labels = torch.arange(9) % 5 - 1  # some count nothing
        logits = 1.5 * torch.tanh(0.5 * functional.linear(rows, head.weight) / 1.5)
        functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum").backward()
        torch.testing.assert_close(label_gradient(network, rows.detach(), labels), rows.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "strange",
    [lambda z: z + 1, lambda z: z.clamp(-3, 3), lambda z: z**3, lambda z: z * float("nan"), lambda z: z.cumsum(-1)],
)
def test_what_is_neither_a_scale_nor_a_cap_is_unknown(strange):
    assert Logits.measured(strange) is None
    assert Logits.measured(lambda z: 30 * torch.tanh(z / 30)) == Logits(1.0, 30.0)


def test_a_network_that_does_something_else_with_its_logits_is_noticed(llama):
    network, batches = Network(open_checkpoint(llama), fast=False), pico.token_batches()
    forward = network.module.forward

    def clamped(*args, **kwargs):
        output = forward(*args, **kwargs)
        return dataclasses.replace(output, logits=output.logits.clamp(-1, 1))

    network.module.forward = clamped
    for _ in network.sweep(batches):
        pass
    with network.tail() as run:
        find_logits(network, lambda: run(batches[0], network.last[0]))
    assert network.logits is None
