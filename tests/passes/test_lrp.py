"""LRP's rules at their worked values and against loops in float64; conservation; and the pass in a run."""

from __future__ import annotations

import copy
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressor.core.errors import RecipeError
from compressor.core.options import RunOptions
from compressor.core.structure import Subject
from compressor.ops.attribution import Composite, Rule, attribute
from compressor.passes.lrp import Lrp, relevance
from compressor.plan.recipe_file import load_recipe
from compressor.run.pipeline import run
from compressor.structure.stage import GraphSurgeon
from tests import pico

OPTIONS = {"epsilon": {"epsilon": 1e-6}, "zplus": {}}
X, W, ONE = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), torch.ones(1, 1)


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("epsilon", {"epsilon": 1e-9}, [3.0, -2.0]),
        ("zplus", {}, [1.0, 0.0]),
        ("alpha_beta", {"alpha": 2.0, "beta": 1.0}, [2.0, -1.0]),
    ],
)
def test_worked_values(rule, options, expected):
    assert relevance(W, X, ONE, rule, **options)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_nothing_of_a_batch_is_left_when_the_next_one_runs():
    layer = nn.Linear(6, 5)
    left: list[weakref.ref] = []

    def call(batch):
        assert all(each() is None for each in left)
        output = layer(batch[""])
        left.append(weakref.ref(output))
        return output

    batches = [{"": torch.randn(4, 6)} for _ in range(3)]
    attribute({id(layer.weight): "w"}, call, batches, None, Composite("taylor", Rule("zplus"), Rule("zplus"), False))
    assert len(left) == 3


@pytest.mark.parametrize("criterion", ["lrp", "taylor", "gradient"])
def test_scores_of_some_outputs_at_a_time_are_the_same(criterion, monkeypatch):
    layer, batches = nn.Linear(6, 200), [{"": torch.randn(4, 9, 6)}]
    composite, labels = Composite(criterion, Rule("zplus"), Rule("zplus"), False), [torch.randint(0, 200, (4, 9))]

    def scores() -> torch.Tensor:
        return attribute({id(layer.weight): "w"}, lambda batch: layer(batch[""]), batches, labels, composite)["w"]

    whole = scores()
    monkeypatch.setattr("compressor.ops.attribution._SCORED", 64 * 36)
    assert torch.equal(scores(), whole)


def naive(weight, inputs, above, rule, options):
    """Σ_j (share of z_ij) · R_j, entry by entry, from the definitions."""
    (n, n_in), n_out = inputs.shape, len(weight)
    found = np.zeros((n, n_in))
    for k in range(n):
        for j in range(n_out):
            z = weight[j] * inputs[k]
            if rule == "epsilon":
                share = z / (z.sum() + options["epsilon"] * (1 if z.sum() >= 0 else -1))
            elif rule == "gamma":
                z = inputs[k] * (weight[j] + options["gamma"] * np.maximum(weight[j], 0))
                share = z / z.sum()
            elif rule == "zbox":
                z = z - options["low"] * np.maximum(weight[j], 0) - options["high"] * np.minimum(weight[j], 0)
                share = z / z.sum()
            else:
                alpha, beta = (1.0, 0.0) if rule == "zplus" else (options["alpha"], options["beta"])
                plus, minus = np.maximum(z, 0), np.minimum(z, 0)
                share = alpha * plus / plus.sum() - beta * minus / minus.sum()
            found[k] += share * above[k, j]
    return found


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("epsilon", {"epsilon": 0.3}), ("zplus", {}), ("gamma", {"gamma": 0.25}), ("gamma", {"gamma": 1.0}),
        ("alpha_beta", {"alpha": 2.0, "beta": 1.0}), ("alpha_beta", {"alpha": 3.0, "beta": 2.0}),
        ("zbox", {"low": -1.5, "high": 2.0}),
    ],
)  # fmt: skip
def test_each_rule_is_its_definition(rule, options):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    inputs = torch.rand(3, 7, generator=generator, dtype=torch.float64) * 3.5 - 1.5
    above = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    expected = naive(weight.numpy(), inputs.numpy(), above.numpy(), rule, options)
    np.testing.assert_allclose(relevance(weight, inputs, above, rule, **options).numpy(), expected, rtol=1e-5)


def test_zplus_conserves_relevance():
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(6, 9, generator=generator), torch.randn(4, 9, generator=generator)
    above = torch.rand(4, 6, generator=generator)
    below = relevance(weight, inputs, above, "zplus")
    torch.testing.assert_close(below.sum(1), above.sum(1), rtol=1e-4, atol=0)


def test_a_layers_own_rule_goes_before_that_of_its_kind():
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    batch = [{"": torch.randn(7, 6, generator=torch.Generator().manual_seed(0))}]

    def scores(linear: str, **own: str) -> torch.Tensor:
        rules = {name.replace("_", "."): Rule(rule, OPTIONS[rule]) for name, rule in own.items()}
        composite = Composite("lrp", Rule("zplus"), Rule(linear, OPTIONS[linear]), False, rules)
        return attribute(names, lambda batch: network(batch[""]), batch, None, composite)["0.weight"]

    torch.testing.assert_close(scores("zplus", **{"2_weight": "epsilon"}), scores("epsilon", **{"0_weight": "zplus"}))
    assert not torch.equal(scores("zplus"), scores("zplus", **{"2_weight": "epsilon"}))


def test_a_search_without_optuna_is_refused_when_the_recipe_is_read(monkeypatch, tmp_path):
    (tmp_path / "recipe.yaml").write_text("passes: [{pass: lrp, trials: 3}]\n")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match="trials needs optuna; pip install"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_a_search_is_never_worse_than_the_rules_as_written():
    network = pico.ResNet().eval()
    generator = torch.Generator().manual_seed(3)
    batches = [{"": torch.randn(12, 3, 12, 12, generator=generator)} for _ in range(2)]
    example = {"": batches[0][""][:2]}

    def restructured(seed: int) -> dict:
        subject = Subject(
            copy.deepcopy(network), batches, None, GraphSurgeon(example, lambda net, batch: net(batch[""])),
            torch.Generator().manual_seed(seed), lambda name: True, lambda share, note: None, lambda *_: None,
        )  # fmt: skip
        return Lrp(fraction=0.2, step=0.2, trials=6).restructure(subject).report["search"]

    found = restructured(0)
    assert set(found["rules"]) == {"low", "middle", "high", "linear"}
    assert found["area"] >= found["area_as_written"] > 0.1
    assert found == restructured(0)


def graded(end: nn.Module) -> nn.Sequential:
    """Convolutions with a slope for each channel, and classes."""
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 8, 3), nn.PReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 5), end).eval()


def explained(network: nn.Module, criterion: str, divisible: int = 1) -> tuple[nn.Module, dict]:
    batches = [{"": torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))}]
    subject = Subject(
        copy.deepcopy(network), batches, None, GraphSurgeon(batches[0], lambda net, batch: net(batch[""])),
        torch.Generator().manual_seed(0), lambda name: True, lambda share, note: None, lambda *_: None,
    )  # fmt: skip
    outcome = Lrp(fraction=0.3, step=0.15, criterion=criterion, divisible=divisible).restructure(subject)
    return outcome.module, outcome.report["kept_units"]


@pytest.mark.parametrize("criterion", ["lrp", "taylor"])
@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_probabilities_at_the_end_are_explained_by_the_logits_before_them(end, criterion):
    smaller, kept = explained(graded(end), criterion)
    assert kept == explained(graded(nn.Identity()), criterion)[1]
    assert sum(n for n, _ in kept.values()) < sum(size for _, size in kept.values())
    assert smaller(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


def test_a_network_that_ends_in_sigmoids_is_explained():
    assert explained(graded(nn.Sigmoid()), "lrp")[1]


def test_channels_that_stay_are_a_multiple():
    kept = explained(graded(nn.Identity()), "lrp", divisible=4)[1]
    assert {n % 4 for n, _ in kept.values()} == {0}
    assert any(n < size for n, size in kept.values())


def test_slopes_of_channels_go_with_their_channels():
    smaller, kept = explained(graded(nn.Identity()), "lrp")
    slopes = smaller.get_submodule("1")
    assert slopes.num_parameters == len(slopes.weight) == len(smaller.get_submodule("0").weight)
    assert len(slopes.weight) < 16
    assert any(size == 16 for _, size in kept.values())


@pytest.mark.parametrize("criterion", ["lrp", "taylor", "gradient", "magnitude"])
def test_a_network_loses_its_share_and_is_exported(tmp_path, criterion):
    images = np.random.default_rng(0).standard_normal((40, 3, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "images.npz", image=images[:24])
    np.savez(tmp_path / "others.npz", image=images[24:])
    pico.write_state_dict(pico.ResNet, tmp_path / "model.pt")
    (tmp_path / "recipe.yaml").write_text(
        f"passes: [{{pass: lrp, criterion: {criterion}, fraction: 0.3}}]\ncalibration: {{samples: 24}}\n"
        "evaluation: {speed: false}\n"
    )
    artifact = run(
        RunOptions(
            str(tmp_path / "model.pt"), str(tmp_path / "recipe.yaml"), Path(tmp_path / "out"),
            arch="tests.pico:ResNet", data=str(tmp_path / "images.npz"), eval=str(tmp_path / "others.npz"),
        )
    )  # fmt: skip
    (step,) = artifact.report["structure"]
    assert 0.5 * step["parameters_before"] < step["parameters"] <= 0.7 * step["parameters_before"]
    assert artifact.report["proof"]["exact"]["max_relative_error"] < 1e-4
