"""The flop-and-balance model of `benchmarks.chunkflow`: products of matrices and pairs of attention, nothing else.

R rows, H query heads, Hk key/value heads, D head width

Seconds of a rank are its tokens and pairs times what one takes in the bare kernel, measured in the same processes
before every round, by all ranks at once; those of a step, of its slowest rank. Norms, rotary embeddings, activations,
the loss's softmax, Python and reductions cost nothing in it, so no program reaches it. A second bound has the layers'
time measured from transformers' own code, without its attention: what a program that runs that code cannot go below.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface

from benchmarks.chunkflow_work import Load, Shape, model_of
from chunkflow.attention.interface import attention_of

ROWS = 2048
QUERIES, KEYS = 2048, 2048
SPAN_S = 0.5
"""For which every kernel is repeated: no rank is to find the machine idle because another one is done."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of one token or pair on one rank."""

    layer_forward: float
    """Token through the products of all layers."""
    layer_backward: float
    head: float
    """Token through the output projection and its two gradients."""
    pair_forward: float
    """(query, key), all layers and heads."""
    pair_backward: float
    code_forward: float
    """Token through transformers' layers, everything but attention."""
    code_backward: float

    def code_seconds(self, load: Load) -> float:
        """Predict the time of one rank that runs transformers' layers."""
        layers = self.code_forward * load.forward_tokens + self.code_backward * load.backward_tokens
        return layers + self.seconds(replace(load, forward_tokens=0, backward_tokens=0))

    def seconds(self, load: Load) -> float:
        """Predict the time of one rank."""
        return (
            self.layer_forward * load.forward_tokens
            + self.layer_backward * load.backward_tokens
            + self.head * load.head_tokens
            + self.pair_forward * load.forward_pairs
            + self.pair_backward * load.backward_pairs
        )

    @property
    def pair_cost(self) -> float:
        """For the planner: a pair over the rest of a token."""
        return (self.pair_forward + self.pair_backward) / (self.code_forward + self.code_backward + self.head)


def measure_rates(shape: Shape) -> Rates:
    """Time the bare kernels, each for a while; all ranks must call, so that they share the machine as in a step."""
    return rates_of(model_of(shape, recompute=False))


def rates_of(model: Any, *, rows: int = ROWS) -> Rates:
    """Return the rates of a transformers Llama in training mode, by products of `rows`; all ranks must call."""
    config = model.config
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    products = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden),
                (hidden, inner), (hidden, inner), (inner, hidden)]  # fmt: skip
    times = [_product_s(rows, k, n) for k, n in products]
    head = _product_s(rows, hidden, config.vocab_size)
    forward_s, backward_s = _attention_s(config.num_attention_heads, width)
    code_forward_s, code_backward_s = _code_s(model.model, rows, config.vocab_size)
    pairs, layers = QUERIES * KEYS, config.num_hidden_layers
    return Rates(
        layer_forward=layers * sum(f for f, _ in times) / rows,
        layer_backward=layers * sum(b for _, b in times) / rows,
        head=sum(head) / rows,
        pair_forward=layers * forward_s / pairs,
        pair_backward=layers * backward_s / pairs,
        code_forward=code_forward_s / rows,
        code_backward=code_backward_s / rows,
    )


def _product_s(rows: int, inputs: int, outputs: int) -> tuple[float, float]:
    """Return the seconds of x @ W^T, and of the gradients of both."""
    x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    out, d_x, d_weight = torch.empty(rows, outputs), torch.empty(rows, inputs), torch.empty(outputs, inputs)
    forward = _typical_s(lambda: torch.mm(x, weight.t(), out=out))
    return forward, _typical_s(lambda: (torch.mm(grad, weight, out=d_x), torch.mm(grad.t(), x, out=d_weight)))


def _attention_s(heads: int, width: int) -> tuple[float, float]:
    """Return the seconds of one layer's attention over a square of visible pairs, forward and backward."""
    q, k, v, grad = (torch.randn(1, heads, n, width) for n in (QUERIES, KEYS, KEYS, QUERIES))
    out, lse = _flash(q, k, v, 0.0, False)
    forward = _typical_s(lambda: _flash(q, k, v, 0.0, False))
    return forward, _typical_s(lambda: _flash_backward(grad, q, k, v, out, lse, 0.0, False))


def _no_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Pass queries [1, H, R, D] on as [1, R, H, D], in a way that keys and values [1, Hk, R, D] get gradients too."""
    return (query + (key.mean() + value.mean())).transpose(1, 2), None


AttentionInterface.register("benchmark_no_attention", _no_attention)


def _code_s(model: Any, rows: int, vocabulary: int) -> tuple[float, float]:
    """Return the seconds of transformers' layers without attention, forward and backward; gradients are there."""
    ids = torch.arange(rows).remainder(vocabulary)[None]
    forwards: list[float] = []
    backwards: list[float] = []

    def both() -> None:
        started = time.perf_counter()
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        middle = time.perf_counter()
        hidden.backward(hidden.detach())
        forwards.append(middle - started)
        backwards.append(time.perf_counter() - middle)

    with attention_of(model, "benchmark_no_attention"):
        _typical_s(both)
    return statistics.median(forwards), statistics.median(backwards)


def _typical_s(call: Callable[[], object]) -> float:
    """Return the median time of a call, repeated by every rank for the same while."""
    call()
    if dist.is_initialized():
        dist.barrier()
    times, began = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < SPAN_S:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
