"""Arrays are tried on the network before any work: what it does not take is refused, in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import DataError
from compressor.core.options import RunOptions
from compressor.data.arrays import Arrays
from compressor.data.fit import fitted
from compressor.run.pipeline import run
from compressor.run.prepare import prepare
from tests import pico

RECIPE = "passes: [{pass: affine, method: rtn, bits: 4, group: 16}]\nevaluation: {samples: 8}\n"
IMAGES = np.random.default_rng(0).standard_normal((8, 3, 12, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "cnn.pt"
    pico.write_state_dict(pico.ResNet, path)
    return open_checkpoint(path, arch="tests.pico:ResNet")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return open_checkpoint(pico.llama(tmp_path_factory.mktemp("net") / "llama", n_layers=1))


def of(inputs: dict[str, np.ndarray], labels: np.ndarray | None = None) -> Arrays:
    return Arrays("data.npz", inputs, labels)


def test_what_the_network_takes_stays_as_it_is(resnet):
    source = of({"any name": IMAGES}, np.arange(8))
    (found,) = fitted(resnet, [source])
    assert found is not None
    np.testing.assert_array_equal(found.inputs["any name"], IMAGES)
    assert found.inputs["any name"].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4"])
def test_floats_of_another_width_are_cast(resnet, dtype):
    (found,) = fitted(resnet, [of({"input": IMAGES.astype(dtype)})])
    assert found is not None
    assert found.inputs["input"].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.int16, np.int32, ">i4"])
def test_small_integers_are_cast(llama, dtype):
    (found,) = fitted(llama, [of({"input_ids": np.ones((4, 8), dtype)})])
    assert found is not None
    assert found.inputs["input_ids"].dtype in (np.int32, np.int64)


NAN = np.where(np.arange(8).reshape(-1, 1, 1, 1) == 5, np.nan, IMAGES)
WRONG = {
    "shape": ({"input": IMAGES[:, :2]}, None, "cannot be run on the first example; found 'input' .8, 2, 12, 12. of"),
    "dimensions": ({"input": IMAGES[:, 0, 0, 0]}, None, "cannot be run on the first example"),
    "names": ({"input": IMAGES, "more": IMAGES}, None, "holds input, more, and lacks x; .* takes"),
    "integers": ({"input": (9 * IMAGES).astype(np.int32)}, None, "cannot be run on the first example"),
    "texts": ({"input": np.array(["a"] * 8)}, None, "array 'input' is of type <U1; networks take numbers"),
    "complex": ({"input": IMAGES + 1j}, None, "array 'input' is of type complex64; networks take numbers"),
    "not finite": ({"input": NAN}, None, "array 'input' holds NaN or infinite values, first in row 5"),
    "classes": ({"input": IMAGES}, np.arange(8) * 3, "labels go from 0 to 21; the network has 10 classes"),
    "negative classes": ({"input": IMAGES}, -np.arange(8), "labels go from -7 to 0; the network has 10 classes"),
    "one-hot": ({"input": IMAGES}, np.eye(10)[:8], "labels have shape .8, 10.; the outputs of shape .1, 10. of one"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arrays_that_do_not_fit_are_refused(resnet, kind):
    inputs, labels, message = WRONG[kind]
    with pytest.raises(DataError, match=message):
        fitted(resnet, [of(inputs, labels)])


@pytest.mark.parametrize(("token", "found"), [(10**6, "1000000"), (-1, "-1")])
def test_indices_beyond_a_table_are_refused_in_any_row(llama, token, found):
    ids = np.ones((6, 8), np.int64)
    ids[4, 3] = token
    with pytest.raises(DataError, match=rf"array 'input_ids' holds {found} in row 4, and the network's table has rows"):
        fitted(llama, [of({"input_ids": ids})])


@pytest.mark.parametrize("kind", ["shape", "names", "not finite", "classes"])
def test_a_dry_run_and_a_run_refuse_data_in_the_same_words(tmp_path, resnet, kind):
    inputs, labels, message = WRONG[kind]
    np.savez(tmp_path / "data.npz", **inputs, **({} if labels is None else {"labels": labels}))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = RunOptions(
        model=str(resnet.path), arch="tests.pico:ResNet", recipe=str(tmp_path / "recipe.yaml"),
        data=str(tmp_path / "data.npz"), output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(DataError, match=message) as planned:
        prepare(options)
    with pytest.raises(DataError) as ran:
        run(options)
    assert str(planned.value) == str(ran.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "recipe.yaml"]


def test_data_whose_parts_are_alike_do_where_nothing_is_evaluated(tmp_path, resnet):
    np.savez(tmp_path / "data.npz", input=np.repeat(IMAGES[:1], 8, 0))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = RunOptions(
        model=str(resnet.path), arch="tests.pico:ResNet", recipe=str(tmp_path / "recipe.yaml"),
        data=str(tmp_path / "data.npz"), output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(DataError, match="overlaps the calibration data .*--set evaluation.tokens=0"):
        prepare(options)
    prepare(replace(options, sets=("evaluation.tokens=0",)))


def test_two_inputs_go_by_their_names(tmp_path):
    config = json.loads((pico.bert(tmp_path / "bert") / "config.json").read_text())
    bert = open_checkpoint(tmp_path / "bert")
    ids = np.ones((4, 8), np.int64)
    (found,) = fitted(bert, [of({"input_ids": ids, "attention_mask": np.ones_like(ids)})])
    assert found is not None
    assert sorted(found.inputs) == ["attention_mask", "input_ids"]
    with pytest.raises(DataError, match=f"table has rows 0 to {config['vocab_size'] - 1}"):
        fitted(bert, [of({"input_ids": ids + config["vocab_size"]})])


class OfLength(nn.Embedding):
    """Positions as BART's and Whisper's decoders have them: given the ids, for how many there are."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1], device=ids.device))


class ByIndex(OfLength):
    def forward(self, ids):
        return self.weight[: ids.shape[1]]


class ByHand(OfLength):
    def forward(self, ids):
        return functional.embedding(ids.cumsum(1) * 0, self.weight)


class Words(nn.Module):
    positions: type[nn.Embedding] = OfLength

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(90, 16), self.positions(12, 16), nn.Linear(16, 5)

    def forward(self, ids):
        return self.head(functional.embedding(ids, self.words.weight) + self.places(ids))


class IndexedWords(Words):
    positions = ByIndex


class CountedWords(Words):
    positions = ByHand


@pytest.mark.parametrize("kind", [Words, IndexedWords, CountedWords])
def test_a_table_that_is_given_ids_for_their_number_holds_none_of_them(tmp_path, kind):
    pico.write_state_dict(kind, tmp_path / "words.pt")
    words = open_checkpoint(tmp_path / "words.pt", arch=f"tests.data.test_fit:{kind.__name__}")
    ids = np.arange(40).reshape(4, 10)
    assert fitted(words, [of({"ids": ids})])[0] is not None
    with pytest.raises(DataError, match="holds 99 in row 3, and the network's table has rows 0 to 89"):
        fitted(words, [of({"ids": ids + 60})])
