"""A network and those in it whose tensors are views of its own: what one of them learns, all of them have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.core.nested import Nested

Gather = Callable[[Sequence[Tensor], torch.Size], Tensor]


def beginning(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries along every dimension: a view."""
    return tensor[tuple(slice(size) for size in shape)]


def lay_over(part: nn.Module, whole: nn.Module, renamed: Mapping[str, str]) -> None:
    """Makes every parameter of a network a view of the whole's; `renamed` are those that are called otherwise there."""
    stored = dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        parameter.data = beginning(stored[renamed.get(name, name)].data, parameter.shape)


class Nest(Nested):
    """Views of a network: their memory is its own.

    Args:
        whole: Whose tensors the others begin.
        parts: The networks in it, smallest first; the last one is as large as `whole`. Their parameters are views of
            its (`lay_over`), and become their own where `own` says so.
        renamed: Of each part, its tensors -> the whole's, where they are called otherwise.
        own: Whether a tensor of a part is its own.
        choose: The numbers of the parts that learn in a step.
        join: Makes of gradients of beginnings the gradient of the whole tensor.
        frozen: The whole's tensors do not learn.
    """

    def __init__(
        self, whole: nn.Module, parts: Sequence[nn.Module], renamed: Sequence[Mapping[str, str]],
        own: Callable[[int, str, Tensor], bool], choose: Callable[[torch.Generator], list[int]], join: Gather,
        frozen: bool, splits: bool, teaches: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.splits, self.teaches = splits, teaches
        self._parts, self._choose, self._join = list(parts), choose, join
        self._stored = dict(whole.named_parameters())
        self._shared: list[dict[str, nn.Parameter]] = []
        if not frozen:
            self.whole = whole
        self.own = nn.ParameterList()
        self._own: list[list[nn.Parameter]] = []
        for number, part in enumerate(self._parts):
            kept, shared = [], {}
            for name, parameter in part.named_parameters():
                if own(number, name, parameter):
                    parameter.data = parameter.data.clone()
                    kept.append(parameter)
                else:
                    parameter.requires_grad_(not frozen)
                    shared[renamed[number].get(name, name)] = parameter
            self.own.extend(kept)
            self._own.append(kept)
            self._shared.append(shared)

    def drawn(self, generator: torch.Generator) -> list[nn.Module]:
        return [self._parts[number] for number in self._choose(generator)]

    @torch.no_grad()
    def gather(self, drawn: Sequence[nn.Module]) -> None:
        numbers = [self._parts.index(part) for part in drawn]
        if hasattr(self, "whole"):
            for name, parameter in self._stored.items():
                held = [self._shared[number].get(name) for number in dict.fromkeys(numbers)]
                there = [each.grad for each in held if each is not None and each.grad is not None]
                nothing = [parameter.new_empty([0] * parameter.dim())] * (len(numbers) - len(there))
                parameter.grad = self._join([*there, *nothing], parameter.shape)
        for number in set(numbers):
            for each in self._shared[number].values():
                each.grad = None
            for each in self._own[number]:
                if each.grad is not None:
                    each.grad /= len(drawn)

    def train(self, mode: bool = True) -> Nest:
        """Sets the parts' mode with its own."""
        super().train(mode)
        for part in self._parts:
            part.train(mode)
        return self
