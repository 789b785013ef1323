"""Blocks and their parts, found, judged with what was computed before, and taken out: all three compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError
from compressor.core.students import Student
from compressor.graph.blocks import block_names, first_tensor
from compressor.graph.depth import depth_units, without_units
from compressor.structure.students.depth import DepthEvaluator
from tests import pico

IDS = pico.token_batches(1)[0]["input_ids"]


@pytest.fixture
def built(checkpoints):
    """Makes one of tests.pico's networks as a module."""
    return lambda kind, **settings: module_of(checkpoints(kind, **settings))


def module_of(directory: Path) -> nn.Module:
    module = open_checkpoint(directory).build("cpu").float()
    module.config.use_cache = False
    return module


def units_of(module, parts):
    return depth_units(module, lambda: module(input_ids=IDS), parts)


def evaluator_of(module, parts=False, measure="perplexity"):
    return DepthEvaluator(module, block_names(module), units_of(module, parts), {"input_ids": IDS}, None, measure)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_student_is_judged_as_the_network_without_its_units_computes(built, kind, parts):
    module = built(kind)
    evaluator = evaluator_of(module, parts)
    before = first_tensor(module(input_ids=IDS))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        gone = torch.randperm(len(evaluator.units), generator=generator)[: 1 + len(evaluator.units) // 3].tolist()
        found = evaluator.logits(Student.of(gone))  # with what an earlier student left
        smaller = without_units(module, [evaluator.units[number] for number in gone])
        with torch.autocast("cpu", torch.bfloat16, enabled=found.dtype == torch.bfloat16):
            wanted = first_tensor(smaller(input_ids=IDS))
        torch.testing.assert_close(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in module.parameters())
    assert torch.equal(first_tensor(module(input_ids=IDS)), before)  # nothing is left behind
    assert not any("forward" in vars(child) for child in module.modules())


def test_the_attention_of_bert_holds_its_own_residual_sum_and_that_of_llama_does_not(built):
    kinds = {
        kind: {(unit.kind, unit.absent) for unit in units_of(built(kind), True)} for kind in ("llama", "gpt2", "bert")
    }
    assert kinds["llama"] == kinds["gpt2"] == {("attention", "zeros"), ("mlp", "zeros")}
    assert kinds["bert"] == {("attention", "identity")}


def test_what_is_left_is_numbered_anew_and_the_config_follows(built):
    module = built("llama", n_layers=5)
    smaller = without_units(module, [units_of(module, False)[i] for i in (1, 3)])
    again = without_units(smaller, units_of(smaller, False)[:1])
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == [0, 1, 2]
    assert smaller.config.num_hidden_layers == smaller.model.config.num_hidden_layers == 3
    assert len(getattr(smaller.config, "layer_types", None) or "abc") == 3
    assert module.config.num_hidden_layers == 5
    assert torch.equal(smaller.model.layers[1].mlp.up_proj.weight, module.model.layers[2].mlp.up_proj.weight)
    assert again.model.layers.kept_children == [2, 4]
    assert not hasattr(module.model.layers, "kept_children")


def test_what_students_share_is_computed_once(built):
    module = built("llama", n_layers=6)
    evaluator = evaluator_of(module)
    calls = []
    for layer in module.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    list(evaluator.evaluate([Student()]))
    assert len(calls) == 6
    calls.clear()
    list(evaluator.evaluate([Student.of([number]) for number in range(6)]))
    assert len(calls) == sum(5 - number for number in range(6))  # only the blocks behind the one that is gone


def test_influence_by_its_definition_and_measures(built):
    module = built("llama", n_layers=3)
    evaluator = evaluator_of(module, measure="accuracy")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = module(input_ids=IDS, output_hidden_states=True).hidden_states
    for number in range(2):  # the last one is after the norm
        a, b = (each.double().flatten(0, 1) for each in states[number : number + 2])
        cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)]
        assert evaluator.influence()[number] == pytest.approx(1 - sum(cosines) / len(cosines), abs=5e-3)
    ((_, accuracy),) = evaluator.evaluate([Student()])
    logits = evaluator.logits(Student())
    hits = [bool(logits[i, t].argmax() == IDS[i, t + 1]) for i in range(len(IDS)) for t in range(IDS.shape[1] - 1)]
    assert accuracy == pytest.approx(sum(hits) / len(hits))


def test_networks_without_blocks_that_can_go_are_refused():
    with pytest.raises(CheckpointError, match="has no list of repeated blocks to remove some of; write units: layer"):
        depth_units(nn.Linear(2, 2), lambda: None, False)

    class Narrowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 2)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    module = Narrowing()
    with pytest.raises(CheckpointError, match=r"'blocks.0' takes \(3, 8\) and gives \(3, 4\)"):
        depth_units(module, lambda: module(torch.zeros(3, 8)), False)
