"""Calibration and evaluation data: one file per kind, and a check that the two are disjoint.

`load` finds the kind of a source. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.errors import DataError
from compressor.core.reading import refuse_special

if TYPE_CHECKING:
    from compressor.data.arrays import Arrays
    from compressor.data.images import Preprocessing
    from compressor.data.text import Text

ARRAY_SUFFIXES = (".npz", ".npy", ".safetensors")


def kind_of(source: str | Path | None) -> str:
    """ "text", "arrays" or "images": what `load` makes of a source."""
    from compressor.data.images import is_image_folder

    if source is None:
        return "text"
    path = Path(source)
    if path.suffix.lower() in ARRAY_SUFFIXES or is_reference(source):
        return "arrays"
    return "images" if path.is_dir() and is_image_folder(path) else "text"


def load(
    source: str | Path | None, part: str = "calibration", pictures: Preprocessing | None = None
) -> Text | Arrays:  # fmt: skip
    """The data of a source: text, or named arrays.

    Args:
        source: A file, a directory, `module:callable`, or None for the built-in text sample.
        part: Which part of the built-in sample; "calibration" or "evaluation".
        pictures: How pictures become inputs.

    Raises:
        DataError: The source cannot be read, or its end may never come.
    """
    kind = kind_of(source)
    if source is not None:
        refuse_special(Path(source), DataError, folders=True)
    if kind == "images":
        from compressor.data.images import load_images

        return load_images(Path(str(source)), pictures)
    if kind == "arrays":
        from compressor.data.arrays import load_arrays

        return load_arrays(str(source))
    from compressor.data.text import load_text

    return load_text(source, part)


def is_reference(source: str | Path) -> bool:
    """Whether a source is `module:callable`, which is code."""
    module, colon, attribute = str(source).partition(":")
    names = (*module.split("."), *attribute.split("."))
    return bool(colon) and all(name.isidentifier() for name in names) and not Path(source).exists()
