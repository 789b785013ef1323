"""A directory of images, one folder per class, as torchvision's ImageFolder reads it. Needs Pillow."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.core.errors import DataError
from compressor.core.reading import refuse_special
from compressor.core.resources import refuse_shortage
from compressor.data.arrays import Arrays

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def is_image_folder(path: Path) -> bool:
    """Whether there are images in a directory or in the folders directly below."""
    return any(file.suffix.lower() in SUFFIXES for pattern in ("*", "*/*") for file in path.glob(pattern))


def load_images(path: Path, size: int = 224) -> Arrays:
    """Images as float32 (n, 3, size, size): the middle 7/8 of the short side, ImageNet's mean and deviation.

    Labels are the places of the class folders in sorted order; there are none where images lie in `path` itself.
    Grey pictures are grey in three channels; those of 16 bits a channel keep their range.

    Raises:
        DataError: Pillow is absent, a file is no image, or one of over 89 million pixels.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{path}: reading images needs Pillow, which is absent; `pip install pillow`, or give an .npz of pixels"
        ) from error
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and _images(folder))
    folders = classes or [path]
    files = [(file, label) for label, folder in enumerate(folders) for file in _images(folder)]
    pixels = np.empty((len(files), 3, size, size), dtype=np.float32)
    for place, (file, _) in zip(pixels, files, strict=True):
        place[...] = _pixels(file, size)
    labels = np.array([label for _, label in files], dtype=np.int64) if classes else None
    return Arrays(str(path), {"input": pixels}, labels)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _pixels(file: Path, size: int) -> np.ndarray:
    from PIL import Image

    refuse_special(file, DataError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                values = _in_colour(image, size)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: has too many pixels to be a photo; {error}; scale it down") from error
    except (OSError, ValueError, SyntaxError) as error:
        refuse_shortage(error)
        raise DataError(f"{file}: is not a whole image; {error}; remove it or fetch it again") from error
    return ((values - MEAN) / STD).transpose(2, 0, 1)


def _in_colour(image: Image, size: int) -> np.ndarray:
    """The middle of a picture as float32 (size, size, 3) in 0 … 1."""
    from PIL.Image import Resampling

    side = min(image.size) * 7 / 8
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    if not image.mode.startswith(("I", "F")):
        scaled = image.convert("RGB").resize((size, size), Resampling.BILINEAR, box=box)
        return np.asarray(scaled, dtype=np.float32) / 255
    # Pillow's way from 16 bits or floats to colours cuts off whatever is above 255.
    grey = np.asarray(image.convert("F").resize((size, size), Resampling.BILINEAR, box=box), dtype=np.float32)
    return np.repeat(grey[:, :, None] / (1 if image.mode == "F" else 65535), 3, axis=2)
