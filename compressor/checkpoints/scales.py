"""Weights in 8 bits whose scales lie beside them, as FP8 and int8 checkpoints have them: read with their scales.

    W = s · (q − z)      s a number, one per row, or one per block of rows and columns, broadcast; z mostly absent

Where the scales are called otherwise, or the codes are packed, a checkpoint is refused: its weights without scales are
another network's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from compressor.checkpoints.source import Computed, Source, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
SCALES = ("_scale", "_scale_inv", "_scales", ".scale", ".scales")
ZEROS = ("_zero_point", "_zeros")
UNUSED = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "input_zero_point", "weight_shape")
"""Endings of what belongs to activations, which are not stored."""


def scaled(tensors: Mapping[str, TensorInfo], rename: Mapping[str, str]) -> dict[str, tuple[Computed, dict[str, str]]]:
    """Each weight, by its name in the module, that has scales beside it: how it is computed, and the stored names of
    what from, as `Checkpoint.name_tensors` takes them.

    Args:
        tensors: As they are stored.
        rename: Stored name -> name in the module.
    """
    found: dict[str, tuple[Computed, dict[str, str]]] = {}
    for name, target in rename.items():
        info = tensors[name]
        if info.dtype not in EIGHT_BITS or len(info.shape) < 2:
            continue
        scale = next((each for each in _beside(name, SCALES) if _fits(tensors.get(each), info.shape)), None)
        if scale is None:
            continue
        zero = next((each for each in _beside(name, ZEROS) if _fits(tensors.get(each), info.shape)), None)
        parts = {"codes": name, "scale": scale} | ({"zero": zero} if zero else {})
        found[target] = (Computed(tuple(parts), _multiplied), parts)
    return found


def with_scales(source: Source, name: str) -> Tensor:
    """A stored tensor; with its scales where some lie beside it."""
    found = scaled(source.tensors, {name: name})
    if name not in found:
        return source.read(name)
    how, parts = found[name]
    return how.compute({part: source.read(stored).float() for part, stored in parts.items()})


def has_scales(tensors: Mapping[str, TensorInfo], name: str) -> bool:
    """Whether scales lie beside a stored tensor."""
    return bool(scaled(tensors, {name: name}))


def belongs_to_scales(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a stored tensor is a scale, or another number that 8 bits are stored with, of a weight that is there."""
    if name.endswith(UNUSED):
        return True
    stems = [name.removesuffix(ending) for ending in (*SCALES, *ZEROS) if name.endswith(ending)]
    weights = [each for stem in stems for each in (stem, f"{stem}.weight")]
    return any(each in tensors and each != name and tensors[each].dtype in EIGHT_BITS for each in weights)


def unread(tensors: Mapping[str, TensorInfo], read: Iterable[str]) -> list[str]:
    """Stored codes of 8 bits with a scale beside them that is none of those that are `read`."""
    known = set(read)
    return [
        name
        for name, info in tensors.items()
        if info.dtype in (*EIGHT_BITS, "U8") and len(info.shape) > 1 and name not in known
        and any(each in tensors for each in _beside(name, (*SCALES, "_absmax", "_quant_map")))
    ]  # fmt: skip


def _beside(name: str, endings: tuple[str, ...]) -> list[str]:
    return [f"{name}{ending}" for ending in endings] + [
        f"{name.removesuffix('.weight')}{ending}" for ending in endings if name.endswith(".weight")
    ]


def _fits(info: TensorInfo | None, shape: tuple[int, ...]) -> bool:
    """Whether it is a number, one for each row, or for each block."""
    if info is None:
        return False
    if info.numel == 1 or (info.shape[0] == shape[0] and info.numel == shape[0]):
        return True
    return len(info.shape) == len(shape) and all(one <= all_ for one, all_ in zip(info.shape, shape, strict=True))


def _multiplied(values: Mapping[str, Tensor]) -> Tensor:
    codes = values["codes"]
    if "zero" in values:
        codes = codes - _spread(values["zero"], codes)
    return codes * _spread(values["scale"], codes)


def _spread(scale: Tensor, codes: Tensor) -> Tensor:
    """The scales in the shape of the codes: a block's last one is as long as what is left."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() != codes.dim():
        return scale.reshape(-1, *[1] * (codes.dim() - 1))
    for axis, (n, wanted) in enumerate(zip(scale.shape, codes.shape, strict=True)):
        if n not in (1, wanted):
            scale = scale.repeat_interleave(_block(wanted, n), axis).narrow(axis, 0, wanted)
    return scale


def _block(length: int, n: int) -> int:
    """The size of n blocks that are as long as `length` together: a power of two where one is right."""
    powers = [2**i for i in range(1, 20) if -(-length // 2**i) == n]
    return powers[-1] if powers else -(-length // n)
