"""One artifact, many sizes: every graph computes what its network does, from one file; --size, load and extract."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import compressor
from compressor.core.errors import CheckpointError, RecipeError, UsageError
from compressor.core.options import RunOptions
from compressor.core.sizes import RECORD, read_sizes
from compressor.evaluate.again import Given
from compressor.evaluate.extraction import extract
from compressor.evaluate.judge import evaluate
from compressor.evaluate.session import open_session
from compressor.evaluate.verification import failures, verify
from compressor.run.pipeline import run
from compressor.run.prepare import prepare
from tests import pico

RECIPE = """
passes:
  - {pass: sortednet, widths: [0.5, 1.0], depths: [0.5, 1.0], multiple: 16, epochs: 1, batch: 16, SHIP}
  - {pass: affine, method: rtn, bits: 8, group: row}
calibration: {samples: 32}
evaluation: {speed: false}
"""
ARCH = "tests.pico:ResNet"


@pytest.fixture(scope="module", autouse=True)
def folder(module_here):
    generator = np.random.default_rng(0)
    for name in ("training", "evaluation"):
        np.savez(module_here / f"{name}.npz", image=generator.standard_normal((32, 3, 12, 12)).astype(np.float32))
    pico.write_state_dict(pico.ResNet, module_here / "model.pt")
    (module_here / "r.yaml").write_text(RECIPE.replace("SHIP", "ship: ['50x50']"))
    return module_here


def options(**changes) -> RunOptions:
    known = {"recipe": "r.yaml", "data": "training.npz", "eval": "evaluation.npz", "output": Path("out")}
    return RunOptions(**({"model": "model.pt", "arch": ARCH} | known | changes))


@pytest.fixture(scope="module")
def artifact(folder):
    return run(options())


def images() -> np.ndarray:
    with np.load("evaluation.npz") as file:
        return file["image"]


def test_every_size_is_a_graph_over_one_file_and_computes_what_its_network_does(artifact):
    sizes = read_sizes(artifact.directory)
    assert sizes is not None
    assert list(sizes.sizes) == ["50x50", "100x100"]
    for name, entry in sizes.sizes.items():
        module = compressor.load(artifact.directory, arch=ARCH, size=name)
        with torch.no_grad():
            wanted = module(torch.from_numpy(images())).numpy()
        graph = artifact.directory / ("model.onnx" if name == "100x100" else f"model-{name}.onnx")
        (found,) = open_session(graph).run({"": images()}).values()
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
        assert entry.proof is not None
        assert entry.proof < 1e-4
        assert entry.facts["parameters"] == sum(parameter.numel() for parameter in module.parameters())
        external = {
            entry.value
            for tensor in onnx.load(graph, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert external == {"model.safetensors"}
    assert {file.name for file in artifact.directory.glob("*.safetensors")} == {"model.safetensors"}


def test_the_bytes_of_all_sizes_are_stated_and_what_they_share_is_there_once(artifact):
    sizes = artifact.report["sizes"]
    files = artifact.report["size"]["files"]
    stated = sizes["50x50"]["bytes"]
    assert stated["graph"] == files["model-50x50.onnx"]
    assert 0 < stated["own"] < stated["alone"] < files["model.safetensors"]


def test_a_size_is_evaluated_and_verified_as_it_was_recorded(artifact):
    recorded = artifact.report["sizes"]["50x50"]["quality"]
    found = evaluate(artifact.directory, Given(arch=ARCH), "50x50")
    assert found["kl_divergence"] == pytest.approx(recorded["kl_divergence"])
    assert found["kl_divergence"] != artifact.report["quality"]["kl_divergence"]
    checks = verify(artifact.directory, True, Given(arch=ARCH), "50x50")
    assert not failures(checks)
    assert next(check for check in checks if check.name == "quality").passed


@pytest.mark.parametrize("size", ["50x50", "100x100"])
def test_an_extracted_size_stands_alone_and_is_the_same_to_the_bit(artifact, size):
    out = Path(f"alone-{size}")
    extract(artifact.directory, size, out)
    before = compressor.load(artifact.directory, arch=ARCH, size=size).state_dict()
    after = compressor.load(out, arch=ARCH).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not failures(verify(out, True, Given(arch=ARCH)))
    assert not (out / RECORD).exists()


def test_what_is_no_size_is_refused_with_those_that_are(artifact):
    with pytest.raises(UsageError, match="has no size '51x50'. Did you mean '50x50'"):
        compressor.load(artifact.directory, arch=ARCH, size="51x50")
    with pytest.raises(UsageError, match="holds an artifact already"):
        extract(artifact.directory, "50x50", artifact.directory)
    extract(artifact.directory, "50x50", Path("one"))
    with pytest.raises(UsageError, match="holds one size only"):
        evaluate("one", None, "50x50")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said["sizes"].__setitem__("../50", said["sizes"].pop("50x50")), "'../50' is no size"),
        (lambda said: said["sizes"]["50x50"].__setitem__("graph", "x"), "Extra inputs"),
        (lambda said: said.__setitem__("largest", "7"), "it has no '7'"),
        (lambda said: said["sizes"]["50x50"]["own"].append("nothing"), "holds no 'nothing@50x50'"),
        (
            lambda said: said["sizes"]["50x50"]["parts"].__setitem__("head.weight", ["head.weight", [99, 28]]),
            r"holds no 'head.weight' that begins with \(99, 28\)",
        ),
    ],
)
def test_a_record_that_does_not_fit_its_weights_is_refused(artifact, tmp_path, change, message):
    for file in artifact.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    said = json.loads((tmp_path / RECORD).read_text())
    change(said)
    (tmp_path / RECORD).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=message):
        compressor.load(tmp_path, arch=ARCH, size="50x50")


@pytest.mark.parametrize(
    ("sets", "changes", "message"),
    [
        (("affine.method=gptq",), {}, "affine stores a matrix as a whole.*write affine with method: rtn or hqq"),
        (("affine.group=64",), {}, "multiples of 16, and affine stores groups of 64; write multiple: 64"),
        (("calibration.correct_means=true",), {}, "calibration.correct_means would change the largest size alone"),
        ((), {"format": "safetensors"}, "--format safetensors; leave that out"),
        ((), {"target_size": 10**6}, "a target is of one network"),
    ],
)
def test_what_sizes_cannot_go_through_is_refused_before_work_begins(sets, changes, message):
    with pytest.raises(RecipeError, match=message):
        prepare(options(sets=sets, output=Path("refused"), **changes))


class Grouped(torch.nn.Module):
    """A convolution of 59 groups of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = torch.nn.Conv1d(6, 177, 3), torch.nn.Conv1d(177, 177, 9, groups=59)
        self.last, self.head = torch.nn.Conv1d(177, 177, 3), torch.nn.Linear(177, 5)

    def forward(self, x):
        for layer in (self.first, self.grouped, self.last):
            x = torch.relu(layer(x))
        return self.head(x.mean(2))


def linear() -> torch.nn.Module:
    return torch.nn.Linear(72, 96)


class Joined(torch.nn.Module):
    """Channels beside channels: the first of one are not the first of both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = torch.nn.Conv1d(6, 8, 3), torch.nn.Conv1d(6, 8, 3), torch.nn.Linear(16, 5)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), self.other(x)], 1).mean(2))


def options_of(kind, shape: tuple[int, ...], **changes) -> RunOptions:
    name = kind.__name__
    arrays = np.random.default_rng(1).standard_normal((2, 32, *shape)).astype(np.float32)
    for which, array in zip(("training", "evaluation"), arrays, strict=True):
        np.savez(f"{name}-{which}.npz", x=array)
    torch.manual_seed(0)
    torch.save(kind().state_dict(), f"{name}.pt")
    files = {"model": f"{name}.pt", "data": f"{name}-training.npz", "eval": f"{name}-evaluation.npz"}
    sets = ("sortednet.depths=[1]", "sortednet.ship=null", "sortednet.multiple=8")
    return options(arch=f"{__name__}:{name}", sets=sets, output=Path(f"out-{name}"), **files, **changes)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [(linear, (72,), "can remove nothing from it"), (Joined, (6, 12), "no channels, heads or neurons that lie one")],
)
def test_a_plan_refuses_a_network_that_nothing_could_be_sorted_in(kind, shape, message):
    with pytest.raises(CheckpointError, match=message):
        prepare(options_of(kind, shape))


def test_a_plan_refuses_sizes_that_end_within_a_group():
    message = r"size 50x\d+ cannot share 'blocks.0.conv1.weight': 90 of 180 columns end within a group of 180"
    with pytest.raises(RecipeError, match=message):
        prepare(options(sets=("sortednet.multiple=1", "sortednet.ship=null"), output=Path("refused")))


def test_a_plan_refuses_sizes_that_are_one_network():
    with pytest.raises(RecipeError, match="sizes 50x100 and 100x100 are the same network"):
        prepare(options(sets=("sortednet.multiple=32",), output=Path("refused")))


def test_groups_of_a_convolution_stay_in_multiples_of_channels():
    made = run(options_of(Grouped, (6, 24)))
    module = compressor.load(made.directory, arch=f"{__name__}:Grouped", size="50")
    assert tuple(module.last.weight.shape) == (88, 96, 3)
    assert module.grouped.groups == 32


@pytest.mark.parametrize("ship", ["['50x50']", "null"])
def test_the_bytes_of_the_weights_are_planned_with_what_sizes_have_of_their_own(artifact, ship):
    changes = options(sets=(f"sortednet.ship={ship}",), output=Path("of-bytes"))
    planned = prepare(changes).plan.files
    made = artifact if ship != "null" else run(changes)
    assert planned["model.safetensors"] == (made.directory / "model.safetensors").stat().st_size
    assert {file.name for file in made.directory.glob("model*.onnx")} <= planned.keys()


def test_a_plan_says_that_there_will_be_sizes():
    notes = prepare(options(output=Path("planned"))).plan.notes
    assert any("sortednet puts smaller networks into it, 1 of them (50x50)" in note for note in notes)
