"""Mixed precision on pico models: widths per tensor, sizes that land, what is reported, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.checkpoints import open_checkpoint
from compressor.core.artifact import Artifact
from compressor.core.contract import Statistics
from compressor.core.errors import DataError, GateFailed, UsageError
from compressor.core.options import RunOptions
from compressor.core.spec import AffineSpec
from compressor.core.tensors import EncodedTensors
from compressor.core.work import Work
from compressor.export.forms import refusal
from compressor.export.planned import planned_bytes
from compressor.graph.blocks import layout_of, unfold_inputs
from compressor.passes.registry import load_pass
from compressor.passes.settings.affine import AffineSettings
from compressor.passes.settings.jlcm import JlcmSettings
from compressor.passes.settings.rounding import RoundingSettings
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.run.pipeline import run
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey
from compressor.widths.allocate import Costs, Menu, closest
from compressor.widths.ladder import Ladder
from compressor.widths.losses import Curve, Judge, judged, probe
from compressor.widths.sensitivity import ROWS, tensor_errors
from tests import pico
from tests.core.interrupting import Interrupting

AFFINE = """
passes: [{pass: affine, method: gptq, bits: 4, group: 16, zero: learned}]
calibration: {tokens: 256, window: 32, samples: 24}
embeddings: {bits: 4, group: 16}
evaluation: {tokens: 96, window: 32, speed: false}
"""
JLCM = AFFINE.replace("affine, method: gptq, bits: 4, group: 16, zero: learned", "jlcm, width: 4, dim: 2, group: 16")


@pytest.fixture(autouse=True)
def folder(texts):
    (texts / "affine.yaml").write_text(AFFINE)
    (texts / "jlcm.yaml").write_text(JLCM)
    return texts


def of_llama(model: Path, recipe: str = "affine.yaml", output: str = "out", **changes) -> RunOptions:
    known = {"data": "calibration.txt", "eval": "evaluation.txt"}
    return RunOptions(str(model), recipe, Path(output), **(known | changes))


def of_network(folder: Path, **changes) -> RunOptions:
    module = pico.write_state_dict(pico.ResNet, folder / "weights.pt")
    x = np.random.default_rng(0).standard_normal((40, 3, 12, 12)).astype(np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(folder / "data.npz", x=x, labels=labels)
    known = {"arch": "tests.pico:ResNet", "data": "data.npz", "output": Path("out")}
    return RunOptions("weights.pt", "affine.yaml", **(known | changes))


def reach(options: RunOptions) -> tuple[int, int]:
    """Bytes of the smallest and of the largest artifact."""
    checkpoint = open_checkpoint(options.model, arch=options.arch)
    checkpoint.check()
    recipe = load_recipe(options.recipe)
    ends = Ladder.of(make_plan(checkpoint, recipe), recipe, "onnx", "default").ends()
    example = [] if options.arch is None else [{"": torch.zeros(2, 3, 12, 12)}]
    smallest, largest = (planned_bytes(plan, checkpoint, "default", False, example) for plan in ends)
    return smallest, largest


def check_allocation(report: dict, directory: Path, target: int) -> dict:
    """The size lies within the bar, and the report says what is in the file; returns the part about it."""
    allocation, size = report["allocation"], report["size"]["bytes"]
    assert 0.99 * target <= size <= target
    assert allocation["expected_bytes"] == size
    assert allocation["target_size"] == target
    tensors = EncodedTensors([directory / "model.safetensors"])
    for name, entry in allocation["tensors"].items():
        found = tensors.describe(name)
        assert entry["bits"] == (found["bits"] if found["kind"] == "affine" else found["width"] / found["dim"])
    assert 0 <= allocation["predicted_loss"] < 1
    return allocation


@pytest.mark.parametrize("recipe", ["affine.yaml", "jlcm.yaml"])
def test_a_language_model_lands_below_its_target(llama, recipe):
    options = of_llama(llama, recipe)
    smallest, largest = reach(options)
    target = (2 * smallest + largest) // 3
    artifact = run(of_llama(llama, recipe, target_size=target))
    allocation = check_allocation(artifact.report, artifact.directory, target)
    assert allocation["importance"] == "fisher"
    assert allocation["loss"] == pytest.approx(artifact.report["quality"]["ratio"] - 1)
    assert len({entry["stored"] for entry in allocation["tensors"].values()}) > 1
    costs = [cost for cost, _ in allocation["measured_costs"]]
    assert costs == sorted(costs, reverse=True)


def test_a_network_lands_below_its_target_by_measured_importance(folder):
    options = of_network(folder)
    smallest, largest = reach(options)
    target = (2 * smallest + largest) // 3
    artifact = run(of_network(folder, target_size=target))
    allocation = check_allocation(artifact.report, artifact.directory, target)
    assert allocation["importance"] == "measured"
    quality = artifact.report["quality"]
    assert allocation["loss"] == pytest.approx(quality["original_accuracy"] - quality["accuracy"])


def test_the_same_target_gives_the_same_bytes_also_when_resumed(llama):
    target = sum(reach(of_llama(llama))) // 2
    whole = run(of_llama(llama, output="whole", target_size=target)).directory
    with pytest.raises(KeyboardInterrupt):
        run(of_llama(llama, output="again", target_size=target, progress=Interrupting("encoding")))
    with pytest.raises(UsageError, match="belongs to another run"):
        run(of_llama(llama, output="again", target_size=target + 1, resume=True))
    resumed = Interrupting()
    again = run(of_llama(llama, output="again", target_size=target, resume=True, progress=resumed)).directory
    assert "encoding" in resumed.seen
    assert not {"surveying", "comparing widths", "choosing widths"} & set(resumed.seen)
    for name in ("model.safetensors", "model.onnx"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_a_smaller_loss_takes_more_bytes_and_is_a_gate(llama):
    sizes = []
    for share in (0.2, 0.02):
        try:
            report = run(of_llama(llama, output=f"out{share}", max_loss=share)).report
        except GateFailed as error:
            assert "the artifact is kept" in str(error)
            report = Artifact.open(Path(f"out{share}.failed")).report
        assert report["allocation"]["predicted_loss"] <= share
        assert report["recipe"]["gates"]["max_perplexity_ratio"] == pytest.approx(1 + share)
        sizes.append(report["size"]["bytes"])
    assert sizes[0] < sizes[1]


def test_a_loss_that_was_not_kept_fails(folder):
    with pytest.raises(GateFailed, match=r"accuracy .*, the gate is .*; the loss came in .*; the artifact is"):
        run(of_network(folder, target_size=int(1.02 * reach(of_network(folder))[0]), max_loss=1e-4))


@pytest.mark.parametrize(("target", "says"), [(1000, "found 0.001 MB"), (10**9, "found 1e\\+03 MB")])
def test_what_cannot_be_reached_is_refused_with_the_range(llama, target, says):
    with pytest.raises(UsageError, match=f"--target-size: affine brings .* to .* … .* MB.*{says}"):
        run(of_llama(llama, target_size=target))
    assert not list(Path().glob("out*"))


def test_a_network_without_data_is_refused(folder):
    (folder / "affine.yaml").write_text("passes: [{pass: affine}]")
    with pytest.raises(DataError, match="give --data"):
        run(of_network(folder, data=None, target_size=100_000))


@pytest.mark.parametrize(
    "settings",
    [AffineSettings(bits=3), JlcmSettings(width=5, dim=2), RoundingSettings(bits=2, grid="codebook"),
     RoundingSettings(group="row")],
    ids=str,
)  # fmt: skip
def test_a_ladder_holds_the_pass_itself_and_other_widths(settings):
    ladder = settings.ladder()
    assert settings in ladder
    assert len({step.spec_for("fc.weight", (256, 256), "linear").nbytes(256, 256) for step in ladder}) > 1
    assert all(type(step) is type(settings) and type(step)(**step.model_dump()) == step for step in ladder)
    for step in ladder:
        assert refusal(step.spec_for("fc.weight", (256, 256), "linear").describe(256, 256), "matmul") is None
        assert step.quick().spec_for("fc.weight", (256, 256), "linear") is not None


def test_widths_that_cannot_learn_are_no_options_where_a_recipe_learns(llama, monkeypatch):
    monkeypatch.setattr(AffineSpec, "learns", property(lambda spec: spec.bits > 2))
    checkpoint, bits = open_checkpoint(llama), []
    for steps in (0, 4):
        recipe = load_recipe("llm-4bit", [f"distill.steps={steps}"])
        ladder = Ladder.of(make_plan(checkpoint, recipe), recipe, "onnx", "default")
        bits.append({option.spec.code_bits for options in ladder.options.values() for option in options})
    assert bits == [{2, 3, 4, 8}, {3, 4, 8}]


def test_options_are_sorted_and_no_two_store_the_same(llama):
    recipe = load_recipe("affine.yaml")
    ladder = Ladder.of(make_plan(open_checkpoint(llama), recipe), recipe, "onnx", "default")
    for options in ladder.options.values():
        sizes = [option.nbytes for option in options]
        assert sizes == sorted(sizes)
        assert len({option.spec.label for option in options}) == len(options) > 4


def test_errors_are_measured_on_inputs_that_the_pass_was_not_given(folder):
    """Behind a pooling there are fewer vectors than values, and a pass that is fitted to them looks too good."""
    options = of_network(folder)
    checkpoint, recipe = open_checkpoint(options.model, arch=options.arch), load_recipe(options.recipe)
    ladder = Ladder.of(make_plan(checkpoint, recipe), recipe, "onnx", "default")
    x = torch.randn(2, 8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    work, network = Work(folder, 0), Network(checkpoint, fast=False)
    found = tensor_errors(network, [{"": x[0]}, {"": x[1]}], ladder.options, Survey(), work, lambda note: None)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    module = checkpoint.build("cpu").eval()
    for name in found:
        layer = module.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(unfold_inputs(m, args[0])))
    with torch.no_grad():
        module(x[0]), module(x[1])
    for name, errors in found.items():
        given, other = (rows.T @ rows / len(rows) for rows in seen[name])
        layout = layout_of(module.get_submodule(name.removesuffix(".weight")))
        weight = layout.matrix(module.get_parameter(name).data)
        assert len(weight) <= ROWS, "of others some rows alone are measured"

        def error(method, weight=weight, given=given, other=other) -> float:
            left = weight - load_pass(method).encode(weight, Statistics(given), torch.Generator()).decode()
            return float(((left @ other) * left).sum())

        probe = len(ladder.options[name]) // 2
        assert errors.options[probe] == pytest.approx(error(ladder.options[name][probe].method), rel=1e-3)
        assert errors.white == pytest.approx(len(weight) * float(other.diagonal().sum()), rel=1e-4)
    assert len(found) > 3


def test_a_curve_goes_through_its_points_and_back():
    curve = Curve(((4.0, 0.5), (1.0, 0.1), (2.0, 0.08)))
    assert [curve.loss(cost) for cost in (0, 0.5, 1, 2, 3, 8)] == pytest.approx([0, 0.05, 0.1, 0.1, 0.3, 1.0])
    for loss in (0.05, 0.3, 0.6):
        assert curve.loss(curve.cost(loss)) == pytest.approx(loss)
    assert curve.cost(0.1) == pytest.approx(2.0)


def test_a_share_of_changed_classes_grows_as_the_root_of_a_cost():
    curve = Curve.of("accuracy", [(0.04, 0.1), (0.01, 0.05)])
    assert [curve.loss(cost) for cost in (0.0025, 0.0225, 0.16)] == pytest.approx([0.025, 0.075, 0.2])
    for loss in (0.02, 0.07, 0.3):
        assert curve.loss(curve.cost(loss)) == pytest.approx(loss)
    assert Curve.of("cosine", [(0.04, 0.1)]).loss(0.01) == pytest.approx(0.025)
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(2, 20000, 2, dtype=torch.double, generator=generator)
    found = [judged("accuracy", [logits], [logits + size * noise], False) for size in (0.1, 0.05)]
    ends = Curve.of("accuracy", [(found[0].rise, found[0].promised)])
    assert ends.loss(found[1].rise) == pytest.approx(found[1].promised, rel=0.1)


def test_a_plan_that_is_weighed_a_little_too_heavy_gives_way_to_the_next_smaller(llama):
    options = of_llama(llama)
    checkpoint, recipe = open_checkpoint(options.model), load_recipe(options.recipe)
    ladder = Ladder.of(make_plan(checkpoint, recipe), recipe, "onnx", "default")
    costs = Costs(
        "fisher",
        {name: tuple(1 / each.nbytes for each in options) for name, options in ladder.options.items()},
        Curve(()),
        "perplexity",
    )
    menu = Menu.of(ladder, costs, ladder.reach()[1])
    middle = ladder.plan_of(ladder.numbered(menu.land(ladder, sum(ladder.reach()) // 2))).bytes_after
    excess = 40  # a plan's bytes that only show when it is weighed; its limit is 39 above the plan
    found = closest(menu, ladder, middle + excess - 1, lambda plan: plan.bytes_after + excess)
    assert found is not None
    assert 0.98 * middle < ladder.plan_of(ladder.numbered(found.chosen)).bytes_after < middle


def test_losses_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    wanted, found = torch.randn(2, 70, 9, generator=generator), torch.randn(2, 70, 9, generator=generator)
    p, q = wanted.double().softmax(-1), found.double().softmax(-1)
    divergence = float((p * (p / q).log()).sum(-1).mean())
    assert judged("perplexity", [wanted], [found], False).rise == pytest.approx(divergence)
    assert judged("perplexity", [wanted], [found], False).promised == pytest.approx(np.exp(divergence) - 1)
    pooled = [each.double().mean(1) for each in (wanted, found)]
    cosine = [float(a @ b / a.norm() / b.norm()) for a, b in zip(*pooled, strict=True)]
    assert judged("cosine", [wanted], [found], False).promised == pytest.approx(1 - np.mean(cosine))
    a, b = wanted[0], found[0]
    assert judged("accuracy", [a], [b], False).rise == pytest.approx(float((a - b).pow(2).sum() / a.pow(2).sum()))
    assert judged("accuracy", [a], [a], True).rise == judged("accuracy", [a], [a], False).promised == 0


def test_classes_of_pixels_are_along_their_own_axis():
    """Of (examples, classes, height, width): one pixel of four changes its class, in each of two examples."""
    wanted = torch.zeros(2, 3, 2, 2)
    wanted[:, 1] = 1.0
    found = wanted.clone()
    found[:, 2, 0, 0] = 2.0
    judge = Judge("accuracy", {"logits": ("accuracy", True, 1)}, [{"logits": wanted}])
    assert judge.judge([{"logits": found}]).promised == pytest.approx(1 / 4)


def test_what_a_network_is_given_beside_its_tokens_is_kept_where_losses_are_measured():
    ids = torch.arange(24).view(6, 4)
    pair = {"input_ids": ids.repeat(1, 128), "decoder_input_ids": ids}
    (sample,) = probe([pair], "accuracy")
    assert sample["input_ids"].shape == (2, 512)
    assert torch.equal(sample["decoder_input_ids"], ids[:2])
    (alone,) = probe([{"input_ids": ids.repeat(1, 128)}], "accuracy")
    assert alone["input_ids"].shape == (32, 32)
