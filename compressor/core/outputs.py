"""The outputs of a network by name: what a forward returns, however it is nested, as the artifact has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

STATES = ("past_key_values", "cache_params", "mems", "state", "rnn_state")
"""What a language model hands to its own next step, and no other use knows."""
NESTED = (Tensor, Mapping, tuple, list)


def named_outputs(found: Any) -> dict[str, Tensor]:
    """Every tensor of what a forward returned, in its order.

    A tensor alone is `output`, so is the only one of a tuple; those of a tuple are `output_0`, `output_1`, …, those
    of a mapping have its names. What is nested has the names of the way to it, joined by dots: `output_1.0`,
    `text_model_output.last_hidden_state`. Caches of language models are left out.
    """
    if isinstance(found, Tensor):
        return {"output": found}
    if isinstance(found, Mapping):
        return dict(_named(found, ""))
    kept = [item for item in found if isinstance(item, NESTED)] if isinstance(found, (tuple, list)) else []
    named = dict(_named(kept, ""))
    if len(named) == 1 and "0" in named:
        return {"output": named["0"]}
    return {f"output_{name}": tensor for name, tensor in named.items()}


def _named(found: Mapping | tuple | list, prefix: str) -> Iterator[tuple[str, Tensor]]:
    items = found.items() if isinstance(found, Mapping) else enumerate(found)
    for name, value in items:
        if name in STATES:
            continue
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, (Mapping, tuple, list)):
            yield from _named(value, f"{prefix}{name}.")
