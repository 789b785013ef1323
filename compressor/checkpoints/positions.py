"""How many tokens in a row a network has positions for, as a transformers config says. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
BEHIND_PADDING = frozenset(
    [
        "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
        "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    ]
)  # fmt: skip
"""Kinds of networks whose positions are counted from behind the padding token's number: the table has so many more."""


def positions_of(config: Mapping[str, Any] | None) -> int | None:
    """The longest sequence that the network is made for; None where the config sets no limit."""
    config = config or {}
    for key in KEYS:
        limit = config.get(key)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            return max(0, limit - _before_first(config))
    return None


def _before_first(config: Mapping[str, Any]) -> int:
    """Rows of the table of positions that no token of a text is given."""
    if config.get("model_type") not in BEHIND_PADDING:
        return 0
    padding = 1 if config["model_type"] == "mpnet" else config.get("pad_token_id", 1)  # where the class says so
    return 1 + (padding if isinstance(padding, int) else 1)
