"""Chunks as keyword arguments of a transformers model, for training loops that know nothing of chunks.

The names are those of transformers' `TransformersKwargs`. `position_ids` that start again tell its masks where a
segment starts, and the `cu_seq_lens_*` tell its flash attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkflow.errors import PlanError
from chunkflow.records import Chunk
from chunkflow.sources import NO_TARGET, Source


def check_packable(source: Source, chunk_tokens: int) -> None:
    """Raise PlanError when a sample would have to be split: a plain model cannot attend to an earlier chunk."""
    if getattr(source, "open_ended", False):
        raise PlanError(
            "packed() cannot train the target across a cut of overflow=split_independent, since plain models shift "
            "labels themselves; choose overflow=truncate or drop, or train with ChunkRunner"
        )
    longest = int(np.argmax(source.lengths))
    length = int(source.lengths[longest])
    if length > chunk_tokens:
        raise PlanError(
            f"packed() cannot split, and sample {longest} has {length} tokens for chunks of {chunk_tokens}; raise "
            f"chunk_tokens to {length}, select shorter samples, or train with ChunkRunner, which splits exactly"
        )


def packed_step(step: int, chunks: Sequence[Chunk], *, count: int, denominator: float) -> list[dict[str, Any]]:
    """Return `count` micro-batches: the chunks, and behind them single tokens without a target."""
    packed = [_packed(step, chunk, denominator) for chunk in chunks]
    return packed + [_empty(denominator) for _ in range(count - len(packed))]


def _packed(step: int, chunk: Chunk, denominator: float) -> dict[str, Any]:
    tensors = chunk.tensors()
    weights = tensors["loss_weights"]
    if not bool(((weights == 0) | (weights == 1)).all()):
        raise PlanError(
            f"packed() cannot express the loss weights of step {step}, samples {[s.sample for s in chunk.segments]}: a "
            "transformers loss knows only 0 and 1; train with ChunkRunner, which weighs each target"
        )
    shift_labels = tensors["shift_labels"].masked_fill(weights == 0, NO_TARGET)
    longest = max(segment.length for segment in chunk.segments)
    return _kwargs(
        tensors["input_ids"], tensors["position_ids"], shift_labels, tensors["cu_seqlens_q"], longest, denominator
    )


def _empty(denominator: float) -> dict[str, Any]:
    zero = torch.zeros((1, 1), dtype=torch.int64)
    return _kwargs(zero, zero, zero + NO_TARGET, torch.tensor([0, 1], dtype=torch.int32), 1, denominator)


def _kwargs(
    input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor, cu_seq_lens: Tensor, longest: int, denominator: float
) -> dict[str, Any]:
    # Models compute a loss only when given `labels`. A loss that heeds shift_labels ignores them; for one that does not
    # they are the same targets, one place later. Each segment ends without a target, so none crosses a border.
    labels = torch.nn.functional.pad(shift_labels[:, :-1], (1, 0), value=NO_TARGET)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": labels,
        "shift_labels": shift_labels,
        "num_items_in_batch": torch.tensor(denominator),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        # With a cache, transformers does not look at position_ids and lets segments see each other.
        "use_cache": False,
    }
