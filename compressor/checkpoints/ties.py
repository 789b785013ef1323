"""Names without torch: base-model prefixes, and which tables a Hugging Face config declares tied.

transformers keeps both in its model classes (`base_model_prefix`, `_tied_weights_keys`). Importing these
costs seconds, so the usual families stand here; `Checkpoint.build` corrects the names by the module itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BASE_PREFIX = {
    "albert": "albert", "bert": "bert", "bloom": "transformer", "camembert": "roberta", "deberta": "deberta",
    "deberta-v2": "deberta", "distilbert": "distilbert", "electra": "electra", "falcon": "transformer",
    "gpt2": "transformer", "gpt_bigcode": "transformer", "gpt_neo": "transformer", "gpt_neox": "gpt_neox",
    "gptj": "transformer", "mpnet": "mpnet", "mpt": "transformer", "roberta": "roberta",
    "xlm-roberta": "roberta",
}  # fmt: skip
HEADS = (
    "lm_head.", "cls.", "predictions.", "classifier.", "score.", "qa_outputs.", "vocab_", "generator_",
    "discriminator_", "pre_classifier.", "embed_out.", "sop_classifier.",
)  # fmt: skip
OUTPUT_TABLE = {
    "albert": "predictions.decoder", "bert": "cls.predictions.decoder", "camembert": "lm_head.decoder",
    "deberta": "cls.predictions.decoder", "deberta-v2": "cls.predictions.decoder",
    "distilbert": "vocab_projector", "electra": "generator_lm_head", "modernbert": "decoder",
    "mpnet": "lm_head.decoder", "roberta": "lm_head.decoder", "xlm-roberta": "lm_head.decoder",
}  # fmt: skip
INPUT_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
UNTIED_BY_DEFAULT = (
    "codegen", "deepseek_v2", "deepseek_v3", "falcon_h1", "glm", "glm4", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granitemoe", "helium", "jamba", "llama", "llama4_text", "mamba2", "ministral", "ministral3",
    "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "rembert", "rwkv", "seed_oss", "stablelm",
    "xlstm",
)  # fmt: skip
HEADED = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")


def architecture_of(config: dict[str, Any]) -> str:
    """The model class that a config names; empty where it names none."""
    names = config.get("architectures")
    return str(names[0]) if names and isinstance(names, list) else ""


def prefixed(names: Iterable[str], config: dict[str, Any] | None) -> dict[str, str]:
    """Stored name -> name in the module of the config, base-model prefix added or removed as needed."""
    stored = list(names)
    prefix = BASE_PREFIX.get(str((config or {}).get("model_type")), "model") + "."
    architecture = architecture_of(config or {})
    if not architecture:
        return {name: name for name in stored}
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    if bare:
        return {name: name.removeprefix(prefix) for name in stored}
    if any(name.startswith(prefix) for name in stored):
        return {name: name for name in stored}
    if not any(name.startswith(INPUT_STARTS) for name in stored):
        return {name: name for name in stored}
    return {name: name if name.startswith(HEADS) else prefix + name for name in stored}


# The first components of base models that were saved without their prefix.
INPUT_STARTS = ("wte.", "h.0.", "embeddings.", "embed_tokens.", "layers.0.", "word_embeddings.", "embed_in.")


def declared_ties(names: Iterable[str], config: dict[str, Any] | None) -> dict[str, str]:
    """Alias -> canonical name, as the config declares: the output table is the input table.

    A default that the config leaves out is that of the model class. The bias of a BERT-like output table is
    tied to the bias of its head.
    """
    config = config or {}
    architecture, model_type = architecture_of(config), str(config.get("model_type"))
    tied = config.get("tie_word_embeddings", model_type not in UNTIED_BY_DEFAULT)
    if not tied or not architecture.endswith(HEADED):
        return {}
    present = list(names)
    head = OUTPUT_TABLE.get(model_type, "lm_head")
    tables = [name for name in present if name.endswith(tuple(f"{table}.weight" for table in INPUT_TABLES))]
    ties = {f"{head}.weight": tables[0]} if tables else {}
    bias = f"{head.rpartition('.')[0]}.bias".removeprefix(".")
    if "." in head and (bias in present or f"{head}.bias" in present):
        ties[f"{head}.bias"] = bias
    return ties
