"""Convolutions on int8 activations: onnxruntime fuses them, and computes what torch computes within rounding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compressor.core.encoding import Affine
from compressor.core.errors import ExportError
from compressor.export import rewriting
from compressor.export.check import slow_paths
from compressor.export.ranges import example_range
from compressor.export.static_int8 import enlarged, quantisation
from tests.export.networks import compressed, rounded, traced_and_written


class Pico(nn.Module):
    """An image's stem and a depthwise convolution on floats; on int8 the others, a sum, a pool, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.expand, self.expand_norm = nn.Conv2d(16, 40, 1, bias=False), nn.BatchNorm2d(40)
        self.depthwise, self.depthwise_norm = nn.Conv2d(40, 40, 3, padding=1, groups=40), nn.BatchNorm2d(40)
        self.project, self.second = nn.Conv2d(40, 16, 1), nn.Conv2d(16, 16, (3, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, groups=4)
        self.left, self.right = nn.Conv2d(24, 8, 1), nn.Conv2d(24, 12, 3, padding=1)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(nn.functional.relu6(self.stem_norm(self.stem(x))))
        x = nn.functional.hardtanh(self.expand_norm(self.expand(x)), -1, 2)
        x = self.project(torch.relu(self.depthwise_norm(self.depthwise(x))))
        x = nn.functional.max_pool2d(torch.relu(x + self.second(x)), 2)
        x = self.grouped(x)
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


def pico(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = Pico().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2.0)
            module.weight.data.uniform_(-1.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return network


def by_row(weight: Tensor) -> Affine:
    return rounded(weight, 8, weight.shape[1])


def images(n: int, seed: int, size: int = 20) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def exported(module: nn.Module, directory: Path, mode="default", encode=by_row) -> Path:
    encoded = compressed(module, directory, encode)
    calibration = [{"": images(8, 1)}, {"": images(8, 2)}]
    return traced_and_written(module, {"": images(1, 0)}, encoded, directory, mode, calibration=calibration)


def run(path: Path, image: Tensor) -> np.ndarray:
    """Without the saturating sums of pairs that processors without VNNI have, which depend on the machine."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options).run(None, {"input": image.numpy()})[0]


def fused(path: Path) -> Counter:
    """The operators that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path.with_suffix(".fused"))
    onnxruntime.InferenceSession(path, options)
    return Counter(node.op_type for node in onnx.load(path.with_suffix(".fused"), load_external_data=False).graph.node)


@pytest.fixture
def everything(monkeypatch):
    """All that can compute on int8 does, however slow: this network is too small for any of it to pay."""
    monkeypatch.setattr(rewriting, "regions", lambda operations, shapes, weights: list(operations))


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("mode", ["default", "standard", "compat"])
def test_int8_kernels_run_and_agree_with_torch(tmp_path, mode):
    module = pico()
    path = exported(module, tmp_path, mode, by_row if mode != "compat" else by_row_but_the_head)
    for batch in (1, 3):
        image = images(batch, 3)
        with torch.no_grad():
            expected = module(image).numpy()
        found = run(path, image)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 0.04 * np.abs(expected).max()
    operators = fused(path)
    assert operators["QLinearConv"] == 8
    assert (operators["QLinearAdd"], operators["QLinearConcat"]) == (1, 1)
    assert (operators["NhwcMaxPool"], operators["BatchNormalization"], operators["Relu"]) == (1, 0, 0)
    assert not slow_paths(path)


def by_row_but_the_head(weight: Tensor) -> Affine:
    return rounded(weight, 4, 16) if weight.shape == (10, 20) else by_row(weight)


def test_a_network_that_int8_would_slow_down_computes_on_floats(tmp_path):
    path = exported(pico(), tmp_path)
    operators = fused(path)
    assert (operators["QLinearConv"], operators["QuantizeLinear"]) == (0, 0)
    assert operators["BatchNormalization"] == 0
    assert all(node.op_type != "QuantizeLinear" for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.usefixtures("everything")
def test_the_graph_is_the_same_each_time_and_holds_no_weights(tmp_path):
    written = exported(pico(), tmp_path).read_bytes()
    assert exported(pico(), tmp_path).read_bytes() == written
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.safetensors"}
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    inside = {entry.name: list(entry.dims) for entry in graph.initializer if not entry.external_data}
    assert all(len(dims) <= 1 or dims == [256, 2] for dims in inside.values()), inside


def test_without_calibration_activations_stay_floats(tmp_path):
    module = pico()
    encoded = compressed(module, tmp_path, by_row)
    path = traced_and_written(module, {"": images(1, 0)}, encoded, tmp_path, exact=True)
    with torch.no_grad():
        expected = module(images(2, 3)).numpy()
    assert np.abs(run(path, images(2, 3)) - expected).max() < 1e-4 * np.abs(expected).max()
    assert fused(path)["QLinearConv"] == 0


@pytest.mark.usefixtures("everything")
def test_a_channel_that_its_norm_has_switched_off_keeps_its_bias(tmp_path):
    module = pico()
    assert isinstance(module.depthwise_norm, nn.BatchNorm2d)
    module.depthwise_norm.weight.data[:20] = 1e-14
    module.depthwise_norm.bias.data[:20] = 3.0
    path = exported(module, tmp_path)
    with torch.no_grad():
        expected = module(images(2, 3)).numpy()
    assert np.abs(run(path, images(2, 3)) - expected).max() < 0.04 * np.abs(expected).max()


def test_a_network_without_int8_weights_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no convolution is stored as int8"):
        exported(pico(), tmp_path, encode=lambda weight: rounded(weight, 4, 16))


@pytest.mark.parametrize(("low", "high", "scale", "zero"), [
    (0.0, 6.0, 6 / 255, 0), (-1.0, 3.0, 4 / 255, 64), (2.0, 5.1, 0.02, 0), (-5.1, -2.0, 0.02, 255), (0, 0, 1, 0),
])  # fmt: skip
def test_zero_is_exact_in_every_range(low, high, scale, zero):
    found = quantisation(low, high)
    assert found[0] == pytest.approx(scale)
    assert found[1] == zero


def test_ranges_leave_out_the_outliers_of_an_example():
    values = np.arange(20_000, dtype=np.float32)
    np.random.default_rng(0).shuffle(values)
    assert example_range(values) == (2.0, 19_997.0)
    assert example_range(np.array([[3.0, -1.0]], np.float32)) == (-1.0, 3.0)


def test_scales_are_enlarged_only_where_the_bias_needs_it():
    scale, bias = np.array([0.5, -1e-12, 1e-30, 0.0]), np.array([100.0, 4.0, 0.0, -8.0])
    found = enlarged(scale, bias)
    np.testing.assert_allclose(found, [0.5, -4 / 2**30, 1e-20, 8 / 2**30])
    assert (np.abs(bias / found) <= 2**30).all()


class Swishes(nn.Module):
    """Hard swishes by their name, by a hard sigmoid, and written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.first(x))
        x = self.second(x)
        x = x * nn.functional.hardsigmoid(x)
        x = self.third(x)
        x = x * nn.functional.relu6(x + 3) / 6
        return self.last(x)


@pytest.mark.usefixtures("everything")
def test_a_hard_swish_is_a_sum_that_saturates_and_a_product(tmp_path):
    torch.manual_seed(1)
    module = Swishes().eval()
    image = 3 * torch.randn(4, 8, 12, 12, generator=torch.Generator().manual_seed(4))
    encoded = compressed(module, tmp_path, by_row)
    path = traced_and_written(module, {"": image[:1]}, encoded, tmp_path, calibration=[{"": image}])
    operators = fused(path)
    assert (operators["QLinearConv"], operators["QLinearAdd"], operators["QLinearMul"]) == (4, 3, 3)
    assert operators["DequantizeLinear"] == 1, "of the output alone"
    with torch.no_grad():
        expected = module(image).numpy()
    assert np.linalg.norm(run(path, image) - expected) < 0.02 * np.linalg.norm(expected)


class Pooled(nn.Module):
    """A stem on floats, a pool, and wide convolutions, as residual networks begin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.first, self.second = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        return x + self.second(torch.relu(self.first(x)))


def test_onnxruntime_does_not_round_before_a_pool_on_floats(tmp_path):
    torch.manual_seed(2)
    module = Pooled().eval()
    image = images(4, 5, 48)
    encoded = compressed(module, tmp_path, by_row)
    path = traced_and_written(module, {"": image[:1]}, encoded, tmp_path, calibration=[{"": image}])
    assert fused(path)["QLinearConv"] == 2
    graph = onnx.load(path.with_suffix(".fused"), load_external_data=False).graph
    writers = {name: node for node in graph.node for name in node.output}
    (pool,) = [node for node in graph.node if "MaxPool" in node.op_type]
    assert writers[pool.input[0]].op_type not in ("QuantizeLinear", "Transpose")
    with torch.no_grad():
        expected = module(image).numpy()
    assert np.linalg.norm(run(path, image) - expected) < 0.02 * np.linalg.norm(expected)


class Delicate(nn.Module):
    """Convolutions that eight bits do no harm; a last pair between which one channel is a thousand times the others."""

    def __init__(self) -> None:
        super().__init__()
        self.robust = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(2))
        self.widened, self.narrowed = (nn.Conv2d(16, 16, 1, bias=False) for _ in range(2))
        for conv, factor in ((self.widened, 1000.0), (self.narrowed, 0.001)):
            weight = torch.eye(16)
            weight[0, 0] = factor
            conv.weight.data = weight[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.robust:
            x = torch.relu(conv(x))
        return self.narrowed(self.widened(x))


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(("delicate", "on_int8"), [(False, (4,)), (True, (1, 2))])
def test_a_part_by_which_the_outputs_stray_computes_on_floats_and_the_rest_on_int8(tmp_path, delicate, on_int8):
    torch.manual_seed(3)
    module = Delicate().eval()
    if not delicate:
        module.widened.weight.data[0, 0] = module.narrowed.weight.data[0, 0] = 1.0
    image = torch.randn(32, 16, 12, 12, generator=torch.Generator().manual_seed(5))
    encoded = compressed(module, tmp_path, by_row)
    path = traced_and_written(module, {"": image[:1]}, encoded, tmp_path, calibration=[{"": image}])
    with torch.no_grad():
        expected = module(image).numpy()
    assert np.linalg.norm(run(path, image) - expected) < 0.03 * np.linalg.norm(expected)
    assert fused(path)["QLinearConv"] in on_int8
