"""Attention of one chunk as one autograd function.

H query heads, Hk key/value heads, G = H / Hk, T tokens of the chunk, n of one span, D head width

Views of the group's state are not saved for backward, since later writes would bump their version counter; the spans
read the prefix again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkflow.attention.base import Backend, ChunkView
from chunkflow.attention.dropout import AttentionDropout
from chunkflow.attention.flash_cpu import FlashCpu
from chunkflow.attention.masked import Masked
from chunkflow.attention.span import SpanAttention


def choose_backend(device: torch.device, dropout: float) -> Backend:
    """Flash on the CPU; plain matrix products where there is dropout (which the flash op refuses) or another device."""
    return FlashCpu() if device.type == "cpu" and dropout == 0 else Masked()


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One attention layer running one chunk."""

    view: ChunkView
    layer: int
    scale: float
    dropout: float

    def spans(self, device: torch.device) -> Iterator[tuple[slice, SpanAttention]]:
        """Yield each span of the chunk: where its rows are, and its attention."""
        backend = choose_backend(device, self.dropout)
        for number, span in enumerate(self.view.spans):
            state = self.view.state if number == 0 else None
            drop = None
            if self.dropout:
                drop = AttentionDropout(self.dropout, self.view.dropout_seed, span.sample, self.layer)
            rows = slice(span.start, span.start + span.length)
            yield rows, SpanAttention(backend, span, state, self.layer, self.scale, drop)


class ChunkAttention(torch.autograd.Function):
    """q [H, T, D], k and v [Hk, T, D] of a chunk -> [H, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        """Attend span by span."""
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        q_, out_, lse_ = (_by_key_head(x, k) for x in (q, out, lse))
        for rows, attention in call.spans(q.device):
            out_[:, :, rows], lse_[:, :, rows] = attention.forward(q_[:, :, rows], k[:, rows], v[:, rows])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Backward span by span; no order among the spans of a chunk matters."""
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dout_, q_, out_, lse_, dq_ = (_by_key_head(x, k) for x in (grads[0], q, out, lse, dq))
        for rows, attention in ctx.call.spans(q.device):
            dq_[:, :, rows], dk[:, rows], dv[:, rows] = attention.backward(
                dout_[:, :, rows], q_[:, :, rows], k[:, rows], v[:, rows], out_[:, :, rows], lse_[:, :, rows]
            )
        return dq, dk, dv, None


def _by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """View x [H, T, ...] as [Hk, G, T, ...]; query head h reads key head h // G."""
    return x.unflatten(0, (k.shape[0], x.shape[0] // k.shape[0]))
