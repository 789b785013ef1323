"""Any module, traced without its weights, computes in onnxruntime what it computes with the decoded ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from compressor.checkpoints import open_checkpoint
from compressor.core.encoding import Dense, Encoding, Sparse
from compressor.core.errors import CheckpointError, ExportError
from compressor.export.module import encoder_example
from tests.export.networks import (
    ALBERT,
    BERT,
    ENCODERS,
    GPT2,
    Tied,
    compressed,
    first_output,
    opened,
    pico,
    tokens,
    traced_and_written,
)


def near(session: onnxruntime.InferenceSession, expected: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    assert found.shape == tuple(expected.shape)
    assert np.abs(found - expected.numpy()).max() < 1e-4 * max(1.0, float(expected.abs().max()))


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


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
    session = opened(traced_and_written(module, example, encoded, tmp_path, mode, exact=True, like="bert"))
    assert [entry.name for entry in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
    assert [entry.shape for entry in session.get_inputs()] == 3 * [["batch_size", "sequence_length"]]
    for batch, length in SIZES:
        inputs = tokens(batch, length, token_type_ids=1)
        near(session, first_output(module, inputs), inputs)


def test_layers_that_are_called_again_share_their_operands(tmp_path):
    module = pico("albert", ALBERT)
    encoded = compressed(module, tmp_path)
    example = encoder_example(ALBERT | {"model_type": "albert"})
    path = traced_and_written(module, example, encoded, tmp_path, exact=True)
    graph = onnx.load(path, load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert (len(products), len({node.input[1] for node in products})) == (3 * 6 + 3, 6 + 3)
    external = [entry for entry in graph.initializer if entry.external_data]
    places = Counter(tuple(pair.value for pair in entry.external_data) for entry in external)
    shared = {name for name, n in places.items() if n > 1}
    twice = [entry.name for entry in external if tuple(pair.value for pair in entry.external_data) in shared]
    # The table, which is the head's too: rows to gather are two-dimensional, the product's operand is not.
    assert [name.partition("@")[0] for name in twice] == 2 * ["albert.embeddings.word_embeddings.weight.codes"]
    session = opened(path)
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    for batch, length in SIZES:
        inputs = tokens(batch, length, token_type_ids=0)
        near(session, first_output(module, inputs), inputs)


@pytest.mark.parametrize("mode", ["default", "standard"])
def test_linears_stored_as_inputs_by_outputs(tmp_path, mode):
    module = pico("gpt2", GPT2)
    encoded = compressed(module, tmp_path)
    path = traced_and_written(module, tokens(1, 1), encoded, tmp_path, mode, exact=True, like="gpt2")
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
    example = {"image": torch.zeros(1, 3, 15, 15)}
    path = traced_and_written(module, example, encoded, tmp_path, mode, exact=True, like="cnn")
    session = opened(path)
    assert [entry.name for entry in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape == ["batch_size", 3, 15, 15]
    for batch in (1, 2, 5):
        image = torch.randn(batch, 3, 15, 15, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            near(session, module(image), {"image": image})


def test_a_tied_table_is_stored_once_and_serves_every_use(tmp_path):
    torch.manual_seed(0)
    module = Tied().eval()
    tensors = compressed(module, tmp_path)
    assert tensors.tied == {"head.weight": "table.weight"}
    example = {"ids": torch.zeros(2, 4, dtype=torch.int64), "gain": torch.ones(2)}
    path = traced_and_written(module, example, tensors, tmp_path, exact=True)
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
    path = traced_and_written(module, example, encoded, tmp_path)
    assert path.stat().st_size < 60_000 < 768 * 192 * 4
    written = path.read_bytes()
    traced_and_written(open_checkpoint(tmp_path / "source").build(), example, encoded, tmp_path)
    assert path.read_bytes() == written
    with pytest.raises(ExportError, match=r"'embeddings\.position_ids' has no values and no stored tensor"):
        traced_and_written(module.to("meta"), example, encoded, tmp_path)


def test_a_module_is_left_as_it_was(tmp_path):
    module = cnn().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    encoded = compressed(cnn(), tmp_path)
    traced_and_written(module, {"": torch.zeros(1, 3, 15, 15)}, encoded, tmp_path)
    assert module.training
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def sparse(weight: torch.Tensor) -> Encoding:
    return Sparse(tuple(weight.shape), Dense(tuple(weight.shape), weight.relu()))


def test_what_cannot_be_exported_is_named(tmp_path):
    module = cnn()
    image = {"": torch.zeros(1, 3, 15, 15)}
    with pytest.raises(ExportError, match=r"0\.weight: sparse tensors do not run faster"):
        traced_and_written(module, image, compressed(module, tmp_path, sparse), tmp_path)
    with pytest.raises(ExportError, match=r"'0\.weight' has no values and no stored tensor"):
        traced_and_written(module, image, compressed(nn.Linear(4, 4), tmp_path), tmp_path)

    with pytest.raises(ExportError, match="there is no example of the network's inputs"):
        traced_and_written(module, {}, compressed(module, tmp_path), tmp_path)

    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(CheckpointError, match="torch.onnx cannot trace Branching"):
        traced_and_written(Branching(4, 4), {"": torch.zeros(2, 4)}, compressed(nn.Linear(4, 4), tmp_path), tmp_path)
