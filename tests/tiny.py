"""Tiny transformers models, sequences and chunks by hand, for exactness tests in fp64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as Seq

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

from chunkflow.records import Chunk, Segment
from chunkflow.reference import Sequence

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
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=512, n_embd=32, n_layer=2, n_head=4, **changes)
        return GPT2LMHeadModel(config).to(dtype)
    kind, config_kind = _FAMILIES[family]
    return kind(config_kind(**{**_SIZES, **changes})).to(dtype)


def sequence(sample: int, length: int) -> Sequence:
    """Make a random sequence whose loss weights are uneven and here and there zero."""
    generator = torch.Generator().manual_seed(sample)
    ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
    weights = torch.rand(length, generator=generator)
    weights[-1], weights[::5] = 0, 0
    return Sequence(sample, ids, torch.cat([ids[1:], torch.tensor([-100])]), weights)


def chunk(
    sequences: dict[int, Sequence],
    cuts: Seq[tuple[int, int, int]],
    group: int | None = None,
    index: int = 0,
    count: int = 1,
) -> Chunk:
    """Make a loaded chunk from (sample, start, length) cuts."""
    segments, parts, offset = [], [], 0
    for sample, start, length in cuts:
        segments.append(Segment(sample, start, length, offset))
        offset += length
        s, rows = sequences[sample], slice(start, start + length)
        parts.append(
            (s.input_ids[rows], torch.arange(start, start + length), s.shift_labels[rows], s.loss_weights[rows])
        )
    names = ("input_ids", "position_ids", "shift_labels", "loss_weights")
    payload = {name: torch.cat(column)[None] for name, column in zip(names, zip(*parts, strict=True), strict=True)}
    return Chunk(tuple(segments), group, index, count, payload=payload)


def group_of(
    sequences: dict[int, Sequence], sample: int, chunk_tokens: int, group: int, tail: Seq[tuple[int, int, int]] = ()
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
