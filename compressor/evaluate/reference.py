"""The original network, run block by block: one block's weights in memory at a time, in float32.

Hidden states of all batches are kept between blocks; what lies outside of blocks (tables, norms, head) stays in memory
while it is used. A network without repeated blocks is run whole. An ONNX graph is run in onnxruntime, as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressor.core.batch import as_batch
from compressor.core.outputs import named_outputs
from compressor.evaluate.session import open_session
from compressor.sweeps.network import Network

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint


def original_logits(checkpoint: Checkpoint, windows: np.ndarray) -> Iterator[np.ndarray]:
    """The original's logits, one window at a time: float32 (1, n, vocabulary), in order, for windows (n_windows, n)."""

    def logits(found: dict[str, np.ndarray]) -> np.ndarray:
        return found["logits"] if "logits" in found else next(iter(found.values()))

    outputs = original_outputs(checkpoint, ({"input_ids": window[None]} for window in windows))
    return map(logits, outputs)  # which holds none while the next is made


def original_outputs(
    checkpoint: Checkpoint, batches: Iterable[dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    """The original's outputs by name, per batch in order; floats are float32.

    Args:
        batches: Arguments of its forward by name. A single one, unless it is input_ids, is given by position.
    """
    if checkpoint.kind == "onnx":
        session = open_session(checkpoint.source.files[0], apart=True)
        yield from (session.outputs_of(batch) for batch in batches)
        return
    calls = [as_batch(batch) for batch in batches]
    network = Network(checkpoint, fast=False)
    for name, _, _ in network.sweep(calls):
        if not name:
            with torch.no_grad():
                for call in calls:
                    yield _arrays(network.call(call))
            return
    with network.tail() as run, torch.no_grad():
        for call, hidden in zip(calls, network.last, strict=True):
            yield _arrays(run(call, hidden))


def _arrays(output: Any) -> dict[str, np.ndarray]:
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in named_outputs(output).items()
    }
