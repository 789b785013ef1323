"""A network, or a block of one, that learns: its encoded matrices, and its norms and biases, are open."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from compressor.core.contract import Learnable
from compressor.core.passes import Moves, Rates
from compressor.core.tensors import EncodedTensor
from compressor.learning.learned import learnable


class Student(nn.Module):
    """A module and what its encoded tensors learn.

    tensors    of the module by name, each of which begins with `prefix`
    pruned     names of the matrices whose zeros stay
    learners   what learns some of them, of a pass's own
    """

    def __init__(
        self, module: nn.Module, tensors: Mapping[str, EncodedTensor], moves: Moves, prefix: str = "",
        pruned: Collection[str] = (), learners: Mapping[str, Learnable] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.module = module
        self.learned: dict[str, Learnable] = {}
        self.layouts, self.dense, self.stored = {}, {}, {}
        own = learners or {}
        for name, parameter in ((f"{prefix}{name}", parameter) for name, parameter in module.named_parameters()):
            tensor = tensors[name]
            if tensor.encoding.kind != "dense":
                self.learned[name] = own.get(name) or learnable(
                    tensor.encoding, moves, name in pruned, lambda name=name: tensors[name].encoding
                )
                self.layouts[name] = tensor.layout
            elif parameter.dim() == 1:
                self.dense[name] = nn.Parameter(tensor.decode())
                self.stored[name] = tensor.encoding.parts()["weight"].dtype

    def weights(self, dtype: torch.dtype, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The open tensors of these names, or all, as a forward takes them."""
        wanted = self.learned.keys() | self.dense.keys() if names is None else names
        found = {
            name: self.layouts[name].tensor(learned(dtype)) for name, learned in self.learned.items() if name in wanted
        }
        return found | {name: parameter.to(dtype) for name, parameter in self.dense.items() if name in wanted}

    def groups(self, rates: Rates) -> list[dict]:
        """Parameter groups of an optimiser."""
        groups = [{"params": list(self.dense.values()), "lr": rates.dense}]
        for learned in self.learned.values():
            groups += learned.parameter_groups(rates)
        return [group for group in groups if group["params"]]

    def penalty(self, step: int, steps: int) -> Tensor | float:
        """What the matrices ask for beside the loss, at a step; 0 of most."""
        return sum(learned.penalty(step, steps) for learned in self.learned.values()) / max(1, len(self.learned))

    def move(self) -> None:
        """After a step."""
        for learned in self.learned.values():
            learned.move()

    @property
    def flipped_fraction(self) -> float:
        """Moves of codes so far over the number of codes."""
        n_codes = sum(learned.n_codes for learned in self.learned.values())
        return sum(learned.flipped for learned in self.learned.values()) / max(1, n_codes)

    def results(self) -> dict[str, EncodedTensor]:
        """What has been learned."""
        found = {name: EncodedTensor(learned.result(), self.layouts[name]) for name, learned in self.learned.items()}
        dense = self.dense.items()
        return found | {name: EncodedTensor.dense(parameter, self.stored[name]) for name, parameter in dense}
