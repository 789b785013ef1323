"""Which passes a tensor goes through, as the plan says, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from compressor.core.contract import Learnable, PruningPass, Statistics, WeightPass
from compressor.core.encoding import Encoding, Layout
from compressor.core.errors import CheckpointError, PassError
from compressor.core.passes import Need
from compressor.core.spec import DenseSpec, Spec
from compressor.core.tensors import EncodedTensor
from compressor.graph.blocks import layout_of, weight_of
from compressor.passes.registry import load_pass
from compressor.plan.plan import Plan, PlannedTensor
from compressor.plan.recipe import Recipe

Learners = dict[str, Learnable]
"""Name of a tensor -> what learns it on its block's output, of a pass's own."""


@dataclass(frozen=True)
class Chain:
    """What one matrix goes through: `prune` says which weights stay, `encode` how they are stored."""

    encode: WeightPass
    prune: PruningPass | None = None

    @property
    def needs(self) -> frozenset[Need]:
        return self.encode.needs | (self.prune.needs if self.prune else frozenset())

    @property
    def wants_gradient(self) -> bool:
        return self.prune is not None and self.prune.gradient_norm is not None

    def of_matrix(
        self, name: str, matrix: Tensor, known: Statistics, generator: torch.Generator, learners: Learners | None = None
    ) -> Encoding:
        """The encoding of a matrix (out, in), checked; `learners` gets what is to learn on the block's output.

        Raises:
            PassError: It does not rebuild the matrix, or what was dropped is there again.
            CheckpointError: Its weights are too large for the encoding, or what reaches it is no number.
        """
        if "data" in self.needs:
            moment = known.moment(matrix.shape[1]).to(matrix.device)
            if not bool(moment.diagonal().isfinite().all()):
                raise CheckpointError(
                    f"'{name}': what reaches it, or its square, is NaN or infinite on calibration data; give a "
                    "checkpoint from before the training diverged"
                )
            known = replace(known, hessian=moment)
        if self.prune is not None:
            matrix, kept = self.prune.prune(matrix, known)
            known = replace(known, kept=kept)
        try:
            learner = None if learners is None else self.encode.learnable(matrix, known)
            encoding = self.encode.encode(matrix, known, generator) if learner is None else learner.result()
        except CheckpointError as error:
            raise CheckpointError(f"'{name}': {error}") from error
        if learners is not None and learner is not None:
            learners[name] = learner
        self._check(name, matrix, encoding, known)
        return encoding

    def of_layer(
        self, name: str, module: nn.Module, known: Statistics, generator: torch.Generator,
        learners: Learners | None = None,
    ) -> EncodedTensor:  # fmt: skip
        """A layer's weight."""
        layout = layout_of(module)
        assert layout is not None
        matrix = layout.matrix(weight_of(module).data.float())
        encoding = self.of_matrix(name, matrix, known, generator, learners)
        return EncodedTensor(encoding, Layout(layout.shape, layout.transposed))

    def _check(self, name: str, matrix: Tensor, encoding: Encoding, known: Statistics) -> None:
        kept = None if self.prune is None else known.kept
        sound, back = encoding.shape == tuple(matrix.shape), False
        for rows, piece in encoding.pieces() if sound else ():  # a whole table would be there once more
            sound = sound and bool(piece.isfinite().all())
            back = back or (kept is not None and bool((piece[~kept[rows]] != 0).any()))
        if not sound:
            raise PassError(f"{name}: {self.encode.name} gave an encoding that does not rebuild {tuple(matrix.shape)}")
        if back:
            assert self.prune is not None
            raise PassError(f"{name}: {self.encode.name} brought back weights that {self.prune.name} had dropped")


@dataclass(frozen=True)
class Choice:
    """Which passes a tensor goes through, as the plan says."""

    recipe: Recipe
    plan: Plan

    @property
    def on_prefix(self) -> bool:
        """Whether a block is given what the compressed ones before it make, and not what the original's do."""
        return self.recipe.calibration.inputs == "prefix"

    def of(self, name: str, module: nn.Module) -> Chain | None:
        """The passes, or None where the tensor stays dense."""
        return None if layout_of(module) is None else self.of_matrix(name)

    def of_matrix(self, name: str) -> Chain | None:
        """The passes of a tensor that is a matrix as it is, or None where it stays dense."""
        planned = self._planned.get(name)
        if planned is None or planned.method is None:
            return None
        return Chain(load_pass(planned.method), None if planned.prune is None else load_pass(planned.prune))

    def spec(self, name: str) -> Spec | None:
        """How the plan says a tensor is stored."""
        return self._planned[name].spec if name in self._planned else None

    def dense(self, name: str, tensor: Tensor) -> EncodedTensor:
        """The tensor as it is, floats in the precision that the plan says; in float32 where they are beyond float16."""
        if not tensor.is_floating_point():
            return EncodedTensor.dense(tensor, tensor.dtype)
        spec = self.spec(name)
        half = spec.dtype == "F16" if isinstance(spec, DenseSpec) else self.recipe.export.dense == "float16"
        if half and tensor.numel() and float(tensor.abs().max()) > torch.finfo(torch.float16).max:
            half = False
        return EncodedTensor.dense(tensor, torch.float16 if half else torch.float32)

    @cached_property
    def _planned(self) -> dict[str, PlannedTensor]:
        return {tensor.name: tensor for tensor in self.plan.tensors}
