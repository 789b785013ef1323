"""A directory of images, one folder per class, as torchvision's ImageFolder reads it. Needs Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compressor.core.errors import DataError
from compressor.data.arrays import Arrays

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def is_image_folder(path: Path) -> bool:
    """Whether there are images in a directory or in the folders directly below."""
    return any(file.suffix.lower() in SUFFIXES for pattern in ("*", "*/*") for file in path.glob(pattern))


def load_images(path: Path, size: int = 224) -> Arrays:
    """Images as float32 (n, 3, size, size): short side to 8/7 of size, centre crop, ImageNet's mean and deviation.

    Labels are the places of the class folders in sorted order; there are none where images lie in `path` itself.

    Raises:
        DataError: Pillow is absent, or a file is no image.
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
    pixels = np.stack([_pixels(file, size) for file, _ in files])
    labels = np.array([label for _, label in files], dtype=np.int64) if classes else None
    return Arrays(str(path), {"input": pixels}, labels)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _pixels(file: Path, size: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image = image.convert("RGB")
            scale = size * 8 / 7 / min(image.size)
            wide, high = (max(size, round(side * scale)) for side in image.size)
            left, top = (wide - size) // 2, (high - size) // 2
            image = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
            values = np.asarray(image, dtype=np.float32) / 255
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: is not a whole image; {error}; remove it or fetch it again") from error
    return ((values - MEAN) / STD).transpose(2, 0, 1)
