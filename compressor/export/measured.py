"""Whose traced graphs were measured to be right, by scripts/families.py: a plan need not try to trace them.

Model types of transformers. tests/export/test_causal.py holds both against docs/measured/families.json.
"""

from __future__ import annotations

TRACED_WITH_CACHE = frozenset((
    "bloom", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "phi",
))  # fmt: skip
"""Causal decoders whose graph keeps a cache."""
TRACED = frozenset(())
"""Other networks."""
