"""Any module, traced without its weights, computes in onnxruntime what it computes with the decoded ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.core.encoding import Affine, Codebook, Dense, Encoding, Scales, Sparse
from compressor.core.errors import CheckpointError, ExportError
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.evaluate.reference import original_outputs
from compressor.export.loading import decoded_checkpoint
from compressor.export.module import encoder_example, export_module
from compressor.graph.blocks import layers, layout_of

BERT = {
    "vocab_size": 83, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 80,
    "max_position_embeddings": 40, "architectures": ["BertModel"],
}  # fmt: skip
ALBERT = BERT | {"embedding_size": 32, "num_hidden_layers": 3, "architectures": ["AlbertForMaskedLM"]}
GPT2 = {
    "vocab_size": 83, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 40, "architectures": ["GPT2LMHeadModel"],
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def rounded(weight: torch.Tensor, bits: int = 4, group: int = 16) -> Affine:
    grouped = nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    zero = 2.0 ** (bits - 1)
    scales = Scales.of(grouped.abs().amax(-1).clamp_min(1e-4) / zero)
    codes = (grouped / scales.decode().unsqueeze(-1) + zero).round().clamp(0, 2**bits - 1).int().flatten(1)
    return Affine(tuple(weight.shape), bits, group, codes, scales, zero)


def vectors(weight: torch.Tensor) -> Codebook:
    """Codes drawn at random: the graph must not care."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    groups = -(-columns // 32)
    codes = torch.randint(0, 256, (rows, groups * 8), generator=generator, dtype=torch.int32)
    table = torch.randint(-8, 8, (1, 256, 4), generator=generator).to(torch.int8)
    scales = Scales.of(torch.full((rows, groups), float(weight.std()) / 4.6))
    return Codebook((rows, columns), 8, 4, 32, codes, table, scales, (rows,), torch.randperm(rows, generator=generator))


ENCODERS = {
    "dense": lambda weight: Dense(tuple(weight.shape), weight.half()),
    "affine2": lambda weight: rounded(weight, 2, 32),
    "affine4": rounded,
    "vectors": vectors,
}


def compressed(module: nn.Module, directory: Path, encode=rounded) -> tuple[EncodedTensors, dict]:
    """The module's tensors, its layers encoded, in a file; the module itself then holds the decoded ones."""
    found, tensors, ties, first = layers(module), {}, {}, {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        ties |= {name: canonical} if canonical != name else {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        layout = layout_of(found[name]) if name in found else None
        if layout is not None:
            tensors[name] = EncodedTensor(encode(layout.matrix(tensor.data)), layout)
            tensor.data = tensors[name].decode()
        elif name not in ties:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensors[name] = EncodedTensor.dense(tensor.data, dtype)
    offsets = write_tensors(directory / "model.safetensors", tensors, ties)
    return EncodedTensors([directory / "model.safetensors"]), offsets


def opened(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path, options)


def near(session: onnxruntime.InferenceSession, expected: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    assert found.shape == tuple(expected.shape)
    assert np.abs(found - expected.numpy()).max() < 1e-4 * max(1.0, float(expected.abs().max()))


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def pico(kind: str, settings: dict) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind].from_dict(settings)
    module = getattr(transformers, settings["architectures"][0])(config).eval()
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module


def tokens(batch: int, length: int, **more: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 83, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    extra = {name: torch.full_like(ids, value) for name, value in more.items()}
    return {"input_ids": ids, "attention_mask": mask, **extra}


def first_output(module: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(module(**inputs).values()))


SIZES = ((2, 16), (1, 1), (3, 7), (7, 40))


PAIRS = [(encoder, "default") for encoder in ENCODERS] + [
    ("vectors", "compat"),
    ("affine2", "standard"),
    ("dense", "standard"),
]


@pytest.mark.parametrize(("encoder", "mode"), PAIRS)
def test_an_encoder_runs_at_any_batch_and_length(tmp_path, encoder, mode):
    module = pico("bert", BERT)
    encoded = compressed(module, tmp_path, ENCODERS[encoder])
    example = encoder_example(BERT | {"model_type": "bert"})
    session = opened(export_module(module, example, *encoded, tmp_path, mode, exact=True))
    assert [entry.name for entry in session.get_outputs()] == ["last_hidden_state"]
    assert [entry.shape for entry in session.get_inputs()] == 3 * [["batch", "sequence"]]
    for batch, length in SIZES:
        inputs = tokens(batch, length, token_type_ids=1)
        near(session, first_output(module, inputs), inputs)


def test_layers_that_are_called_again_share_their_operands(tmp_path):
    module = pico("albert", ALBERT)
    encoded = compressed(module, tmp_path)
    example = encoder_example(ALBERT | {"model_type": "albert"})
    path = export_module(module, example, *encoded, tmp_path, exact=True)
    graph = onnx.load(path, load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert (len(products), len({node.input[1] for node in products})) == (3 * 6 + 3, 6 + 3)
    external = [entry for entry in graph.initializer if entry.external_data]
    places = Counter(tuple(pair.value for pair in entry.external_data) for entry in external)
    assert set(places.values()) == {1}
    session = opened(path)
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    for batch, length in SIZES:
        inputs = tokens(batch, length, token_type_ids=0)
        near(session, first_output(module, inputs), inputs)


@pytest.mark.parametrize("mode", ["default", "standard"])
def test_linears_stored_as_inputs_by_outputs(tmp_path, mode):
    module = pico("gpt2", GPT2)
    encoded = compressed(module, tmp_path)
    path = export_module(module, tokens(1, 1), *encoded, tmp_path, mode, exact=True)
    if mode == "default":
        assert operators(path)["MatMulNBits"] == 2 * 4 + 1
    session = opened(path)
    for batch, length in SIZES:
        inputs = tokens(batch, length)
        near(session, first_output(module, inputs), inputs)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, stride=2, groups=16), nn.Conv2d(16, 24, 3, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2.0)
    return network.eval()


@pytest.mark.parametrize(("encoder", "mode"), PAIRS)
def test_convolutions_get_constants_that_fold(tmp_path, encoder, mode):
    module = cnn()
    encoded = compressed(module, tmp_path, ENCODERS[encoder])
    path = export_module(module, {"image": torch.zeros(1, 3, 15, 15)}, *encoded, tmp_path, mode, exact=True)
    session = opened(path)
    assert [entry.name for entry in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape == ["batch", 3, 15, 15]
    for batch in (1, 2, 5):
        image = torch.randn(batch, 3, 15, 15, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            near(session, module(image), {"image": image})


class Tied(nn.Module):
    """A table that is embedding, head, and factor of something that no exporter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.head = nn.Linear(32, 50)
        self.head.weight = self.table.weight
        self.mix = nn.Parameter(torch.randn(32, 32) / 6)
        self.register_buffer("shift", torch.arange(50))

    def forward(self, ids: torch.Tensor, gain: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.table((ids + self.shift[3]) % 50) @ self.mix * gain.unsqueeze(-1).unsqueeze(-1)
        return {"scores": self.head(hidden), "norm": (self.table.weight * self.table.weight).sum(1) + hidden.mean()}


def test_a_tied_table_is_stored_once_and_serves_every_use(tmp_path):
    torch.manual_seed(0)
    module = Tied().eval()
    tensors, offsets = compressed(module, tmp_path)
    assert tensors.tied == {"head.weight": "table.weight"}
    example = {"ids": torch.zeros(2, 4, dtype=torch.int64), "gain": torch.ones(2)}
    path = export_module(module, example, tensors, offsets, tmp_path, exact=True)
    assert operators(path)["MatMulNBits"] == operators(path)["GatherBlockQuantized"] == 1
    session = opened(path)
    assert [entry.name for entry in session.get_outputs()] == ["scores", "norm"]
    for batch, length in ((1, 1), (3, 9)):
        inputs = {"ids": torch.randint(0, 50, (batch, length)), "gain": torch.rand(batch)}
        near(session, first_output(module, inputs), inputs)


def test_the_graph_holds_no_weights_and_the_module_needs_none(tmp_path):
    module = pico("bert", BERT | {"hidden_size": 192, "intermediate_size": 768})
    module.save_pretrained(tmp_path / "source")
    encoded = compressed(module, tmp_path)
    example = encoder_example(BERT | {"model_type": "bert"})
    path = export_module(module, example, *encoded, tmp_path)
    assert path.stat().st_size < 60_000 < 768 * 192 * 4
    written = path.read_bytes()
    export_module(open_checkpoint(tmp_path / "source").build(), example, *encoded, tmp_path)
    assert path.read_bytes() == written
    with pytest.raises(ExportError, match=r"'embeddings\.position_ids' has no values and no stored tensor"):
        export_module(module.to("meta"), example, *encoded, tmp_path)


def test_a_module_is_left_as_it_was(tmp_path):
    module = cnn().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    encoded = compressed(cnn(), tmp_path)
    export_module(module, {"": torch.zeros(1, 3, 15, 15)}, *encoded, tmp_path)
    assert module.training
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def sparse(weight: torch.Tensor) -> Encoding:
    mask = weight > 0
    return Sparse(tuple(weight.shape), mask, Dense((1, int(mask.sum())), weight[mask][None]))


def test_what_cannot_be_exported_is_named(tmp_path):
    module = cnn()
    image = {"": torch.zeros(1, 3, 15, 15)}
    with pytest.raises(ExportError, match=r"0\.weight: sparse tensors do not run faster"):
        export_module(module, image, *compressed(module, tmp_path, sparse), tmp_path)
    with pytest.raises(ExportError, match=r"'0\.weight' has no values and no stored tensor"):
        export_module(module, image, *compressed(nn.Linear(4, 4), tmp_path), tmp_path)

    with pytest.raises(ExportError, match="there is no example of the network's inputs"):
        export_module(module, {}, *compressed(module, tmp_path), tmp_path)

    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ExportError, match="torch.onnx cannot trace Branching"):
        export_module(Branching(4, 4), {"": torch.zeros(2, 4)}, *compressed(nn.Linear(4, 4), tmp_path), tmp_path)


@pytest.fixture
def artifact(tmp_path):
    """(directory, the module with decoded weights) of a pico BERT."""
    module = pico("bert", BERT)
    compressed(module, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(module.config.to_dict()))
    (tmp_path / "compression.json").write_text(json.dumps({"source": {"arch": None}}))
    return tmp_path, module


def test_an_artifact_loads_as_a_module_again(artifact):
    directory, module = artifact
    loaded = compressor.load(directory)
    assert not loaded.training
    inputs = tokens(2, 9)
    torch.testing.assert_close(first_output(loaded, inputs), first_output(module, inputs), rtol=0, atol=0)


def test_an_artifact_of_a_custom_network_loads_by_its_reference(tmp_path):
    torch.manual_seed(0)
    module = Tied().eval()
    compressed(module, tmp_path)
    note = tmp_path / "compression.json"
    note.write_text(json.dumps({"source": {"arch": f"{__name__}:Tied"}}))
    loaded = compressor.load(tmp_path)
    assert loaded.head.weight is loaded.table.weight
    assert loaded.shift.dtype == torch.int64
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    note.write_text(json.dumps({"source": {}}))
    with pytest.raises(CheckpointError, match="its architecture is unknown"):
        compressor.load(tmp_path)
    assert compressor.load(tmp_path, arch=f"{__name__}:Tied").mix.shape == (32, 32)


def test_what_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no artifact, it has no compression\.json"):
        compressor.load(tmp_path)
    (tmp_path / "compression.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        compressor.load(tmp_path)


def test_a_decoded_checkpoint_runs_block_by_block(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    module = pico("gpt2", GPT2)
    module.save_pretrained(source)
    target.mkdir()
    tensors, _ = compressed(module, target)
    decoded = decoded_checkpoint(open_checkpoint(source), tensors)
    decoded.check()
    assert decoded.family == "decoder"
    assert decoded.tied == {"lm_head.weight": "transformer.wte.weight"}
    windows = tokens(2, 11)["input_ids"]
    (found,) = original_outputs(decoded, [{"input_ids": windows.numpy()}])
    np.testing.assert_allclose(found, first_output(module, {"input_ids": windows}).numpy(), rtol=1e-5, atol=1e-5)


def test_mixtures_of_experts_are_refused_by_name(tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=53, num_local_experts=3,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"experts that transformers fuses are not supported yet; found 'model\."):
        open_checkpoint(tmp_path).check()


def test_the_digits_network_has_the_names_of_its_weights(tmp_path):
    from scripts.networks import digit_cnn

    state = digit_cnn().state_dict()
    assert state["fc_layers.0.weight"].shape == (256, 1152)
    save_file(state, tmp_path / "model.safetensors")
    open_checkpoint(tmp_path / "model.safetensors", arch="scripts.networks:digit_cnn").check()
