"""One artifact, many sizes: every graph computes what its network does, from one file; --size, load and extract."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import compressor
from compressor.core.artifact import Artifact
from compressor.core.errors import CheckpointError, GateFailed, RecipeError, UsageError
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


def test_a_gate_that_only_a_size_misses_fails_with_its_name(tmp_path):
    sets = ("sortednet.largest=frozen", "gates.max_kl_divergence=0.001")
    with pytest.raises(GateFailed, match=r"gated: size 50x50: KL divergence is [^;]*, the gate is 0.001; ") as raised:
        run(options(sets=sets, output=Path("gated")))
    assert "largest are" not in str(raised.value)  # tensors, of an artifact of too many bytes
    failed = Artifact.open(Path("gated.failed"))
    (failure,) = failed.report["gates"]["failures"]
    assert failed.report["gates"]["sizes"] == {"50x50": [failure.removeprefix("size 50x50: ")]}
    html = (failed.directory / "report.html").read_text()
    assert "The networks in it" in html
    assert "gates missed" in html
    assert f"{failed.report['sizes']['50x50']['quality']['kl_divergence']:.4g}" in html
    for name, missed in (("50x50", [failure.removeprefix("size 50x50: ")]), ("100x100", [])):
        extract(failed.directory, name, tmp_path / name)
        gates = json.loads((tmp_path / name / "compression.json").read_text())["gates"]
        assert gates == {"passed": not missed, "failures": missed}


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


def copied(artifact, folder: Path) -> Path:
    """The artifact's files in a folder, without links."""
    folder.mkdir()
    for file in artifact.directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def changed_graph(folder: Path, change) -> None:
    graph = folder / "model-50x50.onnx"
    model = onnx.load(graph, load_external_data=False)
    change(model)
    graph.write_bytes(model.SerializeToString())


def moved(key: str, value: str):
    """A graph of which the first tensor of those that lie in a file says this."""

    def change(model) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        for entry in tensor.external_data:
            entry.value = value if entry.key == key else entry.value

    return lambda folder: changed_graph(folder, change)


def renamed(model) -> None:
    next(tensor for tensor in model.graph.initializer if tensor.external_data).name = "stranger"


def without_stops(model) -> None:
    stops = {node.input[2] for node in model.graph.node if node.op_type == "Slice"}
    for tensor in model.graph.initializer:
        if tensor.name in stops:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(0, np.int64), tensor.name))


def piped(folder: Path) -> None:
    (folder / "model-50x50.onnx").unlink()
    os.mkfifo(folder / "model-50x50.onnx")


def linked(name: str):
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to("../elsewhere")

    return change


def said(change):
    def changed(folder: Path) -> None:
        content = json.loads((folder / RECORD).read_text())
        change(content["sizes"]["50x50"])
        (folder / RECORD).write_text(json.dumps(content))

    return changed


DAMAGES = [
    (lambda folder: (folder / "model-50x50.onnx").unlink(), "is not there"),
    (piped, "is a named pipe"),
    (linked("model-50x50.onnx"), "outside of the model's folder"),
    (linked("model.safetensors"), "outside of the model's folder"),
    (linked(RECORD), "outside of the model's folder"),
    (lambda folder: (folder / "model-50x50.onnx").write_bytes(b"half of a graph"), "cannot be read as ONNX"),
    (moved("location", "/etc/passwd"), "not in its folder; nothing was read there"),
    (moved("location", "../secret"), "not in its folder; nothing was read there"),
    (moved("location", "compression.json"), "is truncated|and not in model.safetensors"),
    (moved("offset", str(10**9)), "is truncated"),
    (moved("offset", "-5"), "cannot be read as ONNX"),
    (moved("offset", "0"), "is damaged"),
    (moved("length", "1"), "it is corrupt"),
    (lambda folder: changed_graph(folder, renamed), "takes 'stranger', which is no tensor of this size"),
    (lambda folder: changed_graph(folder, without_stops), "is damaged"),
    (said(lambda entry: entry["parts"].update({"head.weight": ["head.weight", [1, 1]]})), "is damaged"),
    (said(lambda entry: entry.update(own=[])), "is damaged"),
    (said(lambda entry: entry.update(quality={"perplexity": "x"})), "is damaged; sizes.50x50.quality.perplexity"),
    (said(lambda entry: entry.update(tied={"a": "b", "b": "a"})), "holds nothing that 'a' of size 50x50"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_size_of_a_damaged_artifact_is_refused_and_leaves_nothing(artifact, tmp_path, damage, message):
    folder = copied(artifact, tmp_path / "strange")
    (tmp_path / "secret").write_bytes(bytes(10**5))
    damage(folder)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        extract(folder, "50x50", tmp_path / "alone")
    assert sorted(tmp_path.iterdir()) == before


def test_names_that_stand_for_nothing_are_refused(artifact, tmp_path):
    folder = copied(artifact, tmp_path / "strange")
    said(lambda entry: entry.update(tied={"a": "b", "b": "a"}))(folder)
    with pytest.raises(CheckpointError, match="holds nothing that 'a' of size 50x50 could stand for"):
        compressor.load(folder, arch=ARCH, size="50x50")


def test_what_lies_outside_of_an_artifact_is_not_loaded(artifact, tmp_path):
    folder = copied(artifact, tmp_path / "strange")
    linked("model.safetensors")(folder)
    with pytest.raises(CheckpointError, match="outside of the model's folder"):
        compressor.load(folder, arch=ARCH)


@pytest.mark.parametrize("place", ["inside", "", "deeper/still"])
def test_a_size_is_not_written_into_the_artifact_that_it_is_taken_from(artifact, tmp_path, place):
    folder = copied(artifact, tmp_path / "many")
    before = sorted(folder.iterdir())
    with pytest.raises(UsageError, match="is in the artifact that 50x50 is taken from"):
        extract(folder, "50x50", folder / place, force=True)
    assert sorted(folder.iterdir()) == before


def test_a_size_of_an_artifact_whose_report_says_little_is_written(artifact, tmp_path):
    folder = copied(artifact, tmp_path / "many")
    (folder / "compression.json").write_text("{}")
    extract(folder, "50x50", tmp_path / "alone")
    assert (tmp_path / "alone" / "model.onnx").is_file()


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
