"""The slow oracle: every sequence whole, alone, through transformers' own attention.

L tokens of a sequence, V vocabulary

Shares nothing with the chunked path but the model and, under attention dropout, the rule that gives the mask of a
(query, key) pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

from chunkflow.attention.dropout import AttentionDropout
from chunkflow.attention.interface import attention_of

REFERENCE = "chunkflow_reference"
"""Name in transformers' `AttentionInterface` of softmax attention written out, with our dropout masks."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sample: `input_ids`, `shift_labels` int64 [L], `loss_weights` [L]; `sample` keys its dropout masks."""

    sample: int
    input_ids: Tensor
    shift_labels: Tensor
    loss_weights: Tensor


def full_sequence_step(
    model: PreTrainedModel, sequences: list[Sequence], *, denominator: float, dropout_seed: int | None = None
) -> Tensor:
    """Run forward and backward of every sequence whole; add to `.grad`; return the mean loss, fp64, detached.

    With `dropout_seed`, attention dropout uses the masks a `StepExecutor` draws with that seed.
    """
    total = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        loss = _sum_of_losses(model, sequence, dropout_seed) / denominator
        loss.backward()
        total += loss.detach().double().cpu()
    return total


def _sum_of_losses(model: PreTrainedModel, sequence: Sequence, dropout_seed: int | None) -> Tensor:
    extra: dict[str, Any] = {}
    if dropout_seed is not None:
        extra["reference_dropout"] = (dropout_seed, sequence.sample)
    positions = torch.arange(len(sequence.input_ids), device=sequence.input_ids.device)
    with attention_of(model, "sdpa" if dropout_seed is None else REFERENCE):
        output = model(input_ids=sequence.input_ids[None], position_ids=positions[None], use_cache=False, **extra)
    logits = output.logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, sequence.shift_labels, ignore_index=-100, reduction="none")
    return (losses * sequence.loss_weights.to(losses.dtype)).sum()


def reference_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    reference_dropout: tuple[int, int] = (0, 0),
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention as the textbook has it: query [1, H, L, D], key and value [1, Hk, L, D] -> [1, L, H, D]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0)
    scores = query[0] @ key.transpose(1, 2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    if dropout:
        layer = module.layer_idx
        assert isinstance(layer, int)
        seed, sample = reference_dropout
        masks = AttentionDropout(dropout, seed, sample, layer)
        probabilities = probabilities * masks.keep(query.shape[1], 0, length, 0, length, probabilities)
    return (probabilities @ value).transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(REFERENCE, reference_attention)


class _KeepFloat64(TorchFunctionMode):
    """Turns fp64 -> fp32 casts into nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return args[0]
        return func(*args, **kwargs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Run an fp64 model in fp64 even where its code casts to fp32 inside (norms, RoPE), for comparisons to 1e-10."""
    with _KeepFloat64():
        yield
