"""A directory of images, one folder per class, as torchvision's ImageFolder reads it. Needs Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import DataError
from compressor.core.reading import read_json, refuse_special
from compressor.core.resources import refuse_shortage
from compressor.data.arrays import Arrays
from compressor.plan.recipe import Images

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)

GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Of red, green and blue in grey, as Pillow has it."""
PREPROCESSOR = "preprocessor_config.json"
MOST_PIXELS = 8192
"""Of a side."""


def is_image_folder(path: Path) -> bool:
    """Whether there are images in a directory or in the folders directly below."""
    return any(file.suffix.lower() in SUFFIXES for pattern in ("*", "*/*") for file in path.glob(pattern))


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input.

    size       height and width
    edge       length of the short side before the middle is cropped; None squeezes the whole picture into `size`
    scale      what pixels of 0 to 255 are multiplied with, before `mean` is taken off and they are divided by `std`
    bicubic    instead of bilinear
    classes    names of folders in the order of the network's classes; None where nobody said
    """

    size: tuple[int, int] = (224, 224)
    edge: int | None = 256
    scale: float = 1 / 255
    mean: np.ndarray = field(default_factory=lambda: MEAN)
    std: np.ndarray = field(default_factory=lambda: STD)
    layout: str = "nchw"
    channels: str = "rgb"
    bicubic: bool = False
    classes: tuple[str, ...] | None = None


def preprocessing(settings: Images, path: Path, config: Mapping[str, Any]) -> Preprocessing:
    """As the recipe says; what it leaves open as preprocessor_config.json beside the model says, else as ImageNet's.

    Raises:
        DataError: The file cannot be read, or sizes, means or deviations are of another form.
    """
    beside = (path if path.is_dir() else path.parent) / PREPROCESSOR
    there = read_json(beside) if beside.is_file() else {}
    cropped = there.get("do_center_crop", "crop_size" in there)
    size = _first(settings.size, there.get("crop_size") if cropped else None, there.get("size"), 224)
    height, width = _sides(size, beside)
    edge = settings.shortest_edge
    if edge is None and settings.size is None and there:
        short = there.get("size") if cropped else None
        edge = min(_sides(short, beside)) if short is not None else 0
    edge = round(min(height, width) * 8 / 7) if edge is None else edge
    n = 1 if settings.channels == "grey" else 3
    plain = there.get("do_normalize", True) is False
    mean, std = (0.0, 1.0) if plain else (there.get("image_mean"), there.get("image_std"))
    scale = 1 / 255 if there.get("do_rescale", True) else 1.0
    return Preprocessing(
        (height, width), edge or None, _first(settings.rescale_factor, there.get("rescale_factor"), scale),
        _channels(_first(settings.image_mean, mean, MEAN.tolist()), n, "image_mean"),
        _channels(_first(settings.image_std, std, STD.tolist()), n, "image_std"),
        settings.layout, settings.channels, there.get("resample") == 3, _names(settings, config),
    )  # fmt: skip


def _first(*given: Any) -> Any:
    return next(each for each in given if each is not None)


def _sides(size: Any, path: Path) -> tuple[int, int]:
    """Height and width of 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(size, Mapping):
        size = [size["height"], size["width"]] if {"height", "width"} <= set(size) else size.get("shortest_edge")
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= MOST_PIXELS for side in sides):
        raise DataError(f"{path.name}: has a size of {size!r}; give a side, or height and width, in images.size")
    return sides[0], sides[1]


def _channels(values: Any, n: int, name: str) -> np.ndarray:
    given = values if isinstance(values, list) else [values] * n
    if n == 1 and len(given) == 3:
        given = [sum(given) / 3]
    if len(given) != n or not all(isinstance(value, int | float) for value in given):
        raise DataError(f"images.{name}: has {values!r} for {n} channels; give a number, or one for each channel")
    return np.array(given, dtype=np.float32)


def _names(settings: Images, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes that the recipe names, or the config where it has names of its own for them."""
    if settings.classes is not None:
        return tuple(settings.classes)
    known = config.get("id2label")
    if not isinstance(known, Mapping):
        return None
    names = [str(name) for _, name in sorted(known.items(), key=lambda entry: int(entry[0]))]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else tuple(names)


def load_images(path: Path, wanted: Preprocessing | None = None) -> Arrays:
    """Images as float32 (n, 3, height, width), or with channels last.

    Labels are the classes that folders are called by; see `plan.recipe.Images`. There are none where images lie in
    `path` itself. Grey pictures are grey in three channels; those of 16 bits a channel keep their range.

    Raises:
        DataError: Pillow is absent, a file is no image, one of over 89 million pixels, or a folder is no class.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{path}: reading images needs Pillow, which is absent; `pip install pillow`, or give an .npz of pixels"
        ) from error
    wanted = wanted or Preprocessing()
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and _images(folder))
    files = [(file, place) for place, folder in enumerate(folders or [path]) for file in _images(folder)]
    channels = len(wanted.mean)
    shape = (*wanted.size, channels) if wanted.layout == "nhwc" else (channels, *wanted.size)
    pixels = np.empty((len(files), *shape), dtype=np.float32)
    for place, (file, _) in zip(pixels, files, strict=True):
        place[...] = _pixels(file, wanted)
    if not folders:
        return Arrays(str(path), {"input": pixels})
    classes, guessed = _classes([folder.name for folder in folders], wanted, path)
    labels = np.array([classes[place] for _, place in files], dtype=np.int64)
    return Arrays(str(path), {"input": pixels}, labels, guessed)


def _classes(folders: list[str], wanted: Preprocessing, path: Path) -> tuple[list[int], bool]:
    """The class of each folder, and whether that is a guess."""
    if wanted.classes is not None:
        places = {name: at for at, name in enumerate(wanted.classes)}
        unknown = [name for name in folders if name not in places]
        if unknown:
            raise DataError(
                f"{path}: folder '{unknown[0]}' is none of the network's {len(places)} classes; found "
                f"{', '.join(folders[:4])}; expected names such as {', '.join(wanted.classes[:4])}; call folders so, "
                "or say in images.classes what the classes are"
            )
        return [places[name] for name in folders], False
    if all(name.isascii() and name.isdigit() for name in folders):
        return [int(name) for name in folders], False
    return list(range(len(folders))), True


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _pixels(file: Path, wanted: Preprocessing) -> np.ndarray:
    from PIL import Image

    refuse_special(file, DataError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                values = _in_colour(image, wanted)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: has too many pixels to be a photo; {error}; scale it down") from error
    except (OSError, ValueError, SyntaxError) as error:
        refuse_shortage(error)
        raise DataError(f"{file}: is not a whole image; {error}; remove it or fetch it again") from error
    if wanted.channels == "grey":
        values = values @ GREY[:, None]
    if wanted.channels == "bgr":
        values = values[..., ::-1]
    normal = (values * np.float32(255 * wanted.scale) - wanted.mean) / wanted.std
    return normal if wanted.layout == "nhwc" else normal.transpose(2, 0, 1)


def _in_colour(image: Image, wanted: Preprocessing) -> np.ndarray:
    """What is seen of a picture as float32 (height, width, 3) in 0 … 1."""
    from PIL.Image import Resampling

    (height, width), box = wanted.size, (0.0, 0.0, *map(float, image.size))
    if wanted.edge is not None:  # of the picture scaled to that edge the middle, or all that there is
        shrunk = min(image.size) / wanted.edge
        sides = [min(length, side * shrunk) for length, side in zip(image.size, (width, height), strict=True)]
        left, top = ((length - side) / 2 for length, side in zip(image.size, sides, strict=True))
        box = (left, top, left + sides[0], top + sides[1])
    method = Resampling.BICUBIC if wanted.bicubic else Resampling.BILINEAR
    if not image.mode.startswith(("I", "F")):
        return np.asarray(image.convert("RGB").resize((width, height), method, box=box), dtype=np.float32) / 255
    # Pillow's way from 16 bits or floats to colours cuts off whatever is above 255.
    grey = np.asarray(image.convert("F").resize((width, height), method, box=box), dtype=np.float32)
    return np.repeat(grey[:, :, None] / (1 if image.mode == "F" else 65535), 3, axis=2)
