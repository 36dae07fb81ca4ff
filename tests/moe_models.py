"""Tiny MoE models of families of transformers, the same weights every time."""

from __future__ import annotations

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "initializer_range": 0.3,
}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}),
    "granitemoe": (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 4}),  # other names on disk
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, _DEEPSEEK),
}


def tiny_moe(family: str, *, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, config_kind, sizes = FAMILIES[family]
    model = kind(config_kind(**{**_SIZES, **sizes, **changes})).to(dtype)
    if dtype == torch.float64:  # grouped_mm has no fp64
        model.set_experts_implementation("eager")
    return model


def ids_of(rank: int, tokens: int = 9) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(40 + rank))
