"""Whose traced graphs were measured to be right, by scripts/families.py: a plan need not try to trace them.

Model types of transformers. tests/export/test_causal.py holds both against docs/measured/families.json.
"""

from __future__ import annotations

TRACED_WITH_CACHE = frozenset((
    "bloom", "codegen", "cohere", "gemma3n_text", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "olmo", "olmo3", "opt", "phi", "stablelm", "vaultgemma",
))  # fmt: skip
"""Causal decoders whose graph keeps a cache."""
TRACED = frozenset((
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "eurobert", "modernbert",
    "mpnet", "roberta", "xlm-roberta",
))  # fmt: skip
"""Other networks."""
