"""Named arrays from files and callables."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from compressor.core.errors import DataError
from compressor.data.arrays import Arrays, load_arrays
from compressor.data.disjoint import check_disjoint

PIXELS = np.arange(24, dtype=np.float32).reshape(6, 4)
LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_files_hold_inputs_by_name_and_labels(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    arrays = {"pixels": PIXELS, "labels": LABELS}
    save_file(arrays, path) if suffix == "safetensors" else np.savez(path, **arrays)
    found = load_arrays(path)
    assert list(found.inputs) == ["pixels"] and len(found) == 6
    np.testing.assert_array_equal(found.inputs["pixels"], PIXELS)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert [len(batch["pixels"]) for batch in found.batches(4)] == [4, 2]


def test_npy_is_one_input_without_labels(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    found = load_arrays(tmp_path / "a.npy")
    assert found.labels is None and len(found) == 6


CALLABLES = """
import numpy, torch
def pairs():
    for i in range(3):
        yield torch.full((2, 4), float(i)), torch.tensor([i, i])
def mappings():
    return [{"a": numpy.zeros((2, 3)), "b": numpy.ones((2, 1))}] * 2
def endless():
    while True:
        yield numpy.zeros((1, 2))
def nothing():
    return []
def words():
    return ["text"]
def ragged():
    return [numpy.zeros((1, 2)), numpy.zeros((1, 3))]
value = 3
"""


@pytest.fixture
def reference(tmp_path, monkeypatch):
    (tmp_path / "batches_for_test.py").write_text(CALLABLES)
    monkeypatch.syspath_prepend(tmp_path)
    return "batches_for_test:{}".format


def test_callables_yield_pairs_mappings_or_arrays(reference):
    pairs = load_arrays(reference("pairs"))
    assert pairs.inputs["input"].shape == (6, 4) and pairs.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert {name: array.shape for name, array in load_arrays(reference("mappings")).inputs.items()} == {
        "a": (4, 3), "b": (4, 1),
    }  # fmt: skip
    assert len(load_arrays(reference("endless"))) == 1024


WRONG = [
    ("nothing", "yielded no batches"),
    ("words", "batch 0: is a str; expected an array"),
    ("ragged", "batches do not fit together"),
    ("pears", "'pears' is not there. Did you mean 'pairs'"),
    ("value", "name a function or a class"),
]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_callables_that_give_no_arrays_are_refused(reference, name, message):
    with pytest.raises(DataError, match=message):
        load_arrays(reference(name))


def test_files_that_are_absent_damaged_or_pickled_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_arrays(tmp_path / "a.npz")
    for suffix in ("npz", "npy", "safetensors"):
        (tmp_path / f"a.{suffix}").write_bytes(b"damaged")
        with pytest.raises(DataError, match=f"cannot be read as {suffix}"):
            load_arrays(tmp_path / f"a.{suffix}")
    np.save(tmp_path / "o.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match="no objects"):
        load_arrays(tmp_path / "o.npy")
    with pytest.raises(DataError, match="no module named 'no_such_module'"):
        load_arrays("no_such_module:batches")
    with pytest.raises(DataError, match="arrays differ in length"):
        Arrays("a", {"x": PIXELS}, LABELS[:3])


def test_a_split_parts_examples_and_keeps_labels_with_them():
    data = Arrays("a", {"x": PIXELS}, LABELS)
    first, second = data.split(1 / 3, seed=1)
    assert (len(first), len(second)) == (4, 2)
    rows = np.concatenate([first.inputs["x"], second.inputs["x"]])
    labels = np.concatenate([first.labels, second.labels])
    assert sorted(zip(rows[:, 0], labels, strict=True)) == sorted(zip(PIXELS[:, 0], LABELS, strict=True))
    assert check_disjoint(first, second) == 0


def test_identical_rows_are_an_overlap():
    data = Arrays("a", {"x": PIXELS})
    other = Arrays("b", {"x": np.concatenate([PIXELS[:1] + 100, PIXELS[3:5]])})
    with pytest.raises(
        DataError, match=r"b: overlaps the calibration data a; 66\.7% of it is in both, for example row 1"
    ):
        check_disjoint(data, other)
