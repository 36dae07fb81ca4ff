"""A mixture of experts from a dense model: every expert starts as the dense MLP ("sparse upcycling", arXiv 2212.05055).

Llama (and SmolLM2) become Mixtral, Qwen3 becomes Qwen3-MoE, so that the attention stays what it was. The weights of a
token's experts add up to one, so the outputs right after upcycling are those of the dense model, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe.errors import MoeConfigError

_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_MLP = ("gate_proj", "up_proj", "down_proj")
_ROUTER = "mlp.gate.weight"


def upcycle(model: PreTrainedModel, num_experts: int, *, top_k: int = 2, seed: int = 0) -> PreTrainedModel:
    """Return a new MoE model with `num_experts` copies of every MLP of a dense Llama or Qwen3 model, of its dtype.

    Routers are random, from `seed`, the same on every rank: they, and what the experts see by them, break the tie.

    Raises MoeConfigError for other models, and for sizes that cannot be.
    """
    if not 1 <= top_k <= num_experts:
        raise MoeConfigError(f"top_k is {top_k} of {num_experts} experts; it must be between 1 and {num_experts}")
    made = _empty(model, num_experts, top_k)
    nn.Module.to(made, device=model.device, dtype=model.dtype)  # in place
    state = {name: value for name, value in model.state_dict().items() if not _mlp_part(name)}
    for i in range(model.config.num_hidden_layers):
        state |= _experts_of(model, i, num_experts)
    generator = torch.Generator().manual_seed(seed)
    for name, value in made.state_dict().items():
        if name.endswith(_ROUTER):
            noise = torch.randn(value.shape, generator=generator) * model.config.initializer_range
            state[name] = noise.to(value.dtype)
    made.load_state_dict(state)
    made.generation_config = model.generation_config
    return made.train(model.training)


def _empty(model: PreTrainedModel, num_experts: int, top_k: int) -> PreTrainedModel:
    old: Any = getattr(model, "config", None)
    kept = {name: getattr(old, name) for name in _KEPT if hasattr(old, name)}
    sizes = {**kept, "num_experts_per_tok": top_k, "sliding_window": None, "output_router_logits": True}
    if isinstance(model, LlamaForCausalLM):
        _refuse(old, "attention_bias", "mlp_bias")
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=num_experts))
    if isinstance(model, Qwen3ForCausalLM):
        _refuse(old, "use_sliding_window")
        config = Qwen3MoeConfig(
            **sizes,
            num_experts=num_experts,
            moe_intermediate_size=old.intermediate_size,
            attention_bias=old.attention_bias,
            norm_topk_prob=True,
        )
        return Qwen3MoeForCausalLM(config)
    if any(".experts." in name for name, _ in model.named_parameters()):
        raise MoeConfigError(
            f"{type(model).__name__} has experts already; train it as it is, in a recipe with moe.num_experts: null"
        )
    raise MoeConfigError(
        f"{type(model).__name__} cannot be upcycled; take a LlamaForCausalLM (SmolLM2 is one) or a Qwen3ForCausalLM"
    )


def _refuse(config: Any, *flags: str) -> None:
    for flag in flags:
        if getattr(config, flag, False):
            raise MoeConfigError(f"the dense model has {flag}=True, which its MoE relative has no place for")


def _mlp_part(name: str) -> bool:
    return any(f".mlp.{part}." in name for part in _MLP)


def _experts_of(model: PreTrainedModel, layer: int, num_experts: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}.mlp"
    gate, up, down = (model.get_parameter(f"{prefix}.{part}.weight").detach() for part in _MLP)
    stacks = {"gate_up_proj": torch.cat([gate, up]), "down_proj": down}
    return {f"{prefix}.experts.{name}": one.expand(num_experts, *one.shape) for name, one in stacks.items()}
