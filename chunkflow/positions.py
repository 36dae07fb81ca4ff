"""Samples that go on where a model's positions end: computed ones have no end, but were trained only so far."""

from __future__ import annotations

from typing import Any

from chunkflow.layout import Ints


def beyond_positions(lengths: Ints, model: Any) -> str | None:
    """Return one line about sequences int64 [N] with more tokens than a model's `max_position_embeddings`; or None."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or int(lengths.max()) <= limit:
        return None
    return (
        f"{int((lengths > limit).sum())} of {len(lengths)} samples have more tokens than the model's {limit} positions "
        f"(max_position_embeddings), the longest {int(lengths.max())}: they are trained whole, at positions that the "
        "model may not have seen; scale its RoPE, or leave them out, if that is not meant"
    )
