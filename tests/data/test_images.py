"""Folders of pictures and tables of texts, written by the libraries that people write them with."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from PIL import Image

from compressor.core.errors import DataError
from compressor.data import load
from compressor.data.images import MEAN, STD, Preprocessing, load_images, preprocessing
from compressor.data.text import load_text
from compressor.plan.recipe import Images


def shown(pixels: np.ndarray) -> np.ndarray:
    """Pixels (3, h, w) back in 0 … 1."""
    return pixels * STD[:, None, None] + MEAN[:, None, None]


def square(size: int) -> Preprocessing:
    return Preprocessing((size, size), round(size * 8 / 7))


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says how many pixels it has."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_class_folders_are_labels_in_sorted_order(tmp_path):
    for name, colour in (("zebra", (255, 0, 0)), ("ant", (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30), colour).save(tmp_path / name / "1.png")
    images = load_images(tmp_path, square(16))
    assert images.labels is not None and images.labels.tolist() == [0, 1] and images.guessed
    np.testing.assert_allclose(shown(images.inputs["input"][0])[:, 3, 3], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(shown(images.inputs["input"][1])[:, 3, 3], [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    "mode, values, name",
    [
        ("L", np.uint8([[51]]), "grey.png"),
        ("LA", np.uint8([[[51, 255]]]), "grey.png"),
        ("P", np.uint8([[51]]), "grey.gif.png"),
        ("I;16", np.uint16([[0.2 * 65535]]), "deep.png"),
        ("I;16", np.uint16([[0.2 * 65535]]), "deep.tiff"),
        ("F", np.float32([[0.2]]), "float.tif"),
    ],
)
def test_grey_and_deep_pictures_keep_their_range(tmp_path, mode, values, name):
    image = Image.fromarray(np.tile(values, (32, 32) + (1,) * (values.ndim - 2)))
    if mode == "P":
        image = image.convert("P")
    image.save(tmp_path / name)
    np.testing.assert_allclose(shown(load_images(tmp_path, square(8)).inputs["input"][0]), 0.2, atol=2e-3)


def test_the_middle_of_a_wide_picture_is_seen(tmp_path):
    pixels = np.zeros((16, 160, 3), dtype=np.uint8)
    pixels[:, 72:88] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    np.testing.assert_allclose(shown(load_images(tmp_path, square(8)).inputs["input"][0]), 1, atol=1e-6)


@pytest.mark.parametrize("wide, high", [(1, 60_000), (60_000, 1)])
def test_a_thin_picture_takes_no_more_memory_than_a_square_one(tmp_path, wide, high):
    Image.new("RGB", (wide, high), (255, 255, 255)).save(tmp_path / "thin.png")
    np.testing.assert_allclose(shown(load_images(tmp_path, square(8)).inputs["input"][0]), 1, atol=1e-6)


@pytest.mark.parametrize(
    "content, message",
    [
        (claims(60_000, 60_000), "has too many pixels to be a photo"),
        (claims(10_000, 10_000), "has too many pixels to be a photo"),
        (claims(2**31 - 1, 1), "is not a whole image|pixels"),
        (claims(0, 5), "is not a whole image"),
        (b"", "is not a whole image"),
        (claims(40, 40)[:-14], "is not a whole image"),
    ],
)
def test_what_is_no_picture_is_refused_before_it_is_unpacked(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_tables_of_texts_are_read_row_by_row(tmp_path):
    table = pyarrow.table({"text": ["One sentence.", "Another one."]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("t.parquet", "file.arrow", "stream.arrow"):
        assert load_text(tmp_path / name).documents == ("One sentence.", "Another one.")


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_a_damaged_table_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1 and then nothing that anybody could read")
    with pytest.raises(DataError, match="is not a whole"):
        load_text(tmp_path / name)


def folders(path, *names):
    for name in names:
        (path / name).mkdir()
        Image.new("RGB", (8, 8)).save(path / name / "1.png")
    return path


def test_folders_are_the_classes_that_the_network_calls_so(tmp_path):
    config = {"id2label": {"0": "zebra", "1": "cat", "10": "ant"}}
    wanted = preprocessing(Images(size=4), tmp_path / "model.pt", config)
    images = load_images(folders(tmp_path, "ant", "zebra"), wanted)
    assert images.labels is not None and images.labels.tolist() == [2, 0] and not images.guessed
    said = preprocessing(Images(size=4, classes=["zebra", "ant"]), tmp_path / "model.pt", config)
    images = load_images(tmp_path, said)
    assert images.labels is not None and images.labels.tolist() == [1, 0]
    folders(tmp_path, "dog")
    with pytest.raises(DataError, match="folder 'dog' is none of the network's 2 classes"):
        load_images(tmp_path, said)


def test_folders_that_are_numbers_are_the_classes_of_these_numbers(tmp_path):
    images = load_images(folders(tmp_path, "9", "10"), square(4))
    assert images.labels is not None and images.labels.tolist() == [10, 9] and not images.guessed


def test_names_that_transformers_makes_up_are_no_classes(tmp_path):
    config = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}
    assert preprocessing(Images(), tmp_path / "model.pt", config).classes is None


@pytest.mark.parametrize(("content", "size", "edge", "scale", "mean"), [
    ({"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "size": {"height": 96, "width": 64}}, (96, 64), None,
     1 / 255, 0.5),
    ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}, (224, 224),
     256, 1 / 255, 0.485),
    ({"size": 32, "do_normalize": False, "do_rescale": False}, (32, 32), None, 1.0, 0.0),
    ({"size": 40, "crop_size": 32, "rescale_factor": 0.5}, (32, 32), 40, 0.5, 0.485),
])  # fmt: skip
def test_what_preprocessor_config_says_is_done(tmp_path, content, size, edge, scale, mean):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = preprocessing(Images(), tmp_path / "model.safetensors", {})
    assert (found.size, found.edge, found.scale) == (size, edge, pytest.approx(scale))
    assert found.mean[0] == pytest.approx(mean)
    assert preprocessing(Images(), tmp_path, {}).size == size
    said = preprocessing(Images(size=48, image_mean=0.1), tmp_path, {})
    assert (said.size, said.edge, said.mean.tolist()) == ((48, 48), 55, pytest.approx([0.1] * 3))


@pytest.mark.parametrize(("settings", "message"), [
    ({"size": [1, 2, 3]}, r"has a size of \[1, 2, 3\]"),
    ({"image_mean": [0.5, 0.5]}, "images.image_mean: has .* 3 channels"),
])  # fmt: skip
def test_sizes_and_means_of_another_form_are_refused(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        preprocessing(Images(**settings), tmp_path, {})


def test_layouts_and_channels_are_as_said(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def loaded(**settings):
        asked = Images(size=[4, 8], image_mean=0.0, image_std=1.0, shortest_edge=0, **settings)
        return load_images(tmp_path, preprocessing(asked, tmp_path, {})).inputs["input"][0]

    np.testing.assert_allclose(loaded()[:, 0, 0], [1, 0, 0.2], atol=1e-6)
    assert loaded().shape == (3, 4, 8)
    np.testing.assert_allclose(loaded(layout="nhwc", channels="bgr")[0, 0], [0.2, 0, 1], atol=1e-6)
    np.testing.assert_allclose(loaded(channels="grey")[:, 0, 0], [0.299 + 0.2 * 0.114], atol=1e-6)
    np.testing.assert_allclose(loaded(rescale_factor=1.0)[:, 0, 0], [255, 0, 51], atol=1e-4)
    assert loaded()[0, 0, 7] == 0, "squeezed, not cropped"
