"""The model of a job: pretrained, a small Llama with random weights, or a GPTModel of Megatron-core."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from launch.config import ModelConfig
from launch.megatron import build_gpt
from launch.pretrained import pretrained_model, pretrained_skeleton


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None, device: torch.device) -> Any:
    """Return the model on its device, in training mode. Random weights come from torch's seed, drawn on the CPU."""
    if config.library == "megatron":
        return build_gpt(config, device)
    path = config.path
    model = LlamaForCausalLM(llama_config(config, tokenizer)) if path is None else pretrained_model(path)
    nn.Module.to(model, device)
    return model.train()


def build_skeleton(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """Return the model that `build_model` would, on the meta device: nothing is read but its configuration."""
    with torch.device("meta"):
        if config.path is not None:
            return pretrained_skeleton(config.path).train()
        return LlamaForCausalLM(llama_config(config, tokenizer)).train()


def llama_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> LlamaConfig:
    """Return the small Llama: fp32, tied embeddings."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos if isinstance(eos, int) else None,
        dtype="float32",
    )


def vocabulary_size(model: Any) -> int:
    """Return how many tokens the model has embeddings for."""
    if not isinstance(model, PreTrainedModel):
        return model.vocab_size
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings.weight, torch.Tensor)
    return embeddings.weight.shape[0]
