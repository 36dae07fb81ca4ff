"""Our attention as transformers sees it: registered by name, and switched on for the length of a call.

H query heads, Hk key/value heads, T tokens of the chunk, D head width
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from chunkflow.attention.base import ChunkView
from chunkflow.attention.function import ChunkAttention, LayerCall
from chunkflow.errors import UnsupportedModelError

NAME = "chunkflow"
"""Our name in transformers' `AttentionInterface`."""


@torch.compiler.disable
def chunk_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    chunk_view: ChunkView | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """Attend query [1, H, T, D] to key and value [1, Hk, T, D] and the state in `chunk_view`; return [1, T, H, D]."""
    layer = getattr(module, "layer_idx", None)
    name = f"attention layer {layer} ({type(module).__name__})"
    if chunk_view is None:
        raise UnsupportedModelError(
            f"{name} was not told about the chunk; the model does not pass keyword arguments on"
        )
    if layer is None:
        raise UnsupportedModelError(f"{name} has no layer_idx, so its keys and values could not be kept apart")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name} got an attention mask; chunks carry their own borders, drop the mask")
    if features.get("position_bias") is not None:
        raise UnsupportedModelError(f"{name} uses position_bias, which is not trained exactly in chunks yet")
    if torch.is_autocast_enabled(query.device.type):
        narrow = torch.get_autocast_dtype(query.device.type)  # as autocast has it for scaled_dot_product_attention
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    if not query.dtype == key.dtype == value.dtype:
        raise UnsupportedModelError(
            f"{name} got queries in {query.dtype}, keys in {key.dtype} and values in {value.dtype}; they must be of "
            "one dtype: convert the whole model, for example model.to(torch.bfloat16)"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    widths_differ = query.shape[-1] != value.shape[-1]
    call = LayerCall(chunk_view, layer, scale, dropout, sliding_window, softcap, widths_differ)
    out = ChunkAttention.apply(query[0], key[0], value[0], s_aux, call)
    assert isinstance(out, Tensor)
    # Contiguous, as transformers' own give it: some models view what they get.
    return out.transpose(0, 1).contiguous().unsqueeze(0), None


AttentionInterface.register(NAME, chunk_attention)


@contextmanager
def attention_of(model: nn.Module, name: str = NAME) -> Iterator[None]:
    """Switch every submodel to the attention called `name`, and back: outside, the model is the user's as it was."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
