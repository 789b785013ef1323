"""Files as trainers and quantisers write them: wrapped, averaged, with scales beside weights, with more in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError
from tests import pico

State = dict[str, Tensor]


class Net(nn.Module):
    """Two layers below each other, blocks, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 24))
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(24), nn.Linear(24, 6)

    def forward(self, x):
        x = self.body(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(self.norm(x))


ARCH = f"{__name__}:Net"
X = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> Net:
    return pico.lively(Net(), seed)  # type: ignore[return-value]


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(part: str, state: State) -> State:
    """The names with a wrapper's around `body`."""
    return {name.replace("body.", f"body.{part}."): tensor for name, tensor in state.items()}


def assert_is(path: Path, wanted: nn.Module) -> Any:
    """The file is this network; returns the checkpoint."""
    checkpoint = open_checkpoint(path, arch=ARCH)
    checkpoint.check()
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.build("cpu").float()(X), wanted(X), rtol=1e-5, atol=1e-5)
    return checkpoint


STATE = network().state_dict()
OTHER = network(5).state_dict()


@pytest.mark.parametrize(
    "content",
    [
        {"model_state": STATE, "optimizer": {"state": {}}, "epoch": 3},
        {"model_state_dict": under("_orig_mod.", STATE)},
        {"state_dict": under("module._orig_mod.", STATE)},
        {"state_dict": under("model.", STATE), "pytorch-lightning_version": "2"},
        {"state_dict": under("net.", STATE) | {"criterion.weight": torch.ones(6)}},
        {"my_own_key": STATE, "optimizer_state": {"exp_avg": torch.ones(3)}},
        {"wrapped": {"model_weights": under("module.", STATE)}},
        inside("module", STATE),
        inside("_orig_mod", STATE),
        inside("_fsdp_wrapped_module", STATE),
        under("module.", STATE) | {"n_averaged": torch.tensor(7)},
        under("learner.network.module.", STATE),
    ],
    ids=lambda content: next(iter(content)),
)
def test_usual_wrappings_are_taken_off(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pt")
    assert_is(tmp_path / "net.pt", network())


def test_wrappings_are_taken_off_in_safetensors_too(tmp_path: Path) -> None:
    save_file(under("module.model.", STATE), tmp_path / "net.safetensors")
    assert_is(tmp_path / "net.safetensors", network())


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"state_dict": STATE, "ema_state_dict": OTHER}, "ema_state_dict"),
        ({"model": STATE, "model_ema": OTHER}, "model_ema"),
        ({"params": STATE, "params_ema": OTHER}, "params_ema"),
        ({"student": STATE, "teacher": OTHER}, "teacher"),
        ({"state_dict": under("model.", STATE) | under("ema_model.", OTHER)}, "ema_model."),
        ({"state_dict": under("swa.net.", OTHER) | under("net.", STATE)}, "swa.net."),
    ],
)
def test_an_average_beside_the_weights_is_named_and_not_taken(
    content: dict[str, Any], name: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "net.pt")
    checkpoint = assert_is(tmp_path / "net.pt", network())
    assert any(f"'{name}" in note and "average" in note for note in checkpoint.notes)


@pytest.mark.parametrize("key", ["params_ema", "ema", "ema_model", "averaged"])
def test_an_average_that_is_all_there_is_is_taken(key: str, tmp_path: Path) -> None:
    torch.save({key: STATE, "optimizer": {}}, tmp_path / "net.pt")
    assert not assert_is(tmp_path / "net.pt", network()).notes


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"body.0.lora_A.weight": torch.ones(4, 20), "body.0.lora_B.weight": torch.ones(24, 4)}, "not merged"),
        ({"body.0.lora_down.weight": torch.ones(4, 20)}, "adapters"),
        ({"head.hada_w1_a": torch.ones(4, 20)}, "adapters"),
        ({f"blocks.{i}.{part}": torch.ones(24, 24) for i in (2, 3) for part in ("weight", "bias")}, "more blocks"),
        ({"blocks.7.bias": torch.ones(24)}, "more blocks than"),
        ({"other.weight": torch.ones(300, 24)}, "much that .* does not take"),
    ],
)
def test_a_file_that_is_of_another_network_is_refused(more: State, reason: str, tmp_path: Path) -> None:
    torch.save(STATE | more, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "net.pt", arch=ARCH).check()


@pytest.mark.parametrize(
    "more", [{"aux.weight": torch.ones(3, 24)}, {"mean": torch.ones(3), "loss.scale": torch.ones(1)}]
)
def test_a_few_tensors_that_are_not_used_are_listed(more: State, tmp_path: Path) -> None:
    torch.save(STATE | more, tmp_path / "net.pt")
    checkpoint = assert_is(tmp_path / "net.pt", network())
    assert checkpoint.skipped == list(more)
    assert checkpoint.notes == [
        f"{len(more)} tensors of the file are not used: " + ", ".join(f"'{name}'" for name in more)
    ]


def coded(weight: Tensor, dtype: torch.dtype, axes: int | tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits, and the scale over `axes`: None is a number for all."""
    largest = 127 if dtype == torch.int8 else float(torch.finfo(dtype).max)
    scale = (weight.abs().max() if axes is None else weight.abs().amax(axes, keepdim=True)) / largest
    codes = weight / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def in_blocks(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    rows, columns = (-(-n // size) for n in weight.shape)
    scale = torch.zeros(rows, columns)
    codes = torch.zeros_like(weight)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scale[i, j] = weight[part].abs().max() / 448
            codes[part] = weight[part] / scale[i, j]
    return codes.to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("form", ["fp8 row", "fp8 tensor", "fp8 vector", "fp8 block", "e5m2", "int8 row", "int8 zero"])
def test_weights_of_8_bits_are_read_with_their_scales(form: str, tmp_path: Path) -> None:
    stored, wanted = dict(STATE), copy.deepcopy(network())
    for name in ("body.0.weight", "body.2.weight", "blocks.1.weight"):
        weight, ending, zero = STATE[name], "_scale", None
        if form == "fp8 block":
            codes, scale = in_blocks(weight, 16)
            ending = "_scale_inv"
        elif form.startswith("int8"):
            zero = torch.randint(-9, 9, (24, 1), dtype=torch.int8) if form.endswith("zero") else None
            codes, scale = coded(weight, torch.int8, 1)
        else:
            dtype = torch.float8_e5m2 if form == "e5m2" else torch.float8_e4m3fn
            codes, scale = coded(weight, dtype, None if form == "fp8 tensor" else 1)
            scale = scale.flatten() if form == "fp8 vector" else scale
        stored[name], stored[name + ending] = codes, scale
        spread = scale
        if form == "fp8 block":
            spread = scale.repeat_interleave(16, 0)[:24].repeat_interleave(16, 1)[:, : weight.shape[1]]
        elif form == "fp8 vector":
            spread = scale[:, None]
        values = codes.float()
        if zero is not None:
            stored[name + "_zero_point"] = zero
            values = values - zero
        wanted.get_parameter(name).data = values * spread
    stored["body.0.input_scale"] = torch.ones(1)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "net.safetensors")
    checkpoint = assert_is(tmp_path / "net.safetensors", wanted)
    assert set(checkpoint.tensors) == set(STATE) - {"norm.num_batches_tracked"} | (
        {"norm.num_batches_tracked"} & set(checkpoint.tensors)
    )
    assert not checkpoint.skipped and not checkpoint.notes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {"head.weight": s["head.weight"].char()}, "stored as whole numbers"),
        (lambda s: {"head.weight": s["head.weight"].char(), "head.weight_absmax": torch.ones(3)}, "already quantised"),
        (lambda s: {"head.weight": s["head.weight"].byte(), "head.weight_scale": torch.ones(6)}, "already quantised"),
        (lambda s: {"head.weight": s["head.weight"].char(), "head.weight_scale": torch.ones(7)}, "already quantised"),
        (lambda s: {"head.qweight": torch.ones(3, 3, dtype=torch.int32)}, "already quantised"),
        (lambda s: {"body.0.weight": s["body.0.weight"].char(), "body.0.SCB": torch.ones(24)}, "already quantised"),
    ],
)
def test_codes_whose_meaning_is_not_known_are_refused(change: Any, reason: str, tmp_path: Path) -> None:
    torch.save({**STATE, **change(STATE)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "net.pt", arch=ARCH).check()


def test_a_known_language_model_in_fp8_is_read_with_its_scales(tmp_path: Path) -> None:
    folder = pico.llama(tmp_path / "llama")
    plain = load_file(folder / "model.safetensors")
    stored: State = {}
    for name, tensor in plain.items():
        stored[name] = tensor
        if "proj" in name:
            stored[name], stored[f"{name}_scale"] = coded(tensor, torch.float8_e4m3fn, 1)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    checkpoint = open_checkpoint(folder)
    checkpoint.check()
    assert checkpoint.tensors.keys() == plain.keys() and not checkpoint.skipped
    for name, tensor in plain.items():
        assert float((checkpoint.read(name).float() - tensor).norm() / tensor.norm()) < 0.05
