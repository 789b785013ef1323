"""What every pass promises, held for every file in compressor/passes."""

from __future__ import annotations

import functools
import importlib
import math
import re
import types
from pathlib import Path

import pytest
import torch

from compressor.checkpoints import open_checkpoint
from compressor.core.contract import PruningPass, Statistics, StructurePass, TrainedPass, WeightPass
from compressor.core.encoding import Encoding, describe, restore
from compressor.core.errors import PassError
from compressor.core.passes import STAGES, Pass, PruningSettings, StructureSettings, WeightSettings
from compressor.core.tensors import write_tensors
from compressor.core.work import Work
from compressor.export.lowering import refusal
from compressor.passes.registry import SETTINGS, load_pass, pass_class
from compressor.plan.plan import PlannedTensor
from compressor.plan.planning import make_plan
from compressor.plan.recipe import ONLY_PRUNED
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps.encode import encode_network
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey
from tests import pico
from tests.learning import training_case
from tests.pretended_gpu import GPU, pretended_gpu

ROOT = Path(__file__).parents[1]
PASSES = sorted(SETTINGS)
# At least one line per value of the settings that change what a pass does or needs; a pass that is not here is tried as
# it is by itself.
VARIANTS = {
    "gblm": [{"score": "magnitude"}, {"score": "sparsegpt"}, {"pattern": "2:4", "score": "wanda"}, {"score": "wanda"}],
    "affine": [{"method": "rtn"}, {"method": "hqq", "zero": "learned"}, {"method": "gptq"}],
    "jlcm": [{}, {"width": 4, "dim": 2, "codebooks": 3}],
    "trellis": [{}, {"width": 6, "descent_rounds": 0}],
    "rounding": [
        {},
        {"optimizer": "adam", "steps": 20},
        {"optimizer": "signsgd", "steps": 20, "learn": ["rounding", "scale"], "start": "nearest"},
        {"grid": "codebook", "bits": 3},
    ],
}
STRUCTURE = {
    "lrp": [{}],
    "metaprune": [{"of": "parameters", "epochs_before": 1, "epochs": 1, "batch": 16}],
    "hesso": [{"epochs": 2, "batch": 16, "periods": 2}, {"epochs": 4, "batch": 16, "periods": 1, "pruning": 0.2,
                                                         "cycles": 2, "cycle_steps": 4}],
    "oto": [{"epochs": 2, "batch": 16}],
    "sortednet": [{"widths": (0.5, 1.0), "epochs": 1, "batch": 16}],
    "n2n": [{"search_epochs": 2, "shrink_epochs": 1, "rollouts": 2, "student_examples": 32, "batch": 16, "jobs": 1}],
}  # fmt: skip
TRAINED = {"reste": [{}, {"activations": "binary", "estimator": "ede", "scale": "channel"}]}
"""Weight passes that train the network first; what they encode then is exact, and no concern of the data."""


def of_kind(*kinds: type[Pass]) -> list[str]:
    return [name for name in PASSES if issubclass(SETTINGS[name], kinds)]


def cases(names: list[str], variants: dict[str, list[dict]]) -> list[tuple[str, dict]]:
    return [(name, settings) for name in names for settings in variants.get(name, [{}])]


def trains(name: str) -> bool:
    return SETTINGS[name]().trains and not issubclass(SETTINGS[name], StructureSettings)


ENCODING = [name for name in of_kind(WeightSettings, PruningSettings) if not trains(name)]
CASES = cases(ENCODING, VARIANTS)
STRUCTURE_CASES = cases(of_kind(StructureSettings), STRUCTURE)
TRAINED_CASES = cases([name for name in PASSES if trains(name)], TRAINED)
BYTES = {"U8": 1, "U16": 2, "F16": 2, "F32": 4, "I32": 4}


def made(name: str, **settings) -> Pass:
    return pass_class(importlib.import_module(f"compressor.passes.{name}"), name)(**settings)


def applied(
    method: Pass, weight: torch.Tensor, hessian: torch.Tensor | None, generator: torch.Generator,
    kept: torch.Tensor | None = None,
) -> Encoding:  # fmt: skip
    """What a pass makes of a matrix; what it only prunes is stored at eight bits."""
    if isinstance(method, WeightPass):
        return method.encode(weight, Statistics(hessian, kept=kept), generator)
    assert isinstance(method, PruningPass)
    pruned, kept = method.prune(weight, Statistics(hessian, weight.abs() * 1e-3, 4, 16))
    return load_pass(ONLY_PRUNED).encode(pruned, Statistics(kept=kept), generator)


def encoded(method: Pass, hessian: torch.Tensor | None = None) -> Encoding:
    weight, moment = pico.correlated(29, 90)
    return applied(method, weight, moment if hessian is None else hessian, torch.Generator().manual_seed(6))


def same_parts(first: Encoding, second: Encoding) -> None:
    assert describe(first) == describe(second)
    for part, tensor in first.parts().items():
        assert torch.equal(tensor, second.parts()[part]), f"part {part} differs"


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_named_after_its_file_and_cites_its_paper(name):
    method = made(name)
    assert method.name == name
    assert isinstance(method, SETTINGS[name])
    assert method.stage in STAGES
    assert re.search(r"https://(arxiv\.org/abs|doi\.org|openreview\.net)/\S+$", method.paper)
    module = importlib.import_module(f"compressor.passes.{name}")
    assert re.search(r"arXiv \d{4}\.\d{5}", module.__doc__)


def test_every_pass_is_a_file_and_every_file_a_pass():
    files = {path.stem for path in (ROOT / "compressor" / "passes").glob("*.py") if not path.stem.startswith("_")}
    assert files - {"registry"} == set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_does_the_work_of_its_settings(name):
    kinds = {WeightSettings: WeightPass, PruningSettings: PruningPass, StructureSettings: StructurePass}
    method = made(name)
    assert [work for settings, work in kinds.items() if isinstance(method, settings)] == [
        work for work in kinds.values() if isinstance(method, work)
    ]
    assert isinstance(method, TrainedPass) == (isinstance(method, WeightSettings) and method.trains)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_its_paper_test(name):
    test = ROOT / "tests" / "passes" / f"test_{name}.py"
    assert "float64" in test.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PASSES)
def test_every_setting_is_explained(name):
    explanations = [kind.__doc__ or "" for kind in SETTINGS[name].__mro__ if issubclass(kind, Pass)]
    text = f"{' '.join(explanations)} {SETTINGS[name].paper}"
    unexplained = [field for field in SETTINGS[name].model_fields if field not in text and field not in WELL_KNOWN]
    assert not unexplained


WELL_KNOWN = {"method", "bits", "group", "zero", "scale_bits", "damping"}


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_generator(name, settings):
    method = made(name, **settings)
    torch.manual_seed(1)
    first = encoded(method)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same_parts(first, encoded(method))
    assert torch.equal(torch.get_rng_state(), state)


def test_where_a_pass_samples_it_samples_by_its_generator():
    weight, hessian = pico.correlated(256, 200)  # more weights than k-means looks at
    method = made("jlcm", width=3, dim=1, group="row", grid="free")
    torch.manual_seed(1)
    first = applied(method, weight, hessian, torch.Generator().manual_seed(6))
    torch.manual_seed(2)
    same_parts(first, applied(method, weight, hessian, torch.Generator().manual_seed(6)))
    other = applied(method, weight, hessian, torch.Generator().manual_seed(7))
    assert any(not torch.equal(part, other.parts()[key]) for key, part in first.parts().items())


def test_each_tensor_has_a_generator_of_its_own():
    def draw(seed: int, name: str) -> int:
        torch.manual_seed(torch.seed())
        return int(torch.randint(2**40, (1,), generator=Work(Path("nowhere"), seed).generator(name)))

    assert draw(0, "a.weight") == draw(0, "a.weight")
    assert len({draw(0, "a.weight"), draw(0, "b.weight"), draw(1, "a.weight")}) == 3


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_pass_leaves_its_arguments_alone(name, settings):
    weight, hessian = pico.correlated(29, 90)
    applied(made(name, **settings), weight, hessian, torch.Generator())
    for found, kept in zip((weight, hessian), pico.correlated(29, 90), strict=True):
        assert torch.equal(found, kept)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_what_a_pass_makes_lies_where_the_matrix_lies(name, settings, pruned):
    method, (weight, moment) = made(name, **settings), pico.correlated(9, 24)
    kept = weight.abs() > weight.abs().median() if pruned else None
    if pruned and not (isinstance(method, WeightPass) and method.keeps_zeros):
        return
    weight = weight if kept is None else weight * kept
    on_host = applied(method, weight, moment, torch.Generator().manual_seed(6), kept)
    with pretended_gpu():
        there = [None if each is None else each.to(GPU) for each in (weight, moment, kept)]
        found = applied(method, *there[:2], torch.Generator().manual_seed(6), there[2])
        assert {part.device for part in found.parts().values()} == {GPU}
        assert restore(describe(found), found.parts()).decode().device == GPU
        parts = {part: tensor.cpu() for part, tensor in found.parts().items()}
    same_parts(restore(describe(found), parts), on_host)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_parts_rebuild_the_weights_and_are_smaller(name, settings):
    encoding = encoded(made(name, **settings))
    torch.testing.assert_close(
        restore(describe(encoding), encoding.parts()).decode(), encoding.decode(), rtol=0, atol=0
    )
    method = ONLY_PRUNED if isinstance(made(name), PruningSettings) else made(name, **settings)
    spec = method.spec_for("w", (29, 90), "linear")
    assert encoding.nbytes == spec.nbytes(29, 90) < 2 * 29 * 90
    assert describe(encoding).keys() == spec.describe(29, 90).keys()
    assert encoding.kind == spec.kind


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_declared_needs_are_the_real_ones(name, settings):
    method = made(name, **settings)
    _, hessian = pico.correlated(29, 90)
    first, second = encoded(method, hessian), encoded(method, hessian + 3 * torch.outer(*[hessian.diagonal()] * 2))
    if "data" in method.needs:
        assert any(not torch.equal(part, second.parts()[key]) for key, part in first.parts().items())
        return
    same_parts(first, second)
    weight, _ = pico.correlated(29, 90)
    same_parts(first, applied(method, weight, None, torch.Generator().manual_seed(0)))


def test_gradient_steps_need_gradients():
    assert "gradients" not in made("jlcm").needs
    assert "gradients" in made("jlcm", block_steps=1).needs


@pytest.mark.parametrize(("name", "settings"), [*CASES, *TRAINED_CASES])
def test_zeros_that_a_pass_says_it_keeps_are_kept(name, settings):
    method, (weight, hessian) = made(name, **settings), pico.correlated(29, 90)
    if isinstance(method, WeightPass) and method.keeps_zeros:
        kept = weight.abs() > weight.abs().median()
        known = Statistics(hessian, kept=kept)
        decoded = method.encode(weight * kept, known, torch.Generator().manual_seed(6)).decode()
        assert not decoded[~kept].any()
        assert decoded[kept].any()


def test_what_a_new_pass_does_not_say_it_cannot():
    settings = WeightSettings()
    assert not settings.keeps_zeros
    assert settings.block_learning is None
    assert (settings.ladder(), settings.quick()) == ((settings,), settings)
    assert not (settings.trains or settings.signs_inputs or settings.needs)


def test_a_file_without_its_pass_is_our_bug():
    empty = types.ModuleType("compressor.passes.empty")
    with pytest.raises(PassError, match=r"passes.empty: has no pass named 'affine'; write a class"):
        pass_class(empty, "affine")

    class Half(SETTINGS["affine"], WeightPass):
        pass

    empty.Half = Half
    with pytest.raises(PassError, match=r"passes.empty: Half has no encode; write it"):
        pass_class(empty, "affine")


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_what_a_pass_writes_onnx_takes(name, settings):
    described = describe(encoded(made(name, **settings)))
    assert refusal(described, "matmul", "default") is None
    reason = refusal(described | {"kind": "sparkle"}, "matmul", "default")
    assert "sparkle" in reason


def encode(llama, folder: Path, recipe_text: str, seed: int = 0, files: bool = False):
    """(encoded tensors, network, plan) of a whole sweep."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe_text)
    recipe, checkpoint = load_recipe(folder / "recipe.yaml"), open_checkpoint(llama)
    plan = make_plan(checkpoint, recipe)
    network = Network(checkpoint, fast=False)
    batches = pico.token_batches()
    tensors, _ = encode_network(network, batches, recipe, plan, Survey(), Work(folder, seed), lambda note: None)
    return tensors, network, plan


def text_of(name: str, settings: dict, extra: str = "") -> str:
    fields = "".join(f", {key}: {value}" for key, value in settings.items())
    return f"passes: [{{pass: {name}{fields}{extra}}}]\nembeddings: {{bits: 32}}\n"


def naive(weight: torch.Tensor, bits: float) -> torch.Tensor:
    """Rounded to 2**⌊bits⌋ evenly spaced levels around zero, at the one step that serves the matrix best."""
    levels, size = 2 ** int(bits), weight.square().mean().sqrt()
    steps = torch.linspace(0.02, 4, 200) * size
    found = [step * ((weight / step - 0.5).round() + 0.5).clamp(0.5 - levels / 2, levels / 2 - 0.5) for step in steps]
    return min(found, key=lambda rounded: float((rounded - weight).norm()))


def error(weight: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_naive_one_is_about_what_theory_says(bits):
    """Of a Gaussian matrix: 2**−bits is the least of any code (rate and distortion), and signs make √(1 − 2/π)."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = error(weight, naive(weight, bits))
    assert 2.0**-bits < found < 2 * 2.0**-bits
    assert bits > 1 or abs(found - (1 - 2 / math.pi) ** 0.5) < 0.01


def bar(original: torch.Tensor, planned: PlannedTensor) -> float:
    """The largest relative error that a pass may make of a matrix within a network, and less than zeros make: twice a
    naive one's, since it serves the output, and makes up for errors by others; pruned, what dropping at random makes.
    """
    rows, columns = planned.matrix
    if planned.prune is not None:
        return (1 - planned.prune.kept(rows, columns) / (rows * columns)) ** 0.5
    return min(0.95, 2 * error(original, naive(original, planned.spec.code_bits)))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_pass_beats_a_naive_one_of_as_many_bits(name, settings):
    """On the outputs where it is given data, on the weights where it is not."""
    method, (weight, hessian) = made(name, **settings), pico.correlated(60, 90)
    found = applied(method, weight, hessian, torch.Generator().manual_seed(0)).decode()
    if isinstance(method, PruningPass):
        kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < method.kept(60, 90) / 5400
        other = weight * kept
    else:
        assert isinstance(method, WeightPass)
        spec = method.spec_for("w", (60, 90), "linear")
        assert spec is not None
        other = naive(weight, spec.code_bits)
    served = hessian if "data" in method.needs else torch.eye(90)
    assert pico.output_error(weight, found, served) < pico.output_error(weight, other, served) * 1.001


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_only_selected_tensors_change_and_nothing_is_left_behind(tmp_path, llama, name, settings):
    text = text_of(name, settings, ", select: ['*mlp*'], skip: ['*.1.mlp.up*']")
    tensors, network, plan = encode(llama, tmp_path, text)
    checkpoint = open_checkpoint(llama)
    planned = {tensor.name: tensor for tensor in plan.tensors}
    assert set(tensors) == set(planned)
    changed = 0
    for key in tensors:
        original, found = checkpoint.read(key), tensors[key]
        assert found.encoding.nbytes == planned[key].bytes_after, key
        if ".mlp." in key and ".1.mlp.up" not in key:
            changed += 1
            assert found.encoding.kind != "dense"
            assert found.encoding.nbytes < 2 * original.numel()
            assert error(original, found.decode()) < bar(original, planned[key]), key
        else:
            assert torch.equal(found.decode(), original), key
    assert changed == 8
    for key, module in network.module.named_modules():
        assert not module._forward_hooks, key
        assert not module._forward_pre_hooks, key
    for key, parameter in network.module.named_parameters():
        assert parameter.is_meta, key
        assert not parameter.requires_grad, key
        assert parameter.grad is None, key


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_sweep_gives_the_same_bytes_whatever_the_global_seed(tmp_path, llama, name, settings):
    written = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        tensors, _, _ = encode(llama, tmp_path / str(global_seed), text_of(name, settings))
        write_tensors(tmp_path / "all.safetensors", tensors, tensors.tied)
        written.append((tmp_path / "all.safetensors").read_bytes())
    assert written[0] == written[1]
    assert tensors.tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("name", "settings"), [case for case in dict(CASES).items() if "data" in made(case[0], **case[1]).needs]
)
def test_later_layers_make_up_for_earlier_ones(tmp_path, llama, name, settings):
    """Encoded from the compressed prefix, a layer is another than from the original one."""
    key = "model.layers.1.mlp.down_proj.weight"
    found = []
    for number, select in enumerate(("*.1.mlp.down*", "*.1.mlp.*", "*")):
        tensors, _, _ = encode(llama, tmp_path / str(number), text_of(name, settings, f", select: ['{select}']"))
        found.append(tensors[key].decode())
    assert not torch.equal(found[0], found[1])  # of the layers before it in its block
    assert not torch.equal(found[1], found[2])  # of the blocks before


@pytest.mark.parametrize(("bits", "dtype"), [(16, "float16"), (32, "float32"), (4, None)])
def test_tables_are_stored_as_the_recipe_says(tmp_path, llama, bits, dtype):
    text = f"passes: [{{pass: affine}}]\nembeddings: {{bits: {bits}}}\nexport: {{dense: float16}}\n"
    tensors, _, plan = encode(llama, tmp_path, text)
    table = tensors["model.embed_tokens.weight"].encoding
    assert tensors["model.norm.weight"].encoding.parts()["weight"].dtype == torch.float16
    if dtype is None:
        assert (table.kind, table.bits) == ("affine", 4)
    else:
        assert table.parts()["weight"].dtype == getattr(torch, dtype)
    planned = {tensor.name: tensor.bytes_after for tensor in plan.tensors}
    assert {key: tensors[key].encoding.nbytes for key in tensors} == planned


def test_block_steps_learn(tmp_path, llama):
    settings = {"width": 4, "dim": 2}
    plain, _, _ = encode(llama, tmp_path / "a", text_of("jlcm", settings))
    learned, _, _ = encode(llama, tmp_path / "b", text_of("jlcm", settings | {"block_steps": 6}))
    key = "model.layers.0.mlp.down_proj.weight"
    first, second = plain[key].encoding.parts(), learned[key].encoding.parts()
    assert not torch.equal(first["table"], second["table"]) or not torch.equal(first["scales"], second["scales"])
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(plain[norm].decode(), learned[norm].decode())


@pytest.mark.parametrize("build", [pico.gpt2, pico.bert, pico.albert, functools.partial(pico.albert, n_groups=2)])
def test_other_architectures_are_encoded_as_planned(tmp_path, build):
    directory = build(tmp_path / "model")
    tensors, _, plan = encode(directory, tmp_path / "work", text_of("affine", {"bits": 8, "method": "gptq"}))
    checkpoint = open_checkpoint(directory)
    planned = {tensor.name: tensor for tensor in plan.tensors}
    assert set(planned) <= set(tensors)
    for key, tensor in planned.items():
        original = checkpoint.read(key)
        assert tensors[key].encoding.nbytes == tensor.bytes_after, key
        assert float((tensors[key].decode() - original).norm()) <= 0.01 * float(original.norm()), key
    assert sum(tensors[key].encoding.kind == "affine" for key in tensors) >= 6


@pytest.mark.parametrize(("name", "settings"), TRAINED_CASES)
def test_a_trained_encoding_is_the_same_whatever_the_global_seed_and_exactly_what_is_stored(name, settings):
    method, found = made(name, **settings, epochs=2, batch=16, rate=0.05), []
    assert {"data", "gradients", "training"} <= method.needs
    for seed in (1, 2):
        subject = training_case.subject_of(training_case.residual(), method)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(method.fit(subject))
        assert torch.equal(torch.get_rng_state(), state)
    first, second = (outcome.module.state_dict() for outcome in found)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    module = found[0].module
    for key in found[0].report["binary"]:
        matrix = module.get_parameter(key).flatten(1)
        encoding = method.encode(matrix, Statistics(), torch.Generator())
        assert torch.equal(encoding.decode(), matrix)
        same_parts(encoding, restore(describe(encoding), encoding.parts()))
        assert encoding.nbytes == method.spec_for(key, tuple(matrix.shape), "conv").nbytes(*matrix.shape)
        assert refusal(describe(encoding), "constant", "default") is None
    original = training_case.residual().state_dict()
    assert any(not torch.equal(tensor, first[key]) for key, tensor in original.items())
    assert not module.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.parameters())
    assert not any(child._forward_hooks or child._backward_hooks for child in module.modules())


@pytest.mark.parametrize(("name", "settings"), STRUCTURE_CASES)
def test_a_structure_pass_gives_the_same_smaller_network_whatever_the_global_seed(name, settings):
    method, found = made(name, **settings), []
    for seed in (1, 2):
        module = training_case.residual()
        before = sum(parameter.numel() for parameter in module.parameters())
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        smaller = method.restructure(training_case.subject_of(module, method)).module
        assert torch.equal(torch.get_rng_state(), state)
        found.append(smaller)
        assert sum(parameter.numel() for parameter in smaller.parameters()) <= (1 - method.removes) * before
    first, second = (dict(each.state_dict()) for each in found)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert not smaller.training
    for key, child in smaller.named_modules():
        assert not child._forward_hooks, key
        assert not child._forward_pre_hooks, key
        assert not child._backward_hooks, key
    assert all(parameter.grad is None for parameter in smaller.parameters())
