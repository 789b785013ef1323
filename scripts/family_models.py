"""Tiny networks of Hugging Face's architectures with random weights: what scripts/families.py runs.

Each is a class of transformers and the settings of its config; a name is the model type, and what is special about this
one. Sizes are small and no two alike, so that an axis taken for another shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.pico import VOCABULARY, lively, write_tokenizer

POSITIONS = 1024
WINDOW = 24
"""Of sliding attention: shorter than every text that is compared."""
ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """A network: the config of this class of transformers with these settings.

    takes   what its forward is given: "text", "pixels" (of `side`), "sound", and "text pair" or "sound pair" (for an
            encoder and a decoder)
    """

    kind: str
    settings: dict[str, Any]
    takes: str = "text"
    side: int = 32

    @property
    def is_decoder(self) -> bool:
        return self.takes == "text" and self.kind.endswith(("ForCausalLM", "LMHeadModel"))

    def write(self, directory: Path) -> Path:
        """The network with its tokenizer in a folder, as `save_pretrained` leaves it."""
        directory.mkdir(parents=True, exist_ok=True)
        built(self).save_pretrained(directory)
        if self.takes.startswith("text"):
            write_tokenizer(directory)
        return directory


def built(family: Family) -> nn.Module:
    """The network in eval mode; its weights are drawn from a seed of its own."""
    import transformers

    kind = getattr(transformers, family.kind)
    config = kind.config_class(**family.settings)
    torch.manual_seed(1)
    return lively(kind(config), 1)


def causal(kind: str, **settings: Any) -> Family:
    """A decoder of two layers, or as many as have types, with grouped attention, by names that most configs share."""
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112,
        "num_hidden_layers": len(settings.get("layer_types", ALTERNATING)),
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    return Family(kind, {key: value for key, value in (usual | settings).items() if value is not ...})


def renamed(kind: str, **settings: Any) -> Family:
    """A decoder whose config has names of its own."""
    return Family(kind, {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} | settings)


def encoder(kind: str, takes: str = "text", **settings: Any) -> Family:
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 60, "intermediate_size": 100, "num_hidden_layers": 2,
        "num_attention_heads": 3, "max_position_embeddings": POSITIONS, "pad_token_id": 1,
    }  # fmt: skip
    return Family(kind, {key: value for key, value in (usual | settings).items() if value is not ...}, takes)


def vision(kind: str, **settings: Any) -> Family:
    usual: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
        "patch_size": 8, "num_labels": 7,
    }  # fmt: skip
    return Family(kind, {key: value for key, value in (usual | settings).items() if value is not ...}, "pixels")


def pair(kind: str, **settings: Any) -> Family:
    return Family(kind, {"vocab_size": VOCABULARY, "pad_token_id": 1, "eos_token_id": 1} | settings, "text pair")


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1}
_LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
_GPT2 = {"n_embd": 72, "n_layer": 2, "n_head": 3, "n_positions": POSITIONS}
_BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256, "rope_theta": 10000.0,
}  # fmt: skip

DECODERS: dict[str, Family] = {
    "llama": causal("LlamaForCausalLM"),
    "llama, llama3 rope": causal("LlamaForCausalLM", rope_parameters=_LLAMA3),
    "llama, linear rope": causal(
        "LlamaForCausalLM", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama, dynamic rope": causal(
        "LlamaForCausalLM", max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "llama, yarn": causal("LlamaForCausalLM", rope_parameters=_YARN),
    "llama, biased": causal("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "llama, gelu": causal("LlamaForCausalLM", hidden_act="gelu"),
    "llama, heads of 8": causal("LlamaForCausalLM", head_dim=8),
    "llama, heads of 20": causal("LlamaForCausalLM", head_dim=20),
    "llama, heads of 24": causal("LlamaForCausalLM", head_dim=24),
    "llama, heads of 100": causal("LlamaForCausalLM", head_dim=100),
    "mistral": causal("MistralForCausalLM", sliding_window=WINDOW, head_dim=32),
    "mistral, no window": causal("MistralForCausalLM", sliding_window=None),
    "qwen2": causal("Qwen2ForCausalLM"),
    "qwen2, windows": causal(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": causal("Qwen3ForCausalLM", head_dim=32),
    "qwen3, windows": causal(
        "Qwen3ForCausalLM", head_dim=16, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma": causal("GemmaForCausalLM", head_dim=32, num_key_value_heads=1),
    "gemma2": causal(
        "Gemma2ForCausalLM", head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": causal(
        "Gemma3ForCausalLM", head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=24, layer_types=ALTERNATING
    ),
    "gemma3n": causal(
        "Gemma3nForCausalLM", head_dim=16, sliding_window=WINDOW, num_kv_shared_layers=2,
        layer_types=[*ALTERNATING, *ALTERNATING],
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=16, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2,
    ),
    "gemma4": causal(
        "Gemma4ForCausalLM", head_dim=16, global_head_dim=32, sliding_window=WINDOW, layer_types=ALTERNATING,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=16,
    ),
    "vaultgemma": causal("VaultGemmaForCausalLM", head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "phi": causal("PhiForCausalLM", partial_rotary_factor=0.5, num_key_value_heads=4),
    "phi3": causal("Phi3ForCausalLM", sliding_window=None),
    "phi3, window": causal("Phi3ForCausalLM", sliding_window=WINDOW),
    "phi3, longrope": causal(
        "Phi3ForCausalLM", original_max_position_embeddings=256, sliding_window=None,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 20 for i in range(8)],
            "long_factor": [1.5 + i / 4 for i in range(8)], "original_max_position_embeddings": 256,
        },
    ),
    "gpt2": renamed("GPT2LMHeadModel", **_GPT2),
    "gpt_neo": renamed(
        "GPTNeoForCausalLM", hidden_size=60, num_layers=2, num_heads=3, attention_types=[[["global", "local"], 1]],
        window_size=WINDOW, max_position_embeddings=POSITIONS, intermediate_size=96,
    ),
    "gptj": renamed("GPTJForCausalLM", n_embd=64, n_layer=2, n_head=4, n_positions=POSITIONS, rotary_dim=8),
    "gpt_bigcode": renamed("GPTBigCodeForCausalLM", **_GPT2, multi_query=True),
    "gpt_neox": causal("GPTNeoXForCausalLM", num_key_value_heads=..., rotary_pct=0.25),
    "gpt_neox_japanese": causal("GPTNeoXJapaneseForCausalLM", num_key_value_heads=..., rotary_pct=0.5),
    "gpt_oss": causal(
        "GptOssForCausalLM", head_dim=16, sliding_window=WINDOW, **_LOCAL,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        layer_types=ALTERNATING,
    ),
    "codegen": renamed("CodeGenForCausalLM", n_embd=64, n_layer=2, n_head=4, n_positions=POSITIONS, rotary_dim=8),
    "opt": causal("OPTForCausalLM", num_key_value_heads=..., ffn_dim=112, word_embed_proj_dim=48),
    "bloom": renamed("BloomForCausalLM", hidden_size=60, n_layer=2, n_head=3),
    "falcon": renamed(
        "FalconForCausalLM", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
        max_position_embeddings=POSITIONS, bias=False, parallel_attn=True, new_decoder_architecture=False,
    ),
    "falcon, new": renamed(
        "FalconForCausalLM", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, max_position_embeddings=POSITIONS,
    ),
    "falcon, alibi": renamed(
        "FalconForCausalLM", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=False, alibi=True,
        parallel_attn=False, bias=True, max_position_embeddings=POSITIONS,
    ),
    "stablelm": causal("StableLmForCausalLM", partial_rotary_factor=0.25),
    "stablelm, parallel": causal(
        "StableLmForCausalLM", partial_rotary_factor=0.25, use_parallel_residual=True, qk_layernorm=True
    ),
    "olmo": causal("OlmoForCausalLM", clip_qkv=8.0),
    "olmo2": causal("Olmo2ForCausalLM"),
    "olmo3": causal("Olmo3ForCausalLM", sliding_window=WINDOW, layer_types=ALTERNATING),
    "granite": causal(
        "GraniteForCausalLM", embedding_multiplier=2.0, logits_scaling=4.0, residual_multiplier=0.5,
        attention_multiplier=0.3,
    ),
    "granite_swa": causal("GraniteSWAForCausalLM", sliding_window=WINDOW, layer_types=ALTERNATING),
    "smollm3": causal("SmolLM3ForCausalLM", no_rope_layers=[1, 0], use_sliding_window=False),
    "smollm3, windows": causal(
        "SmolLM3ForCausalLM", no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=WINDOW
    ),
    "cohere": causal("CohereForCausalLM", use_qk_norm=True),
    "cohere2": causal("Cohere2ForCausalLM", sliding_window=WINDOW, layer_types=ALTERNATING),
    "starcoder2": causal("Starcoder2ForCausalLM", sliding_window=None),
    "starcoder2, window": causal("Starcoder2ForCausalLM", sliding_window=WINDOW),
    "mpt": renamed("MptForCausalLM", d_model=64, n_heads=4, n_layers=2, max_seq_len=POSITIONS),
    "minicpm3": causal("MiniCPM3ForCausalLM", **_LATENT, num_key_value_heads=4),
    "glm": causal("GlmForCausalLM", head_dim=16, partial_rotary_factor=0.5),
    "glm4": causal("Glm4ForCausalLM", head_dim=16, partial_rotary_factor=0.5),
    "helium": causal("HeliumForCausalLM", head_dim=16),
    "ministral": causal("MinistralForCausalLM", head_dim=16, sliding_window=WINDOW, layer_types=ALTERNATING),
    "ministral3": causal("Ministral3ForCausalLM", head_dim=16),
    "arcee": causal("ArceeForCausalLM"),
    "ernie4_5": causal("Ernie4_5ForCausalLM", head_dim=16),
    "afmoe": causal(
        "AfmoeForCausalLM", head_dim=16, sliding_window=WINDOW, num_dense_layers=2, layer_types=ALTERNATING, **_EXPERTS
    ),
    "apertus": causal("ApertusForCausalLM"),
    "bitnet": causal("BitNetForCausalLM"),
    "biogpt": causal("BioGptForCausalLM", num_key_value_heads=...),
    "cpmant": renamed(
        "CpmAntForCausalLM", hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=96, num_hidden_layers=2,
    ),
    "ctrl": renamed("CTRLLMHeadModel", n_embd=64, dff=96, n_layer=2, n_head=4, n_positions=POSITIONS),
    "cwm": causal("CwmForCausalLM", head_dim=16, sliding_window=WINDOW, layer_types=ALTERNATING),
    "diffllama": causal("DiffLlamaForCausalLM", num_key_value_heads=2),
    "doge": causal("DogeForCausalLM", keep_window_size=2048),
    "exaone4": causal("Exaone4ForCausalLM", sliding_window=WINDOW, layer_types=ALTERNATING),
    "hunyuan_v1_dense": causal("HunYuanDenseV1ForCausalLM", head_dim=16),
    "hyperclovax": causal("HyperCLOVAXForCausalLM"),
    "jais2": causal("Jais2ForCausalLM"),
    "mellum": causal("MellumForCausalLM", head_dim=16, **_EXPERTS),
    "modernbert-decoder": causal(
        "ModernBertDecoderForCausalLM", num_key_value_heads=..., local_attention=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "nanochat": causal("NanoChatForCausalLM"),
    "nemotron": causal("NemotronForCausalLM", partial_rotary_factor=0.5),
    "persimmon": causal("PersimmonForCausalLM", num_key_value_heads=..., partial_rotary_factor=0.5),
    "seed_oss": causal("SeedOssForCausalLM", head_dim=16),
    "xglm": renamed(
        "XGLMForCausalLM", d_model=64, ffn_dim=96, num_layers=2, attention_heads=4, max_position_embeddings=POSITIONS
    ),
    "openai-gpt": renamed("OpenAIGPTLMHeadModel", **_GPT2),
    "youtu": causal("YoutuForCausalLM", **_LATENT, num_key_value_heads=4),
    "bart, decoder": renamed("BartForCausalLM", **_BART, is_decoder=True, is_encoder_decoder=False),
    "blenderbot, decoder": renamed("BlenderbotForCausalLM", **_BART, is_decoder=True, is_encoder_decoder=False),
    "trocr, decoder": renamed(
        "TrOCRForCausalLM", d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96,
        max_position_embeddings=POSITIONS, cross_attention_hidden_size=64,
    ),
    "bert, decoder": encoder("BertLMHeadModel", is_decoder=True),
    "roberta, decoder": encoder("RobertaForCausalLM", is_decoder=True, max_position_embeddings=POSITIONS + 2),
    "electra, decoder": encoder("ElectraForCausalLM", is_decoder=True, embedding_size=48),
    # Mixtures of experts
    "mixtral": causal("MixtralForCausalLM", sliding_window=None, **_LOCAL),
    "qwen2_moe": causal(
        "Qwen2MoeForCausalLM", shared_expert_intermediate_size=64, decoder_sparse_step=1, **_EXPERTS
    ),
    "qwen3_moe": causal("Qwen3MoeForCausalLM", head_dim=16, **_EXPERTS),
    "olmoe": causal("OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2),
    "granitemoe": causal("GraniteMoeForCausalLM", **_LOCAL),
    "phimoe": causal("PhimoeForCausalLM", **_LOCAL),
    "deepseek_v2": causal(
        "DeepseekV2ForCausalLM", **_LATENT, **_ROUTED, first_k_dense_replace=1, num_key_value_heads=4,
        topk_method="greedy",
    ),
    "deepseek_v3": causal(
        "DeepseekV3ForCausalLM", **_LATENT, **_ROUTED, first_k_dense_replace=1, num_key_value_heads=4, n_group=2,
        topk_group=1,
    ),
    "glm4_moe": causal("Glm4MoeForCausalLM", head_dim=16, **_ROUTED, first_k_dense_replace=1, n_group=1, topk_group=1),
    "ernie4_5_moe": causal("Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_intermediate_size=48),
    "llama4": causal(
        "Llama4ForCausalLM", head_dim=16, **_LOCAL, intermediate_size_mlp=96, attention_chunk_size=WINDOW,
        interleave_moe_layer_step=2,
    ),
    "dbrx": renamed(
        "DbrxForCausalLM", d_model=64, n_heads=4, n_layers=2, max_seq_len=POSITIONS,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "jetmoe": causal(
        "JetMoeForCausalLM", kv_channels=16, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2,
        num_attention_heads=4,
    ),
    # States that are no keys and values
    "lfm2": causal(
        "Lfm2ForCausalLM", conv_L_cache=3, block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"],
    ),
    "mamba": renamed("MambaForCausalLM", hidden_size=48, num_hidden_layers=2, state_size=8),
    "mamba2": renamed(
        "Mamba2ForCausalLM", hidden_size=48, num_hidden_layers=2, state_size=8, num_heads=6, head_dim=16, n_groups=1,
        expand=2,
    ),
    "falcon_mamba": renamed("FalconMambaForCausalLM", hidden_size=48, num_hidden_layers=2, state_size=8),
    "falcon_h1": causal(
        "FalconH1ForCausalLM", head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "bamba": causal(
        "BambaForCausalLM", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1
    ),
    "recurrent_gemma": causal("RecurrentGemmaForCausalLM", lru_width=64, attention_window_size=WINDOW),
    "rwkv": renamed(
        "RwkvForCausalLM", hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, context_length=POSITIONS
    ),
    "xlstm": renamed("xLSTMForCausalLM", hidden_size=64, num_hidden_layers=2, num_heads=4, qk_dim_factor=1.0),
    "qwen3_next": causal(
        "Qwen3NextForCausalLM", head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"], **_EXPERTS,
        shared_expert_intermediate_size=48, mlp_only_layers=[0, 1],
    ),
    "qwen3_5": causal(
        "Qwen3_5ForCausalLM", head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    ),
    "olmo_hybrid": causal(
        "OlmoHybridForCausalLM", linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    ),
    "xlnet": renamed("XLNetLMHeadModel", d_model=64, n_layer=2, n_head=4, d_inner=96),
    "qwen3_5_moe": causal(
        "Qwen3_5MoeForCausalLM", head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"], **_EXPERTS,
        shared_expert_intermediate_size=48,
    ),
    "kimi_linear": causal(
        "KimiLinearForCausalLM", head_dim=16, linear_num_heads=4, linear_head_dim=16, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, num_key_value_heads=4, **_ROUTED,
        layer_types=["linear_attention", "full_attention"], first_k_dense_replace=1,
    ),
    "jamba": causal(
        "JambaForCausalLM", num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
        attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False,
    ),
    "granitemoehybrid": causal(
        "GraniteMoeHybridForCausalLM", **_LOCAL, shared_intermediate_size=96, layer_types=["mamba", "attention"],
        mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
    ),
    "nemotron_h": causal(
        "NemotronHForCausalLM", hybrid_override_pattern="M*-", num_hidden_layers=3, head_dim=16, mamba_num_heads=8,
        mamba_head_dim=16, ssm_state_size=8, n_groups=2,
    ),
    "zamba2": causal(
        "Zamba2ForCausalLM", num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"], mamba_d_state=8,
        n_mamba_heads=8, mamba_ngroups=1, num_mem_blocks=1, num_key_value_heads=4,
    ),
    "lfm2_moe": causal(
        "Lfm2MoeForCausalLM", conv_L_cache=3, layer_types=["conv", "full_attention"], num_dense_layers=1, **_EXPERTS
    ),
    "hunyuan_v1_moe": causal("HunYuanMoEV1ForCausalLM", head_dim=16, num_experts=4, moe_topk=2),
    "minimax_m2": causal("MiniMaxM2ForCausalLM", head_dim=16, **_LOCAL),
    "dots1": causal("Dots1ForCausalLM", head_dim=16, **_ROUTED, first_k_dense_replace=1, n_group=1, topk_group=1),
    "flex_olmo": causal("FlexOlmoForCausalLM", num_experts=4, num_experts_per_tok=2),
}  # fmt: skip

ENCODERS: dict[str, Family] = {
    "bert": encoder("BertForMaskedLM"),
    "bert, classes": encoder("BertForSequenceClassification", num_labels=5),
    "bert, one label": encoder("BertForSequenceClassification", num_labels=1),
    "bert, spans": encoder("BertForQuestionAnswering"),
    "distilbert, classes": Family(
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 60, "hidden_dim": 100, "n_layers": 2, "n_heads": 3,
         "max_position_embeddings": POSITIONS, "num_labels": 5, "pad_token_id": 1},
    ),
    "camembert, classes": encoder("CamembertForSequenceClassification", num_labels=5, max_position_embeddings=1026),
    "roberta, tokens": encoder("RobertaForTokenClassification", num_labels=5, max_position_embeddings=1026),
    "xlm-roberta": encoder("XLMRobertaForMaskedLM", max_position_embeddings=1026),
    "electra, classes": encoder("ElectraForSequenceClassification", embedding_size=48, num_labels=5),
    "albert": encoder("AlbertForMaskedLM", embedding_size=48),
    "mpnet": encoder("MPNetForMaskedLM", max_position_embeddings=1026),
    "deberta": encoder("DebertaForMaskedLM"),
    "deberta_v2": encoder("DebertaV2ForMaskedLM"),
    "modernbert": encoder("ModernBertForMaskedLM", local_attention=WINDOW),
    "eurobert": encoder("EuroBertForMaskedLM", num_key_value_heads=3),
    "nomic_bert": encoder("NomicBertForMaskedLM"),
    "gte": encoder("GteModel"),
    "jina_embeddings_v3": encoder("JinaEmbeddingsV3ForMaskedLM"),
    "roformer": encoder("RoFormerForMaskedLM", embedding_size=48),
    "esm": encoder("EsmForMaskedLM", max_position_embeddings=1026, mask_token_id=2, position_embedding_type="rotary"),
    "ernie": encoder("ErnieForMaskedLM"),
    "convbert": encoder("ConvBertForMaskedLM", embedding_size=48, num_attention_heads=6, head_ratio=2),
    "squeezebert": encoder("SqueezeBertForMaskedLM", embedding_size=60, num_attention_heads=4),
    "mobilebert": encoder(
        "MobileBertForMaskedLM", embedding_size=48, intra_bottleneck_size=36, true_hidden_size=36, hidden_size=60,
    ),
    "layoutlm, tokens": encoder("LayoutLMForTokenClassification", num_labels=5),
    "clip, text": encoder("CLIPTextModelWithProjection", projection_dim=24, bos_token_id=0, eos_token_id=1),
    "siglip, text": encoder("SiglipTextModel", projection_size=24),
}  # fmt: skip

VISION: dict[str, Family] = {
    "vit": vision("ViTForImageClassification"),
    "deit": vision("DeiTForImageClassification"),
    "beit": vision("BeitForImageClassification"),
    "dinov2": vision("Dinov2ForImageClassification", intermediate_size=..., mlp_ratio=2),
    "swin": vision(
        "SwinForImageClassification", hidden_size=..., intermediate_size=..., num_hidden_layers=...,
        num_attention_heads=..., embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=2, patch_size=4,
    ),
    "swinv2": vision(
        "Swinv2ForImageClassification", hidden_size=..., intermediate_size=..., num_hidden_layers=...,
        num_attention_heads=..., embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=2, patch_size=4,
    ),
    "convnext": Family(
        "ConvNextForImageClassification", {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_labels": 7},
        "pixels",
    ),
    "resnet": Family(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [128, 144, 160, 176], "depths": [1, 1, 1, 1], "num_labels": 7}, "pixels",
    ),
    "mobilenet_v2": Family(
        "MobileNetV2ForImageClassification", {"depth_multiplier": 0.35, "image_size": 32, "num_labels": 7}, "pixels"
    ),
    "segformer": Family(
        "SegformerForSemanticSegmentation",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40], "num_attention_heads": [1, 2, 2, 4],
         "decoder_hidden_size": 32, "num_labels": 7}, "pixels", 64,
    ),
    "yolos": vision("YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=5),
    "pvt_v2": Family(
        "PvtV2ForImageClassification",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
         "num_labels": 7, "image_size": 32}, "pixels",
    ),
    "poolformer": Family(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_labels": 7}, "pixels",
    ),
    "clip_vision": vision("CLIPVisionModelWithProjection", projection_dim=24),
    "siglip_vision": vision("SiglipVisionModel"),
    "dinov3": vision("DINOv3ViTModel"),
    "convnextv2": Family(
        "ConvNextV2ForImageClassification", {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_labels": 7},
        "pixels",
    ),
    "regnet": Family(
        "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "groups_width": 8,
         "num_labels": 7}, "pixels",
    ),
    "efficientnet": Family(
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.5, "depth_coefficient": 0.3, "image_size": 32, "hidden_dim": 640, "num_labels": 7},
        "pixels", 64,
    ),
    "mobilevit": Family(
        "MobileViTForImageClassification",
        {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64], "num_attention_heads": 4,
         "image_size": 64, "num_labels": 7}, "pixels", 64,
    ),
    "levit": Family(
        "LevitForImageClassification",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8], "num_labels": 7}, "pixels", 64,
    ),
    "depth_anything": Family(
        "DepthAnythingForDepthEstimation",
        {"patch_size": 8, "reassemble_hidden_size": 48, "neck_hidden_sizes": [16, 24, 32, 40], "fusion_hidden_size": 16,
         "backbone_config": {
             "model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3,
             "image_size": 32, "patch_size": 8, "out_indices": [1, 2, 3, 4], "apply_layernorm": True,
             "reshape_hidden_states": False}},
        "pixels",
    ),
    "detr": Family(
        "DetrForObjectDetection",
        {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
         "decoder_attention_heads": 3, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "num_queries": 7, "num_labels": 7,
         "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
         "backbone_config": {
             "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1],
             "layer_type": "basic", "out_features": ["stage4"]}},
        "pixels", 64,
    ),
}  # fmt: skip

PAIRS: dict[str, Family] = {
    "t5": pair("T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
    "bart": pair("BartForConditionalGeneration", **_BART),
    "marian": pair("MarianMTModel", **_BART, decoder_start_token_id=1),
    "m2m_100": pair("M2M100ForConditionalGeneration", **_BART),
    "mt5": pair("MT5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
    "mbart": pair("MBartForConditionalGeneration", **_BART),
    "pegasus": pair("PegasusForConditionalGeneration", **_BART),
    "blenderbot": pair("BlenderbotForConditionalGeneration", **_BART),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {key: value for key, value in _BART.items() if key != "max_position_embeddings"}
        | {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 20,
            "max_source_positions": 40,
            "max_target_positions": 64,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 2,
        },
        "sound pair",
    ),
}

SOUND: dict[str, Family] = {
    "wav2vec2": Family(
        "Wav2Vec2ForCTC",
        {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80,
         "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4, "pad_token_id": 0}, "sound",
    ),
    "wavlm": Family(
        "WavLMForCTC",
        {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80,
         "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4, "pad_token_id": 0}, "sound",
    ),
    "hubert": Family(
        "HubertForCTC",
        {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80,
         "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4, "pad_token_id": 0}, "sound",
    ),
}  # fmt: skip

FAMILIES: dict[str, Family] = DECODERS | ENCODERS | VISION | PAIRS | SOUND


def example(family: Family, n: int) -> dict[str, np.ndarray]:
    """Inputs of `n` examples for a network that does not take text."""
    generator = np.random.default_rng(5)
    if family.takes == "pixels":
        return {"pixel_values": generator.normal(size=(n, 3, family.side, family.side)).astype(np.float32)}
    if family.takes == "sound":
        return {"input_values": generator.normal(size=(n, 1600)).astype(np.float32)}
    if family.takes == "sound pair":
        sound = generator.normal(size=(n, family.settings["num_mel_bins"], 2 * family.settings["max_source_positions"]))
        return {
            "input_features": sound.astype(np.float32), "decoder_input_ids": generator.integers(2, 290, (n, 13))
        }  # fmt: skip
    sides = {"input_ids": 19, "decoder_input_ids": 13}
    return {name: generator.integers(2, 290, (n, length)) for name, length in sides.items()}
