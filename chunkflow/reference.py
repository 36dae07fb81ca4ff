"""The slow oracle: every sequence whole, alone, through transformers' own attention.

L tokens of a sequence, V vocabulary

Shares nothing with the chunked path but the model and, under attention dropout, the rule that gives the mask of a
(query, key) pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

from chunkflow.attention.dropout import AttentionDropout
from chunkflow.attention.interface import attention_of
from chunkflow.sources import NO_TARGET, Sample

REFERENCE = "chunkflow_reference"
"""Name in transformers' `AttentionInterface` of softmax attention written out, with our dropout masks."""


def full_sequence_step(
    model: PreTrainedModel,
    samples: Mapping[int, Sample],
    *,
    denominator: float,
    dropout_seed: int | None = None,
    attention: str = "sdpa",
) -> Tensor:
    """Run forward and backward of every sample whole; add to `.grad`; return the mean loss, fp64, detached.

    `samples` maps their numbers, which key the dropout masks, to the samples. With `dropout_seed`, attention dropout
    uses the masks that a `StepExecutor` draws with that seed. Otherwise it is transformers' `attention`; its "eager" is
    the one that knows windows, caps and sinks.
    """
    total = torch.zeros((), dtype=torch.float64)
    for number, sample in samples.items():
        dropout = None if dropout_seed is None else (dropout_seed, number)
        loss = _sum_of_losses(model, sample, dropout, attention) / denominator
        loss.backward()
        total += loss.detach().double().cpu()
    return total


def _sum_of_losses(model: PreTrainedModel, sample: Sample, dropout: tuple[int, int] | None, attention: str) -> Tensor:
    ids, labels, weights = (
        torch.as_tensor(x, device=model.device) for x in (sample.input_ids, sample.shift_labels, sample.loss_weights)
    )
    positions = torch.arange(len(ids), device=model.device)
    with attention_of(model, attention if dropout is None else REFERENCE):
        extra = {} if dropout is None else {"reference_dropout": dropout}
        logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **extra).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, labels, ignore_index=NO_TARGET, reduction="none")
    return (losses * weights.to(losses.dtype)).sum()


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
        kwargs = dict(kwargs or {})
        if func is torch.full and isinstance(args[1], float) and abs(args[1]) > torch.finfo(torch.float32).max:
            kwargs.setdefault("dtype", torch.float64)
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type) and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return args[0]
            if func in (torch.softmax, Tensor.softmax, nn.functional.softmax) and kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Run an fp64 model in fp64 even where its code casts to fp32 inside (norms, RoPE, softmax).

    For comparisons to 1e-10.
    """
    with _KeepFloat64():
        yield
