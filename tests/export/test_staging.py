"""Folding in stages: the same numbers to the bit and the same kernels, nothing left unfolded, no gates without need."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from compressor.core.encoding import Encoding, Layout, describe
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.export import pairs, staging
from compressor.export.builder import GraphBuilder
from compressor.export.check import slow_paths
from compressor.export.decoder import export_decoder
from compressor.export.lowering import IR_VERSIONS, OPSETS, Lowering, refusal
from compressor.export.shares import Folding, folding_of
from compressor.export.staging import sizes_of, staged, units_of
from compressor.runtime.sessions import Settings
from tests.export import test_decoder, test_lowering

LAYERS = 6
X = np.random.default_rng(0).standard_normal((2, 3, 512)).astype(np.float32)


@pytest.fixture(autouse=True)
def low_bar(monkeypatch):
    """What is small has stages too."""
    monkeypatch.setattr(staging, "WORTH_IT", 1)
    monkeypatch.setattr(pairs, "_WORTH_IT", 1)


def layers_of(directory: Path, encoding: Encoding, mode: str = "default", n: int = LAYERS) -> ir.Model:
    """Some layers on one input, which all have the same encoding."""
    tensor = EncodedTensor(encoding, Layout(encoding.shape))
    names = [f"w{i}" for i in range(n)]
    write_tensors(directory / "model.safetensors", dict.fromkeys(names, tensor))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "n", encoding.shape[1]]))
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": OPSETS[mode], "com.microsoft": 1})
    lowering = Lowering(EncodedTensors([directory / "model.safetensors"]), GraphBuilder(graph), mode, True, directory)
    for name in names:
        y = lowering.matmul(x, name)
        y.type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(y)
    lowering.close()
    return ir.Model(graph, ir_version=IR_VERSIONS[mode])


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def opened(model: ir.Model, directory: Path, stem: str) -> tuple[onnxruntime.InferenceSession, Counter[str]]:
    """The session of a model over `directory`'s weights, and the operators that it really runs."""
    ir.save(model, directory / f"{stem}.onnx")
    session = Settings(1, optimised=str(directory / f"{stem}.run.onnx")).open(str(directory / f"{stem}.onnx"))
    return session, operators(ir.load(directory / f"{stem}.run.onnx"))


def as_without(model: ir.Model, directory: Path, feed: dict[str, np.ndarray]) -> Folding:
    """Gives the model stages; raises where it then computes anything else, or by anything else, than before."""
    before, run_before = opened(model, directory, "model")
    folding = staged(model, "default")
    after, run_after = opened(model, directory, "model.staged")
    assert run_after == run_before
    for found, expected in zip(after.run(None, feed), before.run(None, feed), strict=True):
        np.testing.assert_array_equal(found, expected)
    return folding


@pytest.mark.parametrize("mode", ["default", "compat"])
@pytest.mark.parametrize("name", test_lowering.ENCODINGS)
def test_every_encoding_computes_the_same_to_the_bit_and_by_the_same_kernels(tmp_path, name, mode):
    encoding = test_lowering.ENCODINGS[name]
    if refusal(describe(encoding), "matmul", mode):
        pytest.skip("refused in the plan")
    model = layers_of(tmp_path, encoding, mode)
    looks_up = "Gather" in operators(model)
    as_without(model, tmp_path, {"x": X[:, :, : encoding.shape[1]]})
    assert "If" in operators(model) or not looks_up


@pytest.mark.parametrize("encoder", ["affine2half", "affine3", "vectors", "vectors9", "binary"])
def test_a_decoder_whose_table_is_its_head_computes_the_same_to_the_bit(tmp_path, encoder, monkeypatch):
    network = test_decoder.pico(test_decoder.NETWORKS["llama"])
    test_decoder.exported(network, encoder, tmp_path, "default")
    tensors, found = EncodedTensors([tmp_path / "model.safetensors"]), []
    for worth_it in (1 << 62, 1):
        monkeypatch.setattr(staging, "WORTH_IT", worth_it)
        path = export_decoder(network.config.to_dict(), tensors, tmp_path, "default")
        assert ("If" in operators(ir.load(path))) == (worth_it == 1)
        assert slow_paths(path) == []
        found.append(test_decoder.run(Settings(1).open(str(path)), test_decoder.IDS))
    (logits, cache), (expected, expected_cache) = found
    np.testing.assert_array_equal(logits, expected)
    for name in cache:
        np.testing.assert_array_equal(cache[name], expected_cache[name])


@pytest.mark.parametrize("name", ["float32", "float16", "affine2g64", "affine4g32", "affine8g64"])
def test_a_graph_without_look_ups_gets_no_gates(tmp_path, name):
    model = layers_of(tmp_path, test_lowering.ENCODINGS[name])
    folding = as_without(model, tmp_path, {"x": X[:, :, : test_lowering.ENCODINGS[name].shape[1]]})
    assert len(folding.made) == 1
    assert not {"If", "Mod"} & set(operators(model))


def test_what_is_made_alike_is_made_by_the_same_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "STAGES", 2)
    model = layers_of(tmp_path, test_lowering.ENCODINGS["codebook10x4"], n=24)
    before = model.graph.num_nodes()
    as_without(model, tmp_path, {"x": X[:, :, :160]})
    assert model.graph.num_nodes() < before / 2


def test_what_is_small_gets_no_gates(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "WORTH_IT", 1 << 30)
    model = layers_of(tmp_path, test_lowering.ENCODINGS["codebook10x4"])
    before = operators(model)
    folding = staged(model, "default")
    assert operators(model) == before
    assert len(folding.made) == 1


def test_mode_standard_gets_none(tmp_path):
    model = layers_of(tmp_path, test_lowering.ENCODINGS["codebook10x4"], "standard")
    before = operators(model)
    staged(model, "standard")
    assert operators(model) == before


def test_stages_are_few_and_what_is_there_at_once_is_much_less(tmp_path):
    model = layers_of(tmp_path, test_lowering.ENCODINGS["codebook10x4"], n=24)
    at_once = folding_of(units_of(model.graph, sizes_of(model)))
    found = staged(model, "default")
    assert 4 <= len(found.made) <= staging.STAGES
    assert found.peak < 0.5 * at_once.peak
    assert found.kept == at_once.kept
    assert max(found.made) < at_once.made[0] / 3


@pytest.mark.parametrize(("width", "dim", "books"), [(3, 1, 1), (7, 2, 1), (10, 4, 1), (9, 4, 3), (12, 4, 2)])
def test_a_table_larger_than_a_stage_is_cut_by_rows(tmp_path, width, dim, books):
    rows = 1000
    generator = torch.Generator().manual_seed(0)
    small = test_lowering.codebook(width, dim, books=books)
    codes = torch.randint(0, 2**width, (rows, small.codes.shape[1]), generator=generator, dtype=torch.int32)
    scales = test_lowering.Scales.of(torch.randn(rows, small.scales.decode().shape[1], generator=generator))
    counts = tuple(rows // books + (i < rows % books) for i in range(books))
    large = test_lowering.replace(small, shape=(rows, small.shape[1]), codes=codes, scales=scales, counts=counts)
    model = layers_of(tmp_path, large, n=1)
    at_once = folding_of(units_of(model.graph, sizes_of(model)))
    before = operators(model)
    found = as_without(model, tmp_path, {"x": X[:, :, : large.shape[1]]})
    assert operators(model)["Concat"] > before["Concat"]
    assert found.peak < 0.8 * at_once.peak


def test_a_graph_whose_gates_never_open_by_folding_computes_the_same(tmp_path):
    """Optimisations are off: gates and look-ups run at every run."""
    model = layers_of(tmp_path, test_lowering.ENCODINGS["codebook10x4"])
    ir.save(model, tmp_path / "model.onnx")
    feed = {"x": X[:, :, :160]}
    expected = Settings(1).open(str(tmp_path / "model.onnx")).run(None, feed)
    staged(model, "default")
    ir.save(model, tmp_path / "staged.onnx")
    found = Settings(1, as_it_is=True).open(str(tmp_path / "staged.onnx")).run(None, feed)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_decoders_graph_is_the_same_each_time(tmp_path):
    network = test_decoder.pico(test_decoder.NETWORKS["llama"])
    test_decoder.exported(network, "vectors9", tmp_path, "default")
    first = (tmp_path / "model.onnx").read_bytes()
    export_decoder(
        network.config.to_dict(), EncodedTensors([tmp_path / "model.safetensors"]), tmp_path, "default", True
    )
    assert (tmp_path / "model.onnx").read_bytes() == first
