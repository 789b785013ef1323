"""Weights for ONNX without contributed operators: DequantizeLinear over [inputs, outputs], blocks along the inputs.

onnxruntime fuses it with the MatMul that follows into its low-bit kernel, but only in that order of axes and only from
an initialiser. The stored parts have rows of outputs, so a second copy, re-ordered, is written beside them:
`model.repacked.bin`, or after another graph's name. Its bytes are what `--standard` costs on disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from compressor.core.encoding import Affine, Codebook, Encoding, Scaled
from compressor.core.tensors import EncodedTensors
from compressor.export.builder import GraphBuilder
from compressor.export.forms import Form
from compressor.ops.packing import pack_plane

_TYPES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def kernel_values(encoding: Encoding, form: Form) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | int]:
    """(values (rows, columns), scales (rows, blocks), zeros (rows, blocks) or one): v = s · (value − zero)."""
    rows, columns = encoding.shape
    blocks = -(-columns // form.block)
    assert isinstance(encoding, Scaled | Codebook)
    per = blocks if encoding.group >= columns else encoding.group // form.block
    scales = encoding.scales.decode().expand(rows, -1).repeat_interleave(per, 1)[:, :blocks]
    if isinstance(encoding, Codebook):
        return _codebook_values(encoding, scales)
    values = encoding.codes if form.direct else torch.tensor(form.values)[encoding.codes.long()]
    zeros: torch.Tensor | int = 2 ** (form.bits - 1) if form.zero is None else form.zero
    if isinstance(encoding, Affine) and isinstance(encoding.zero, torch.Tensor):
        zeros = (encoding.zero * encoding.zero_steps).int().repeat_interleave(per, 1)[:, :blocks]
    return values[:, :columns], scales * form.factor, zeros


def _codebook_values(encoding: Codebook, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    rows, columns = encoding.shape
    values = encoding.table.int().flatten(0, 1)[encoding.index().flatten()].view(rows, -1)[:, :columns] + 8
    if encoding.order is None:
        return values, scales, 8
    inverse = torch.argsort(encoding.order.long())
    return values[inverse], scales[inverse], 8


class Repacked:
    """The file of re-ordered weights of a graph that is called so, written tensor by tensor."""

    def __init__(self, directory: Path, graph: str) -> None:
        self._name = f"{graph}.repacked.bin"
        self._file = open(directory / self._name, "wb")  # noqa: SIM115

    def close(self) -> int:
        """Ends the file; its bytes."""
        size = self._file.tell()
        self._file.close()
        return size

    def dequantized(self, b: GraphBuilder, tensors: EncodedTensors, name: str, form: Form) -> ir.Value:
        """float32 [inputs, outputs] from a blockwise DequantizeLinear."""
        values, scales, zeros = kernel_values(tensors[name].encoding, form)
        (rows, columns), blocks = values.shape, scales.shape[1]
        codes = self._packed(b, f"{name}.kn", values.T, form.bits, (columns, rows))
        half = bool((scales == scales.half()).all())
        stored = scales.T.to(torch.float16 if half else torch.float32).contiguous().numpy()
        scale = self._add(b, f"{name}.kn_scales", stored, ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
        if isinstance(zeros, int):
            zeros = torch.full((rows, blocks), zeros)
        zero = self._packed(b, f"{name}.kn_zeros", zeros.T, form.bits, (blocks, rows))
        scale = b.cast(scale, ir.DataType.FLOAT) if half else scale
        return b.op("DequantizeLinear", codes, scale, zero, axis=0, block_size=form.block)

    def _packed(self, b: GraphBuilder, name: str, values: torch.Tensor, bits: int, shape: tuple[int, int]) -> ir.Value:
        flat = pack_plane(values.reshape(1, -1).to(torch.int32), bits)
        return self._add(b, name, flat.numpy(), _TYPES[bits], shape)

    def _add(
        self, b: GraphBuilder, name: str, array: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...] | None = None
    ) -> ir.Value:
        offset = self._file.tell()
        self._file.write(array.tobytes())
        return b.external(name, self._name, offset, array.nbytes, dtype, shape or array.shape)
