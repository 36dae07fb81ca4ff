"""Which models can be trained in chunks exactly; the others are refused, by layer and reason.

Two lines of defence. The configuration is read for what would go wrong only on long sequences (RoPE whose frequencies
follow the length, chunked attention, layers without attention). Then a few tokens are run whole and in chunks
(`chunkflow.probe`).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from chunkflow.autocast import without_weight_cache
from chunkflow.engine import Engine, WholeParameters
from chunkflow.errors import UnsupportedModelError
from chunkflow.parts import CausalParts, parts_of, require_whole_head
from chunkflow.probe import probe

FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""RoPE types whose frequencies do not depend on the positions in the call."""

_REFUSED_CONFIG = {
    "attention_chunk_size": "attention in chunks of its own would not see our prefix",
    "layerdrop": "a layer that is skipped for one chunk has no keys and values for the next; set it to 0",
    "decoder_layerdrop": "a layer that is skipped for one chunk has no keys and values for the next; set it to 0",
    "output_router_logits": "the router's auxiliary loss is not a sum over tokens; set it to false in the config",
}
"""Settings that would make chunks another model, and why."""


EXACT_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers, as configurations name them, that chunks train exactly."""


def require_exact(model: PreTrainedModel, engine: Engine) -> CausalParts:
    """Return the parts of a model that chunks train exactly; raise UnsupportedModelError for any other.

    Every rank that shares parameters calls.
    """
    parts = parts_of(model, engine)
    if isinstance(engine, WholeParameters):
        require_whole_head(parts)
    _check_config(parts)
    with without_weight_cache(parts.device), engine.scoring():
        probe(parts)
    return parts


def _check_config(parts: CausalParts) -> None:
    config = parts.model.config.get_text_config()
    for name, module in parts.base.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind is not None and kind not in FIXED_ROPE:
                raise UnsupportedModelError(
                    f"{parts.model.base_model_prefix}.{name}: RoPE type {kind!r} changes its frequencies with the "
                    "positions in the call, so chunks would see other ones than the whole sequence"
                )
    kinds = getattr(config, "layer_types", None) or []
    for (name, layer), kind in zip(parts.layers.items(), kinds, strict=False):
        if kind not in EXACT_LAYERS:
            raise UnsupportedModelError(f"{name} ({type(layer).__name__}): layer type {kind!r} is not exact in chunks")
    for feature, why in _REFUSED_CONFIG.items():
        if getattr(config, feature, None):
            first = next(iter(parts.layers))
            raise UnsupportedModelError(f"{first}: config.{feature} = {getattr(config, feature)!r}: {why}")
