"""SortedNet at its worked values, by its definitions in float64, and the pass on small networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressor.core.errors import CheckpointError, RecipeError
from compressor.passes.sortednet import (
    Sortednet,
    _first,
    accumulated_gradient,
    blocks_kept,
    draw,
    nested_target,
    neuron_importance,
    pooled_statistics,
    prefix_span,
    widths,
)
from compressor.plan.recipe_file import load_recipe
from tests.learning import training_case

SETTINGS = {"widths": (0.25, 0.5, 1.0), "epochs": 1, "batch": 16, "multiple": 4}


def test_worked_values():
    gradients = [torch.tensor([1.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])]
    assert accumulated_gradient(gradients, (3,)).tolist() == pytest.approx([1, 4 / 3, 1])
    assert prefix_span((512, 192), (128, 192), 4) == 98_304
    target = nested_target(torch.ones(2), torch.tensor([-0.5]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 1)
    assert target.tolist() == [1.25]
    mean, variance = pooled_statistics([torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])])
    assert (mean.item(), variance.item()) == (4, 5)


@pytest.mark.parametrize(
    ("full", "share", "multiple", "kept"),
    [(64, 0.5, 8, 32), (64, 0.25, 8, 16), (100, 0.5, 8, 48), (16, 0.25, 8, 8), (12, 1.0, 8, 12), (9, 0.5, 1, 5),
     (20, 0.6, 8, 16), (16, 0.05, 8, 8)],
)  # fmt: skip
def test_widths_are_multiples_near_their_share_and_never_much_below(full, share, multiple, kept):
    assert widths(full, [share], multiple) == [kept]


def test_a_beginning_is_in_one_piece_where_only_its_first_long_axis_is_cut():
    array = np.arange(4 * 3 * 5, dtype=np.float32).reshape(4, 3, 5)
    for kept in np.ndindex(4, 3, 5):
        sizes = tuple(n + 1 for n in kept)
        found = prefix_span(array.shape, sizes, 4)
        wanted = array[: sizes[0], : sizes[1], : sizes[2]].tobytes()
        assert (found == len(wanted)) == (array.tobytes()[: len(wanted)] == wanted)
        assert found in (None, len(wanted))


def test_importance_by_the_definition_in_float64():
    generator = torch.Generator().manual_seed(0)
    w1, g1 = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    b1, gb1 = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    w2, g2 = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for unit, found in enumerate(neuron_importance(w1, g1, b1, gb1, w2, g2).tolist()):
        made = sum(float(w1[unit, i] * g1[unit, i]) for i in range(7)) + float(b1[unit] * gb1[unit])
        read = sum(float(w2[o, unit] * g2[o, unit]) for o in range(3))
        assert found == pytest.approx(abs(made) + abs(read))


def test_pooled_statistics_are_those_of_all_examples_at_once():
    values = torch.randn(23, 4, generator=torch.Generator().manual_seed(2))
    mean, variance = pooled_statistics(values.split([5, 11, 7]))
    assert torch.allclose(mean, values.double().mean(0))
    assert torch.allclose(variance, values.double().var(0, correction=0))


def test_later_columns_make_up_for_the_error_of_the_first_as_well_as_any_can():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    hessian, weight = inputs.T @ inputs, torch.randn(2, 6, generator=generator, dtype=torch.float64)
    error = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    target = nested_target(weight, error, hessian, 4)

    def loss(later: torch.Tensor) -> float:
        change = torch.cat([error, later - weight[:, 4:]], 1)
        return float((change @ hessian @ change.T).trace())

    for _ in range(5):
        assert loss(target + 0.01 * torch.randn(2, 2, generator=generator, dtype=torch.float64)) > loss(target)


def test_blocks_that_stay():
    assert blocks_kept(6, 4, "prefix") == [0, 1, 2, 3]
    assert blocks_kept(6, 4, "spread") == [0, 1, 3, 4]
    assert blocks_kept(6, 4, [3, 0, 1]) == [1, 2, 4, 5]


def test_sizes_that_are_drawn():
    generator = torch.Generator().manual_seed(0)
    assert draw(3, 4, generator, "all") == [0, 1, 2]
    assert draw(9, 4, generator, "sandwich")[:2] == [8, 0]
    found = [size for _ in range(100) for size in draw(3, 4, generator, "random")]
    assert len(found) == 400
    assert all(90 < found.count(size) < 180 for size in range(3))


def begins_with(whole: torch.Tensor, part: torch.Tensor) -> bool:
    return torch.equal(whole[tuple(slice(size) for size in part.shape)], part)


@pytest.mark.parametrize("changes", [{}, {"draw": "sandwich", "order": "lrp"}, {"vectors": "shared", "draw": "all"}])
def test_all_sizes_learn_and_their_matrices_begin_those_of_the_largest(changes):
    _, outcome = training_case.trained(Sortednet(**(SETTINGS | changes)))
    whole, original = outcome.module.state_dict(), training_case.residual().state_dict()
    assert [size.name for size in outcome.sizes] == ["25", "50"]
    assert not torch.equal(whole["head.weight"], original["head.weight"])
    for size, kept in zip(outcome.sizes, (4, 8), strict=True):
        state = size.module.state_dict()
        assert tuple(state["block.0.weight"].shape) == (kept, 16, 3, 3)
        matrices = [name for name, tensor in state.items() if tensor.dim() > 1]
        assert all(begins_with(whole[name], state[name]) for name in matrices)
        own = not begins_with(whole["block.1.bias"], state["block.1.bias"])
        assert own == (changes.get("vectors") != "shared")


def test_a_frozen_network_stays_the_original_and_its_sizes_learn_what_is_their_own():
    original = training_case.residual()
    before = original(training_case.EXAMPLE)
    _, outcome = training_case.trained(Sortednet(**SETTINGS, largest="frozen"))
    assert torch.allclose(outcome.module(training_case.EXAMPLE), before, atol=1e-6)
    assert sorted(outcome.module.head.weight.flatten().tolist()) == sorted(original.head.weight.flatten().tolist())
    smaller = outcome.sizes[0].module
    assert not torch.equal(smaller.head.bias, outcome.module.head.bias)
    assert torch.equal(smaller.head.weight, outcome.module.head.weight)


def test_what_is_most_important_comes_first():
    _, outcome = training_case.trained(
        Sortednet(widths=(0.25, 1.0), multiple=1, epochs=0), training_case.one_channel_matters()
    )
    whole = training_case.one_channel_matters()
    assert outcome.module[2].weight[:, 0].flatten().tolist() == whole[2].weight[:, 0].flatten().tolist()
    assert torch.allclose(
        outcome.sizes[0].module(training_case.EXAMPLE), whole(training_case.EXAMPLE), rtol=1e-2, atol=1e-2
    )


def test_branches_go_in_the_order_in_which_they_are_missed_least():
    _, outcome = training_case.trained(Sortednet(widths=(1.0,), depths=(0.0, 1.0), epochs=0))
    (size,) = outcome.sizes
    assert size.name == "100x0"
    assert not any(name.startswith("block.") for name, _ in size.module.named_parameters())


def test_shares_that_come_to_one_network_are_refused():
    with pytest.raises(RecipeError, match="sizes 25 and 30 are the same network.*multiples of 8"):
        training_case.trained(Sortednet(widths=(0.25, 0.3, 1.0), epochs=0))


def test_a_network_without_units_that_may_go_is_refused_by_name():
    chain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(90, 3)).eval()
    with pytest.raises(CheckpointError, match=r"finds no channels, heads or neurons.*write widths: \[1\]"):
        training_case.trained(Sortednet(**SETTINGS), chain)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("widths: [0.5]", "write 1 among them"),
        ("widths: [1.0]", "there is one size only"),
        ("widths: [0.501, 0.502, 1.0]", "two sizes would be called 50"),
        ("ship: ['51']", "ship names '51'; known: 25, 50, 75, 100"),
        ("heads: [0.5, 1.0]", "write one for each"),
        ("draw: sandwich, largest: frozen", "draw: sandwich trains the largest"),
        ("vectors: shared, largest: frozen", "nothing learns"),
    ],
)
def test_settings_that_make_no_sizes_are_refused(line, message, tmp_path):
    (tmp_path / "r.yaml").write_text(f"passes: [{{pass: sortednet, {line}}}]")
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        load_recipe(str(tmp_path / "r.yaml"))


def test_the_order_of_many_blocks_is_found_on_fewer_tokens():
    texts = [{"input_ids": torch.zeros(8, 256, dtype=torch.long)}] * 20
    images = [{"": torch.zeros(64, 3, 8, 8)}] * 20

    def judged(batches, n_blocks):
        return sum(len(next(iter(batch.values()))) for batch in _first(batches, n_blocks))

    assert [judged(texts, n) for n in (6, 12, 30, 100)] == [56, 16, 2, 1]
    assert [judged(images, n) for n in (9, 60)] == [128, 128]


def test_the_plan_counts_what_finding_the_order_takes():
    whole, short = (load_recipe("llm-sorted", [f"sortednet.depths=[{depths}]"]).structure[0].settings
                    for depths in ("0.5, 1.0", "0.9, 1.0"))  # fmt: skip
    assert whole.tokens_tried - short.tokens_tried == pytest.approx((0.75 - 0.19) / 2 * 2**19)
