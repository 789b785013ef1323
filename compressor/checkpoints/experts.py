"""Mixtures of experts with a linear layer for each matrix of each expert.

transformers 5 computes all experts of a layer by one parameter of three axes. Passes work on linear layers: statistics
are those of the tokens that reach an expert, and each expert is encoded by itself. So the modules that hold such
parameters are replaced; the function stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Part:
    """One expert's part of a parameter of all: the `index`-th of its first axis, `transposed` where a matrix is."""

    whole: str
    index: int
    transposed: bool


class Experts(nn.Module):
    """The experts of a layer, numbered, in place of a module that `use_experts_implementation` has decorated.

    Args:
        fused: It is emptied, and kept for what lies between the two products of an expert.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        settings = cast(Any, fused)
        self.up = _up(fused)
        self.is_transposed = bool(settings.is_transposed)
        self.n_experts = len(fused.get_parameter(DOWN))
        shapes = {name: fused.get_parameter(name).shape[1:] for name in (self.up, DOWN)}
        for number in range(self.n_experts):
            expert = nn.Module()
            for name, shape in shapes.items():
                n_in, n_out = shape if self.is_transposed else shape[::-1]
                expert.add_module(name, nn.Linear(n_in, n_out, bias=settings.has_bias, device="meta"))
            self.add_module(str(number), expert)
        fused._parameters.clear()
        self.rule = fused

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Of tokens (n, width), and the k experts that each goes to with their weights, (n, k), the sum (n, width)."""
        between = cast(Callable[[Tensor], Tensor], self.rule._apply_gate if self.rule.has_gate else self.rule.act_fn)
        total = torch.zeros_like(hidden_states)
        shares = total.new_zeros(total.shape[0], self.n_experts).scatter(1, top_k_index, top_k_weights.to(total.dtype))
        for number, share in enumerate(shares.unbind(1)):
            rows = share.nonzero().flatten()
            expert = self.get_submodule(str(number))
            hidden = between(expert.get_submodule(self.up)(hidden_states.index_select(0, rows)))
            outputs = expert.get_submodule(DOWN)(hidden) * share.index_select(0, rows).unsqueeze(1)
            total = total.index_add(0, rows, outputs.to(total.dtype))
        return total

    def parts(self) -> dict[str, Part]:
        """Each parameter's name within this module, and what it is of what stood there."""
        found: dict[str, Part] = {}
        for name, _ in self.named_parameters():
            number, layer, kind = name.split(".")
            whole = layer if kind == "weight" else f"{layer}_bias"
            found[name] = Part(whole, int(number), kind == "weight" and self.is_transposed)
        return found


def unfuse(network: nn.Module) -> nn.Module:
    """The network, each of its fused mixtures of experts replaced in place."""
    for name, module in list(network.named_modules()):
        if _is_fused(module):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, Experts(module))
    return network


def routed(block: nn.Module, prefix: str) -> set[str]:
    """The weights that only some of the tokens reach, by their names under `prefix`."""
    found = ((name, module) for name, module in block.named_modules() if isinstance(module, Experts))
    return {
        f"{prefix}{name}.{weight}" if name else f"{prefix}{weight}"
        for name, module in found
        for weight, _ in module.named_parameters()
        if weight.endswith(".weight")
    }


def _is_fused(module: nn.Module) -> bool:
    settings = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    return (
        all(hasattr(module, each) for each in settings)
        and not module.has_post_expert_norm
        and module._parameters.get(DOWN) is not None
        and any(module._parameters.get(name) is not None for name in UP)
    )


def _up(fused: nn.Module) -> str:
    return next(name for name in UP if fused._parameters.get(name) is not None)
