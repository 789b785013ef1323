"""ONNX graphs as a source: their layers are found, calibrated in onnxruntime, re-encoded in place, and proved."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from torch import nn

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError, DataError, RecipeError
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensors
from compressor.evaluate.inspection import inspect_path
from compressor.evaluate.judge import evaluate
from compressor.evaluate.verification import verify
from compressor.export import int8_regions
from compressor.onnx.layers import RESERVED
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.run.pipeline import run
from compressor.sweeps.moments import layer_stages, second_moments
from compressor.sweeps.network import Network
from tests import pico
from tests.onnx import graphs

RECIPE = """
passes: [PASS]
embeddings: {bits: 4, group: 32}
calibration: {samples: 48, tokens: 512, window: 16}
evaluation: {samples: 16, tokens: 64, window: 16}
"""
GPTQ = "{pass: affine, method: gptq, bits: 4, group: 32}"
RTN = "{pass: affine, method: rtn, bits: 2, group: 64, zero: half}"


@pytest.fixture
def data(tmp_path) -> Path:
    np.savez(tmp_path / "tokens.npz", input_ids=graphs.tokens_data(64))
    np.savez(tmp_path / "images.npz", pixels=graphs.images_data(64))
    return tmp_path


def recipe(folder: Path, step: str = GPTQ, more: str = "") -> str:
    (folder / "recipe.yaml").write_text(RECIPE.replace("PASS", step) + more)
    return str(folder / "recipe.yaml")


def compressed(model: Path, steps: str, **more):
    folder = model.parent
    kind = "images" if "images" in model.name else "tokens"
    settings = {"data": str(folder / f"{kind}.npz"), "output": folder / "out", "force": True} | more
    return run(RunOptions(str(model), steps, **settings))


def outputs(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path)).run(None, feed)


def decoded(model: Path, artifact: Path, folder: Path) -> Path:
    """The graph with the artifact's decoded weights in it, written by the onnx package alone."""
    checkpoint, tensors = open_checkpoint(model), EncodedTensors([artifact / "model.safetensors"])
    names = {str(value.name): name for name, value in checkpoint.source.weights.values.items()}
    proto = onnx.load(model)
    for initializer in proto.graph.initializer:
        if initializer.name in names:
            array = tensors[names[initializer.name]].decode().numpy()
            initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
    onnx.save(proto, folder / "by-hand.onnx")
    return folder / "by-hand.onnx"


def test_layers_are_named_by_what_the_graph_tells(tmp_path):
    found = open_checkpoint(graphs.tokens(tmp_path)).tensors
    roles = {name: (info.role, info.transposed) for name, info in found.items()}
    assert roles == {
        "table.weight": ("embedding", False), "block.query.weight": ("linear", True),
        "block.query.bias": ("other", False), "block.out.weight": ("linear", False),
        "head.weight": ("linear", False), "head.bias": ("other", False),
        "norm.weight": ("other", False), "norm.bias": ("other", False),
    }  # fmt: skip
    kinds = {info.role for info in open_checkpoint(graphs.images(tmp_path)).tensors.values()}
    assert kinds == {"conv", "linear", "other"}


def test_no_layer_is_called_as_something_that_modules_have():
    assert {name for name in dir(nn.Module) if not name.startswith("_")} <= RESERVED | {"T_destination"}


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_the_network_computes_what_onnxruntime_does(tmp_path, kind, batch):
    """Also where the graph takes a fixed number of examples at a time."""
    proto = graphs.graph(kind)
    feed = {"tokens": {"input_ids": graphs.tokens_data(7)}, "images": {"pixels": graphs.images_data(7)}}[kind]
    onnx.save(proto, tmp_path / "free.onnx")
    wanted = outputs(tmp_path / "free.onnx", feed)
    if batch:
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(proto, tmp_path / "net.onnx")
    network = Network(open_checkpoint(tmp_path / "net.onnx"))
    with network.loaded(network.names_in("")):
        found = network.call({name: torch.from_numpy(array) for name, array in feed.items()})
    for array, tensor in zip(wanted, found.values(), strict=True):
        np.testing.assert_allclose(tensor.numpy(), array, atol=1e-5 * np.abs(array).max())


def test_second_moments_are_of_what_onnxruntime_gives_the_layer(tmp_path):
    """By a naive loop in float64 over the activations that an added output of the graph shows."""
    path, ids = graphs.tokens(tmp_path), graphs.tokens_data(5)
    proto = onnx.load(path)
    proto.graph.output.append(onnx.ValueInfoProto(name="active"))
    onnx.save(proto, tmp_path / "seen.onnx")
    seen = outputs(tmp_path / "seen.onnx", {"input_ids": ids})[-1].astype(np.float64).reshape(-1, 128)
    wanted = sum(np.outer(row, row) for row in seen) / len(seen)
    network = Network(open_checkpoint(path))
    for _, block, reached in network.sweep([{"input_ids": torch.from_numpy(part)} for part in (ids[:3], ids[3:])]):
        found = {name: module for name, module in _layers(block).items() if name == "block.out.weight"}
        (stage,) = [s for s in layer_stages(network, block, "", reached[0]) if "block.out.weight" in s.names]
        moments, rows = second_moments(network, block, found, stage.names, stage.calls, reached, {})
    assert rows == len(seen)
    np.testing.assert_allclose(moments["block.out.weight"].numpy(), wanted, rtol=1e-4, atol=1e-6)


def _layers(block: nn.Module) -> dict[str, nn.Module]:
    from compressor.graph.blocks import layers

    return layers(block)


@pytest.mark.parametrize(
    "step",
    [
        GPTQ,
        RTN,
        "{pass: jlcm, width: 4, dim: 2, group: 32}",
        "{pass: rounding, bits: 3, group: 32, steps: 3}",
        "{pass: affine, bits: 8, group: row}",
    ],
)
@pytest.mark.parametrize("make", [graphs.tokens, graphs.images, graphs.external])
def test_an_artifact_computes_what_its_encodings_say(data, step, make):
    model = make(data)
    before = {path.name: path.read_bytes() for path in data.iterdir() if path.is_file()}
    artifact = compressed(model, recipe(data, step), sets=("export.activations=exact", "evaluation.samples=0"))
    kind = "images" if make is graphs.images else "tokens"
    feed = dict(np.load(data / f"{kind}.npz"))
    found = outputs(artifact.directory / "model.onnx", feed)
    for array, wanted in zip(found, outputs(decoded(model, artifact.directory, data), feed), strict=True):
        assert np.abs(array - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert artifact.report["proof"]["exact"]["max_relative_error"] < 1e-5
    plan = make_plan(open_checkpoint(model), load_recipe(recipe(data, step)))
    assert plan.files["model.safetensors"] == (artifact.directory / "model.safetensors").stat().st_size
    assert sum(bool(tensor.by) for tensor in plan.tensors) == (3 if kind == "tokens" else 1)
    assert all((data / name).read_bytes() == content for name, content in before.items() if name != "recipe.yaml")


def test_products_with_encoded_weights_run_in_the_low_bit_kernel(data):
    graph = ir.load(compressed(graphs.tokens(data), recipe(data)).directory / "model.onnx").graph
    types = [node.op_type for node in graph]
    assert types.count("MatMulNBits") == 2
    assert types.count("GatherBlockQuantized") == 1
    assert "MatMul" not in types  # the head, of 512 weights, is a Gemm


def test_calibration_is_on_the_inputs_of_each_layer(data):
    """Feedback weighed by the activations that the data cause beats rounding to nearest on these data."""
    model, errors = graphs.tokens(data), {}
    for method in ("rtn", "gptq"):
        step = f"{{pass: affine, method: {method}, bits: 2, group: 32}}"
        artifact = compressed(model, recipe(data, step, "export: {activations: exact}\n"), sets=("embeddings.bits=32",))
        errors[method] = artifact.report["quality"]["mean_relative_error"]
    assert errors["gptq"] < 0.95 * errors["rtn"]


def test_the_same_run_gives_the_same_bytes_and_can_be_verified(data):
    model, steps = graphs.images(data), recipe(data, "{pass: jlcm, width: 4, dim: 2, group: 32}")
    first = compressed(model, steps)
    files = {path.name: path.read_bytes() for path in first.directory.glob("model.*")}
    again = compressed(model, steps, output=data / "again")
    assert {path.name: path.read_bytes() for path in again.directory.glob("model.*")} == files
    assert all(check.passed is not False for check in verify(first.directory))
    assert evaluate(first.directory)["top1_agreement"] == first.report["quality"]["top1_agreement"]
    assert first.report["original_speed"]["latency_seconds"] > 0


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_a_plan_counts_the_nodes_and_small_initialisers_that_a_graph_keeps(tmp_path, kind):
    """A thousand nodes more, each with a number of its own, are as many bytes more in the plan as in the file."""
    model = graphs.graph(kind)
    onnx.save(model, tmp_path / "few.onnx")
    output = model.graph.output[-1].name
    last = next(node for node in model.graph.node if output in node.output)
    last.output[list(last.output).index(output)] = "value_0"
    for i in range(1000):
        model.graph.initializer.append(numpy_helper.from_array(np.full((5,), i, np.float32), f"number_{i}"))
        written = output if i == 999 else f"value_{i + 1}"
        model.graph.node.append(helper.make_node("Sum", [f"value_{i}", f"number_{i}"], [written], name=f"node_{i}"))
    onnx.save(model, tmp_path / "many.onnx")
    few, many = (open_checkpoint(tmp_path / f"{name}.onnx") for name in ("few", "many"))
    wanted = (tmp_path / "many.onnx").stat().st_size - (tmp_path / "few.onnx").stat().st_size
    assert many.source.graph_bytes() - few.source.graph_bytes() == pytest.approx(wanted, rel=0.25)
    plans = [make_plan(each, load_recipe("encoder-4bit")).files["model.onnx"] for each in (few, many)]
    assert plans[1] - plans[0] == many.source.graph_bytes() - few.source.graph_bytes()


def test_convolutions_run_on_int8(data, monkeypatch):
    """As in networks that are large enough for it to be faster."""
    monkeypatch.setattr(int8_regions, "convolution_times", lambda *_: (1e9, 1.0))
    quick = ("evaluation.speed=false",)  # that of so small a network falls
    report = compressed(graphs.images(data), "cnn-int8", output=data / "int8", sets=quick).report
    assert report["quality"]["mean_relative_error"] < 0.05
    types = [node.op_type for node in ir.load(data / "int8" / "model.onnx").graph]
    assert types.count("QuantizeLinear") >= 2
    assert "BatchNormalization" not in types


@pytest.mark.parametrize("mode", ["standard", "compat"])
def test_other_modes(data, mode):
    report = compressed(graphs.tokens(data), recipe(data), mode=mode).report
    assert report["proof"]["exact"]["max_relative_error"] < 1e-5


def test_standard_needs_an_opset_that_can_be_converted(data):
    from compressor.core.errors import ExportError

    with pytest.raises(ExportError, match="--standard needs a graph of opset 18 or newer; found 17"):
        compressed(graphs.images(data), recipe(data), mode="standard")


def test_a_language_model_is_measured_by_its_perplexity_and_speaks(tmp_path):
    model = graphs.decoder(tmp_path)
    (tmp_path / "a.txt").write_text(pico.text(1))
    (tmp_path / "b.txt").write_text(pico.text(2))
    artifact = run(
        RunOptions(str(model), recipe(tmp_path), output=tmp_path / "out", data=str(tmp_path / "a.txt"),
                   eval=str(tmp_path / "b.txt"))
    )  # fmt: skip
    assert 0.9 < artifact.report["quality"]["ratio"] < 1.2
    assert artifact.report["source"]["family"] == "decoder"
    assert artifact.report["speed"]["decode_tokens_per_second"] > 0


def test_older_opsets_are_converted(data):
    proto = graphs.graph("images")
    proto.opset_import[0].version = 11
    onnx.save(proto, data / "images.onnx")
    report = compressed(data / "images.onnx", recipe(data)).report
    assert report["proof"]["exact"]["max_relative_error"] < 1e-5


def test_inspect_lists_layers(tmp_path):
    found = inspect_path(graphs.tokens(tmp_path))
    assert found["format"] == "onnx"
    assert set(found["bytes_by_role"]) == {"embedding", "linear", "other"}


@pytest.mark.parametrize(
    ("recipe_name", "message"),
    [
        ("llm-2bit", "distill.steps needs gradients, and .* is an ONNX graph, run forwards only; leave that out with"),
        ("llm-sparse50", "gblm needs gradients, and .* is an ONNX graph, run forwards only"),
        ("cnn-once", "hesso makes the network smaller, and .* is an ONNX graph"),
    ],
)
def test_what_needs_gradients_is_refused(data, recipe_name, message):
    with pytest.raises(RecipeError, match=message):
        compressed(graphs.images(data), recipe_name)


def test_quantised_graphs_are_refused_by_what_is_in_them(data):
    model = graphs.tokens(data)
    quantize_dynamic(model, data / "dynamic.onnx")
    with pytest.raises(CheckpointError, match=r"dynamic.onnx: is already quantised; found .*MatMulInteger"):
        open_checkpoint(data / "dynamic.onnx")
    artifact = compressed(model, recipe(data)).directory
    shutil.copytree(artifact, data / "copy")
    with pytest.raises(CheckpointError, match="already quantised; found 2 MatMulNBits, 1 GatherBlockQuantized"):
        open_checkpoint(data / "copy" / "model.onnx")


@pytest.mark.parametrize("location", ["../secret.data", "/etc/hostname", "link.data", "a/../../secret.data", ""])
def test_weights_outside_of_the_folder_are_not_read(tmp_path, location):
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(100_000))
    (folder / "link.data").symlink_to(tmp_path / "secret.data")
    path = graphs.external(folder)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError, match="which is not in its folder; nothing was read there"):
        open_checkpoint(path)


def test_weights_beside_the_graph_are_whole_or_refused(tmp_path):
    path = graphs.external(tmp_path)
    checkpoint = open_checkpoint(path)
    np.testing.assert_array_equal(checkpoint.read("table.weight").numpy(), graphs.arrays("tokens")["table"])
    assert checkpoint.file_of("table.weight").name == "model.data"
    assert [file.name for file in checkpoint.source.files] == ["model.onnx", "model.data"]
    content = (tmp_path / "model.data").read_bytes()
    (tmp_path / "model.data").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="model.data: is truncated; it has"):
        open_checkpoint(path)
    (tmp_path / "model.data").unlink()
    with pytest.raises(CheckpointError, match="its weights are missing; no file model.data beside it"):
        open_checkpoint(path)


def test_damaged_graphs_are_refused(tmp_path):
    path = graphs.tokens(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        open_checkpoint(path)


def test_functions_that_double_without_end_take_no_time(tmp_path):
    """Thirty functions, each of which calls the next one twice."""
    proto = graphs.graph("images")
    for i in range(30):
        called = ("Relu", "") if i == 29 else (f"f{i + 1}", "bomb")
        nodes = [onnx.helper.make_node(called[0], [a], [b], domain=called[1]) for a, b in (("x", "y"), ("y", "z"))]
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("bomb", 1)]
        proto.functions.append(onnx.helper.make_function("bomb", f"f{i}", ["x"], ["z"], nodes, opsets))
    proto.opset_import.append(onnx.helper.make_opsetid("bomb", 1))
    proto.graph.node.append(onnx.helper.make_node("f0", ["logits"], ["boom"], domain="bomb"))
    onnx.save(proto, tmp_path / "bomb.onnx")
    with pytest.raises(CheckpointError, match="more than 1,000,000 nodes"):
        open_checkpoint(tmp_path / "bomb.onnx")


def test_inputs_that_do_not_fit_are_named(data):
    np.savez(data / "images.npz", pixels=np.random.default_rng(0).normal(size=(16, 5, 16, 16)).astype(np.float32))
    with pytest.raises(DataError, match=r"has shape .16, 5, 16, 16.; .* takes .B, 3, 16, 16."):
        compressed(graphs.images(data), recipe(data))


def test_names_that_modules_have_are_no_trouble(tmp_path):
    """Initialisers called as attributes of torch's modules are, twice over, and with parts of each other's names."""
    proto = graphs.graph("images")
    names = {
        "stem.weight": "layers.norm.weight", "wide.weight": "train.forward.weight", "fc.w": "layers", "bn.mean": "0.1",
        "depthwise.weight": "train", "wide.bias": "layers.norm", "bn.scale": "weight",
    }  # fmt: skip
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for initializer in proto.graph.initializer:
        initializer.name = names.get(initializer.name, initializer.name)
    onnx.save(proto, tmp_path / "names.onnx")
    feed = {"pixels": graphs.images_data(2)}
    (wanted,) = outputs(tmp_path / "names.onnx", feed)
    checkpoint = open_checkpoint(tmp_path / "names.onnx")
    checkpoint.check()
    network = Network(checkpoint)
    with network.loaded(network.names_in("")):
        found = network.call({"pixels": torch.from_numpy(feed["pixels"])})
    np.testing.assert_allclose(found["logits"].numpy(), wanted, atol=1e-5)


def test_a_batch_knows_weights_beside_the_graph(data, monkeypatch):
    """Other external data are another model, though the .onnx file is the same."""
    from compressor.batch.fingerprint import fingerprint
    from compressor.batch.manifest import jobs_of_line

    monkeypatch.chdir(data)
    graphs.external(data)
    recipe(data)
    (job,) = jobs_of_line(["model.onnx"], {"recipe": ["recipe.yaml"], "data": "tokens.npz"}, [])
    before = fingerprint(job)
    assert fingerprint(job) == before
    content = bytearray((data / "model.data").read_bytes())
    content[5] ^= 1
    (data / "model.data").write_bytes(content)
    assert fingerprint(job) != before


def test_widths_are_allocated_by_what_onnxruntime_computes(data):
    steps = recipe(data, "{pass: rounding, bits: 4, group: 32, steps: 2}")
    whole = compressed(graphs.images(data), steps).report["size"]["bytes"]
    report = compressed(graphs.images(data), steps, target_size=int(1.02 * whole)).report
    assert report["size"]["bytes"] <= 1.02 * whole
    assert report["allocation"]["tensors"]
