"""How far the tensors of an artifact are from the original's."""

from __future__ import annotations

from typing import Any

from compressor.core.memory import SLACK, Slack
from compressor.core.tensors import EncodedTensors
from compressor.plan.memory import COMPARED


def weight_errors(checkpoint: Any, tensors: EncodedTensors) -> dict[str, float]:
    """‖W − Ŵ‖ / ‖W‖ by name, of the tensors that are not stored as they were; one in memory at a time.

    Left out are those of more than COMPARED values, which would be the run's peak of memory, those whose shape has
    changed, and those that are all zero.
    """
    found, slack = {}, Slack(SLACK)
    for name in tensors:
        info = checkpoint.tensors.get(name)
        shape = tuple(tensors.describe(name)["tensor_shape"])
        if (
            info is None
            or info.shape != shape
            or not 0 < info.numel <= COMPARED
            or not info.dtype.startswith(("F", "BF", "Q"))
        ):
            continue
        slack.give_back()
        original = checkpoint.read(name).float()
        norm = float(original.norm())
        tensor = tensors[name]
        if len(shape) > 1 and original.is_contiguous() and not tensor.layout.transposed:
            matrix = tensor.layout.matrix(original)
            for rows, piece in tensor.encoding.pieces():
                matrix[rows].sub_(piece)
        else:
            original.sub_(tensor.decode())
        error = float(original.norm())
        if norm and error:
            found[name] = round(error / norm, 6)
    return found
