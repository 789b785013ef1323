"""Other people's ONNX graphs: layers used again, weights as codes, inputs without an axis of examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.checkpoints import open_checkpoint
from compressor.cli.commands import main
from compressor.core.errors import CheckpointError

RECIPE = """
passes: [{pass: affine, method: gptq, bits: 8, group: 16}]
calibration: {samples: 24}
export: {activations: exact}
evaluation: {samples: 8, speed: false}
"""


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) / shape[0] ** 0.5).astype(np.float32)


def saved(folder: Path, nodes: list, outputs: list[str], shape: list, initializers: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, folder / "net.onnx")
    np.savez(folder / "x.npz", x=np.random.default_rng(1).normal(size=(48, 72)).astype(np.float32))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "net.onnx"


def status(folder: Path, *more: str) -> object:
    named = [str(folder / "net.onnx"), "--recipe", str(folder / "recipe.yaml"), "--data", str(folder / "x.npz")]
    with pytest.raises(SystemExit) as ended:
        main([*named, "-o", str(folder / "out"), *more])
    return ended.value.code or 0


def test_a_weight_may_be_used_again_on_what_it_has_made(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["once"]),
        node("MatMul", ["once", "w"], ["twice"]),
        node("MatMul", ["twice", "w"], ["thrice"]),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["once", "t"], ["back"]),
        node("Gemm", ["once", "w", "twice"], ["added"]),
        node("Gemm", ["x", "v", "b"], ["wide"], transB=1),
        node("MatMul", ["wide", "v"], ["tied"]),
        node("MatMul", ["tied", "w"], ["joined"]),
    ]
    outputs = ["twice", "thrice", "back", "added", "tied", "joined"]
    made = {"w": weights(72, 72), "v": weights(80, 72, seed=2), "b": weights(80, seed=3)}
    path = saved(tmp_path, nodes, outputs, ["n", 72], made)
    assert status(tmp_path) == 0
    x = np.load(tmp_path / "x.npz")["x"][:7]
    wanted = onnxruntime.InferenceSession(str(path)).run(outputs, {"x": x})
    found = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")).run(outputs, {"x": x})
    for one, other in zip(wanted, found, strict=True):
        assert np.abs(one - other).max() < 0.03 * np.abs(one).max()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("constant", [False, True])
def test_weights_that_are_codes_and_cast_are_refused_as_quantised(dtype: type, constant: bool, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 100, (72, 80)).astype(dtype)
    node = helper.make_node
    first = [node("Constant", [], ["q"], value=numpy_helper.from_array(codes, "q"))] if constant else []
    nodes = [
        *first,
        node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "s"], ["w"]),
        node("MatMul", ["x", "w"], ["h"]),
        node("MatMul", ["h", "v"], ["y"]),
    ]
    made = {"s": weights(1, 80), "v": weights(80, 80)} | ({} if constant else {"q": codes})
    path = saved(tmp_path, nodes, ["y"], ["n", 72], made)
    with pytest.raises(CheckpointError, match="already quantised; found 1 weights of u?int8"):
        open_checkpoint(path)


def test_a_small_table_of_whole_numbers_is_no_quantised_weight(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Cast", ["few"], ["f"], to=TensorProto.FLOAT),
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "f"], ["y"]),
    ]
    made = {"few": np.ones((1, 60), np.int8), "w": weights(72, 60)}
    assert open_checkpoint(saved(tmp_path, nodes, ["y"], ["n", 72], made)).tensors


@pytest.mark.parametrize(
    ("shape", "reason"), [([71], "has shape (48, 72); "), (["n", 4, 72], "has 2 axes"), ([], "has 2 axes")]
)
def test_inputs_that_are_not_an_example_a_row_are_refused_before_work(
    shape: list, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"w": weights(72, 80)}
    saved(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], ["y"], shape, made)
    assert status(tmp_path, "--dry-run") == 3
    assert status(tmp_path) == 3
    assert reason in capsys.readouterr().err


def test_one_number_for_all_examples_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], ["y"], ["n", 72], {"w": weights(72, 80)})
    np.savez(tmp_path / "x.npz", x=weights(9, 72), rate=np.array(16000))
    assert status(tmp_path) == 3
    assert "'rate' is one number" in capsys.readouterr().err


def recurrent_graph(folder: Path, kind: str, **more: int) -> Path:
    """One step of a recurrent node: x (1, 1, 72), a state that it gives back, and a rate that it compares."""
    gates, directions = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 2 if more.get("both") else 1
    made = {
        "w": weights(directions, gates * 64, 72), "r": weights(directions, gates * 64, 64, seed=2),
        "v": weights(directions * 64, 80, seed=3), "known": np.array(16000), "flat": np.array([-1, directions * 64]),
    }  # fmt: skip
    node = helper.make_node
    way = {"direction": "bidirectional"} if more.get("both") else {}
    nodes = [
        node("Equal", ["rate", "known"], ["right"]),
        node("Cast", ["right"], ["one"], to=TensorProto.FLOAT),
        node("Mul", ["x", "one"], ["x1"]),
        node(kind, ["x1", "w", "r", "", "", "h"], ["", "hn"], hidden_size=64, **way),
        node("Reshape", ["hn", "flat"], ["rows"]),
        node("MatMul", ["rows", "v"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g",
        [info("x", TensorProto.FLOAT, [1, 1, 72]), info("h", TensorProto.FLOAT, [directions, 1, 64]),
         info("rate", TensorProto.INT64, [])],
        [info("y", TensorProto.FLOAT, None), info("hn", TensorProto.FLOAT, [directions, 1, 64])],
        [numpy_helper.from_array(array, name) for name, array in made.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, folder / "net.onnx")
    np.savez(folder / "x.npz", x=np.random.default_rng(1).normal(size=(48, 1, 1, 72)).astype(np.float32))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "net.onnx"


@pytest.mark.parametrize(("kind", "both"), [("LSTM", 0), ("GRU", 1), ("RNN", 0)])
def test_a_recurrent_graph_of_one_step_needs_no_state_and_its_gates_are_stored(
    kind: str, both: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = recurrent_graph(tmp_path, kind, both=both)
    assert status(tmp_path) == 0
    assert "h = 0.0 everywhere, rate = 16000 for every example" in caplog.text
    artifact = tmp_path / "out" / "model.onnx"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.4 * path.stat().st_size
    generator = np.random.default_rng(5)
    given = {
        "x": generator.normal(size=(1, 1, 72)).astype(np.float32), "rate": np.array(16000),
        "h": generator.normal(size=(1 + both, 1, 64)).astype(np.float32),
    }  # fmt: skip
    wanted = onnxruntime.InferenceSession(str(path)).run(None, given)
    found = onnxruntime.InferenceSession(str(artifact)).run(None, given)
    for one, other in zip(wanted, found, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() < 0.05 * np.abs(one).max()


def test_a_state_and_a_number_may_be_given_for_each_example(tmp_path: Path) -> None:
    recurrent_graph(tmp_path, "GRU")
    arrays = dict(np.load(tmp_path / "x.npz"))
    states = np.random.default_rng(2).normal(size=(48, 1, 1, 64)).astype(np.float32)
    np.savez(tmp_path / "x.npz", **arrays, h=states, rate=np.full(48, 16000))
    assert status(tmp_path) == 0


def test_a_graph_without_an_axis_of_examples_is_run_an_example_at_a_time(tmp_path: Path) -> None:
    path = saved(
        tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], ["y"], [72], {"w": weights(72, 80)}
    )  # fmt: skip
    assert status(tmp_path) == 0
    x = np.load(tmp_path / "x.npz")["x"][3]
    wanted, found = (
        onnxruntime.InferenceSession(str(each)).run(None, {"x": x})[0]
        for each in (path, tmp_path / "out" / "model.onnx")
    )
    assert found.shape == (80,)
    assert np.abs(wanted - found).max() < 0.03 * np.abs(wanted).max()
