"""A GPTModel of Megatron-core as the model of a job: our chunks, loader and checkpoints, data parallel.

Layers are Megatron's local spec with chunkflow's core attention; positions are learned, embeddings tied.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from launch.config import ModelConfig
from launch.errors import ConfigError
from launch.partial import tensors_of


def build_gpt(config: ModelConfig, device: torch.device) -> nn.Module:
    """Return the model on its device, in training mode; weights come from torch's seed, drawn on the CPU.

    Every rank calls, inside the default process group: Megatron makes its groups of it. Raises ConfigError where
    Megatron-core is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about what else could be installed
            from megatron.core import parallel_state
            from megatron.core.models.gpt import GPTModel
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

            from chunkflow.adapters.megatron import chunked

            settings, spec = _settings(config), chunked(get_gpt_layer_local_spec())
    except ImportError as error:
        raise ConfigError(
            "model.library is megatron, and megatron-core cannot be imported: pip install 'longrail[megatron]' "
            f"({error})"
        ) from error
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    model = GPTModel(
        settings,
        spec,
        config.vocab_size,
        config.max_positions,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )
    return model.to(device).train()


def export_gpt(model: nn.Module, folder: Path) -> None:
    """Write the weights under Megatron's names, and the sizes that make the model they belong to."""
    # Copies: safetensors wants memory of its own for each.
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors_of(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    gpt: Any = model
    sizes = {name: getattr(gpt.config, name) for name in _SIZES.values()}
    sizes |= {"vocab_size": gpt.vocab_size, "max_sequence_length": gpt.max_sequence_length}
    (folder / "gpt_model.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups",
    "intermediate_size": "ffn_hidden_size",
}
"""Our settings, and Megatron's names for them."""


def _settings(config: ModelConfig) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        use_cpu_initialization=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=torch.float32,
    )
