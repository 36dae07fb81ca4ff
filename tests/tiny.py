"""Tiny transformers models, sequences and chunks by hand, for exactness tests in fp64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as Seq
from itertools import accumulate

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from chunkflow.collate import collate
from chunkflow.records import Chunk, Segment
from chunkflow.sources import Sample
from chunkflow.sources_memory import MemorySource

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "head_dim": 8,
    "sliding_window": None,
}
_FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "mistral": (MistralForCausalLM, MistralConfig),
}


def tiny_model(family: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    """Make a two-layer random model with grouped-query attention; the same weights every time."""
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = GPT2Config(**{**sizes, **changes})
        return GPT2LMHeadModel(config).to(dtype)
    kind, config_kind = _FAMILIES[family]
    return kind(config_kind(**{**_SIZES, **changes})).to(dtype)


def sequence(sample: int, length: int) -> Sample:
    """Make a random sequence whose loss weights are uneven and here and there zero."""
    rng = np.random.default_rng(sample)
    ids = rng.integers(0, VOCABULARY, length)
    weights = rng.random(length, dtype=np.float32)
    weights[-1], weights[::5] = 0, 0
    return Sample(ids, np.append(ids[1:], -100), weights)


def chunk(
    sequences: dict[int, Sample],
    cuts: Seq[tuple[int, int, int]],
    group: int | None = None,
    index: int = 0,
    count: int = 1,
) -> Chunk:
    """Make a loaded chunk from (sample, start, length) cuts; samples are numbered from 0."""
    offsets = accumulate((length for _, _, length in cuts), initial=0)
    segments = tuple(Segment(*cut, offset) for cut, offset in zip(cuts, offsets, strict=False))
    source = MemorySource([sequences[i] for i in range(len(sequences))])
    return collate([Chunk(segments, group, index, count)], source)[0]


def group_of(
    sequences: dict[int, Sample], sample: int, chunk_tokens: int, group: int, tail: Seq[tuple[int, int, int]] = ()
) -> list[Chunk]:
    """Cut one long sequence into its dependent chunks, the `tail` packed behind the last."""
    length = len(sequences[sample].input_ids)
    count = math.ceil(length / chunk_tokens)
    starts = [i * chunk_tokens for i in range(count)]
    cuts = [[(sample, s, min(chunk_tokens, length - s))] for s in starts]
    cuts[-1] += list(tail)
    return [chunk(sequences, c, group, i, count) for i, c in enumerate(cuts)]


def relative_errors(model: PreTrainedModel, reference: PreTrainedModel) -> dict[str, float]:
    """Return for every parameter the largest gradient error, relative to the largest gradient."""
    errors = {}
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        errors[name] = float((p.grad - q.grad).abs().max() / q.grad.abs().max())
    return errors


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, without gradients."""
    copied = copy.deepcopy(model)
    copied.zero_grad(set_to_none=True)
    return copied
