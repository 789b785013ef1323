"""torch.save files: keys, prefixes, ties, hostile pickles, TorchScript, exported programs, known networks."""

from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.vision_networks import MobileNetV2, ResNet
from compressor.core.errors import CheckpointError


class Small(nn.Module):
    """A custom network with a batch norm, and a table that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class Untied(Small):
    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


ARCH = f"{__name__}:Small"


def test_a_bare_state_dict_loads_into_the_module_of_arch(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    checkpoint = open_checkpoint(tmp_path / "net.pt", arch=ARCH)
    assert checkpoint.kind == "state_dict"
    assert checkpoint.tied == {"head.weight": "embed.weight"}
    ids = torch.arange(11)
    torch.testing.assert_close(checkpoint.build("cpu")(ids), model(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"module": state}},
        lambda state: {
            "model_state_dict": {f"module.{k}": v for k, v in state.items()},
            "optimizer": {"lr": 0.1},
        },
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {"net": state, "ema": {k: v * 0 for k, v in state.items()}},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_usual_keys_and_wrappers_prefixes_are_removed(tmp_path, wrap, zipped):
    state = small().state_dict()
    torch.save(wrap(state), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path / "net.pth", arch=ARCH)
    checkpoint.check()
    for name, tensor in state.items():
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)


def test_equal_tensors_without_shared_storage_are_kept_apart(tmp_path):
    torch.save(Untied().state_dict(), tmp_path / "net.pt")
    checkpoint = open_checkpoint(tmp_path / "net.pt", arch=f"{__name__}:Untied")
    checkpoint.check()
    assert checkpoint.tied == {}
    assert {"embed.weight", "head.weight"} <= set(checkpoint.tensors)


def test_one_parameter_with_two_values_is_refused(tmp_path):
    state = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    state["head.weight"] += 1
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"'head.weight' and 'embed.weight' are one parameter of the module"):
        open_checkpoint(tmp_path / "net.pt", arch=ARCH).check()


def test_views_are_read_as_they_were_saved(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    torch.save({"transposed": base.t(), "row": base[2], "strided": base[:, ::2]}, tmp_path / "net.pt")
    checkpoint = open_checkpoint(tmp_path / "net.pt")
    torch.testing.assert_close(checkpoint.read("transposed"), base.t())
    torch.testing.assert_close(checkpoint.read("row"), base[2])
    torch.testing.assert_close(checkpoint.read("strided"), base[:, ::2])
    assert checkpoint.tied == {}


def test_reading_gives_memory_of_ones_own(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path / "net.pt")
    checkpoint.read("a").zero_()
    torch.testing.assert_close(checkpoint.read("a"), torch.ones(3))


class Hostile:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, zipped):
    target = tmp_path / "owned"
    torch.save({"a": torch.ones(2), "b": Hostile(target)}, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"found \w+.mkdir; nothing of it was run; .* --trust-pickle"):
        open_checkpoint(tmp_path / "net.pt", arch=ARCH)
    assert not target.exists()


def test_a_plain_hostile_pickle_is_not_executed(tmp_path):
    target = tmp_path / "owned"
    (tmp_path / "net.bin").write_bytes(pickle.dumps(Hostile(target)))
    with pytest.raises(CheckpointError, match=r"net.bin: "):
        open_checkpoint(tmp_path / "net.bin")
    assert not target.exists()


def test_a_pickled_module_needs_trust(tmp_path):
    model = small()
    torch.save(model, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"found \S*test_state_dict.Small; .* --trust-pickle"):
        open_checkpoint(tmp_path / "net.pt")
    checkpoint = open_checkpoint(tmp_path / "net.pt", trust_pickle=True)
    assert (checkpoint.kind, checkpoint.architecture) == ("pickle", "Small")
    ids = torch.arange(11)
    torch.testing.assert_close(checkpoint.build("cpu")(ids), model(ids), rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("names", [("head.weight",), ("norm.weight", "norm.bias"), ("embed.weight",)])
def test_tensors_that_were_saved_without_values_are_named(tmp_path, names, zipped):
    state = {name: value.to("meta") if name in names else value for name, value in Small().state_dict().items()}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"'{names[0]}' was saved from the meta device and has no values"):
        open_checkpoint(tmp_path / "m.pt", arch=ARCH)


def test_trust_also_reads_training_checkpoints(tmp_path):
    torch.save({"state_dict": small().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"found argparse.Namespace"):
        open_checkpoint(tmp_path / "net.pt", arch=ARCH)
    open_checkpoint(tmp_path / "net.pt", arch=ARCH, trust_pickle=True).check()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(tmp_path, zipped):
    path = tmp_path / "net.pt"
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"net.pt: .*truncated"):
        open_checkpoint(path, arch=ARCH)


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"holds no state dict; found a dict with keys 'epoch'"):
        open_checkpoint(tmp_path / "net.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_gives_its_weights_and_is_never_run(tmp_path):
    model = Untied().eval()
    torch.jit.trace(model, torch.arange(11)).save(tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"is a TorchScript archive, which is never run"):
        open_checkpoint(tmp_path / "net.pt")
    module = open_checkpoint(tmp_path / "net.pt", arch=f"{__name__}:Untied").build("cpu")
    torch.testing.assert_close(module(torch.arange(11)), model(torch.arange(11)), rtol=0, atol=0)


def test_an_exported_program_needs_trust(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.ones(2, 4),)), tmp_path / "net.pt2")
    with pytest.raises(CheckpointError, match=r"exported program, and reading it executes code .* --trust-pickle"):
        open_checkpoint(tmp_path / "net.pt2")
    checkpoint = open_checkpoint(tmp_path / "net.pt2", trust_pickle=True)
    assert checkpoint.kind == "pt2"
    assert set(checkpoint.tensors) == {"0.weight", "0.bias"}
    torch.testing.assert_close(checkpoint.read("0.weight"), model[0].weight.data)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=31,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def test_a_language_model_without_config_says_what_is_missing(tmp_path):
    torch.save(llama().state_dict(), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"head counts and rotary bases .* --arch DIR"):
        open_checkpoint(tmp_path / "net.pt").check()


@pytest.mark.parametrize("beside", [True, False])
def test_a_language_model_takes_its_config_from_beside_or_from_arch(tmp_path, beside):
    folder = tmp_path if beside else tmp_path / "config"
    folder.mkdir(exist_ok=True)
    llama().config.architectures = ["LlamaForCausalLM"]
    llama().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), tmp_path / "net.pt")
    checkpoint = open_checkpoint(tmp_path / "net.pt", arch=None if beside else str(folder))
    assert (checkpoint.kind, checkpoint.family) == ("huggingface", "decoder")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(checkpoint.build("cpu")(ids).logits, llama()(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("nowhere_at_all:build", "no module named 'nowhere_at_all'"),
        (f"{__name__}:Smal", "'Smal' is not there. Did you mean 'Small'?"),
        (f"{__name__}:ARCH", "is a str; name a function or a class"),
        (f"{__name__}:Hostile", "must be callable without arguments"),
        ("argparse:Namespace", "returned a Namespace; a torch.nn.Module was expected"),
        ("justaname", "is neither a folder nor module:callable"),
    ],
)
def test_a_wrong_arch_is_refused(tmp_path, arch, message):
    torch.save(small().state_dict(), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "net.pt", arch=arch).build()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: ResNet([2, 2, 2, 2], bottleneck=False, n_classes=7), "resnet18"),
        (lambda: ResNet([3, 4, 6, 3], bottleneck=True, channels=1, n_classes=5), "resnet50"),
        (
            lambda: MobileNetV2(
                3, 8, [(8 if i == 0 else 24, 4, 2 if i in (1, 3, 6, 13) else 1, i > 0) for i in range(17)], 32, 5
            ),
            "mobilenet_v2",
        ),
    ],
)
def test_known_image_networks_are_recognised_by_keys_and_shapes(tmp_path, model, name):
    torch.manual_seed(0)
    network = model().eval()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    checkpoint = open_checkpoint(tmp_path / "net.pth")
    assert checkpoint.architecture == name
    image = torch.randn(1, checkpoint.tensors[next(iter(checkpoint.tensors))].shape[1], 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.build("cpu")(image), network(image), rtol=0, atol=0)


def test_a_bare_safetensors_file_loads_into_the_module_of_arch(tmp_path):
    model = small()
    save_model(model, str(tmp_path / "net.safetensors"))
    checkpoint = open_checkpoint(tmp_path / "net.safetensors", arch=ARCH)
    ids = torch.arange(11)
    torch.testing.assert_close(checkpoint.build("cpu")(ids), model(ids), rtol=0, atol=0)
    assert checkpoint.kind == "safetensors"
    assert checkpoint.tied == {"head.weight": "embed.weight"}


def test_storage_shared_with_a_name_that_the_module_lacks_is_still_read(tmp_path):
    state = small().state_dict()
    torch.save({"average.embed.weight": state["embed.weight"], **state}, tmp_path / "net.pt")
    checkpoint = open_checkpoint(tmp_path / "net.pt", arch=ARCH)
    checkpoint.check()
    assert checkpoint.skipped == ["average.embed.weight"]
    torch.testing.assert_close(checkpoint.read("head.weight"), state["embed.weight"], rtol=0, atol=0)


def test_a_parameter_that_is_not_in_the_file_cannot_be_materialised(tmp_path):
    state = small().state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "net.pt")
    checkpoint = open_checkpoint(tmp_path / "net.pt", arch=ARCH)
    with pytest.raises(CheckpointError, match=r"has no tensor 'norm.weight'"):
        checkpoint.materialise(checkpoint.build(), ["norm.weight"])
