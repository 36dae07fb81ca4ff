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

from chunkflow.attention.base import Backend, ChunkView, Scoring
from chunkflow.attention.dropout import AttentionDropout
from chunkflow.attention.flash_cpu import FlashCpu
from chunkflow.attention.flash_cuda import FlashCuda, can_run
from chunkflow.attention.flash_package import FlashPackage, kernels
from chunkflow.attention.masked import Masked
from chunkflow.attention.span import SpanAttention


def choose_backend(
    device: torch.device, dtype: torch.dtype, width: int, *, plain: bool, capped: bool = False
) -> Backend:
    """Return the fastest backend of a device that can do what a layer asks for, heads of this width.

    `plain`: no dropout, and values as wide as keys, which is all that fast kernels can do. `capped`: a cap on scores,
    which torch's own kernels do not know.
    """
    if plain and not capped and device.type == "cpu":
        return FlashCpu()
    if not plain or not can_run(device, dtype, width):
        return Masked()
    if not capped:
        return FlashCuda()
    package = kernels()
    return Masked() if package is None else FlashPackage(package)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One attention layer running one chunk."""

    view: ChunkView
    layer: int
    scale: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    widths_differ: bool = False
    """Whether values are wider or narrower than keys."""

    def spans(self, q: Tensor) -> Iterator[tuple[slice, SpanAttention]]:
        """Yield each span of the chunk: where its rows are, and its attention."""
        plain = not (self.dropout or self.widths_differ)
        backend = choose_backend(q.device, q.dtype, q.shape[-1], plain=plain, capped=bool(self.softcap))
        for number, span in enumerate(self.view.spans):
            state = self.view.state if number == 0 else None
            drop = None
            if self.dropout:
                drop = AttentionDropout(self.dropout, self.view.dropout_seed, span.sample, self.layer)
            rows = slice(span.start, span.start + span.length)
            how = Scoring(self.scale, self.softcap, drop)
            yield rows, SpanAttention(backend, span, state, self.layer, how, self.window)


class ChunkAttention(torch.autograd.Function):
    """q [H, T, D], k and v [Hk, T, D] of a chunk, sinks [H] or None -> [H, T, D].

    A sink is a score without a value that takes its part of each query's softmax.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: LayerCall) -> Tensor:
        """Attend span by span."""
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        q_, out_, lse_ = (_by_key_head(x, k) for x in (q, out, lse))
        for rows, attention in call.spans(q):
            part, part_lse = attention.forward(q_[:, :, rows], k[:, rows], v[:, rows])
            if sinks is not None:
                part, part_lse = _with_sinks(part, part_lse, _by_key_head(sinks, k))
            out_[:, :, rows], lse_[:, :, rows] = part, part_lse
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Backward span by span; no order among the spans of a chunk matters."""
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dout_, q_, out_, lse_, dq_ = (_by_key_head(x, k) for x in (grads[0], q, out, lse, dq))
        for rows, attention in ctx.call.spans(q):
            dq_[:, :, rows], dk[:, rows], dv[:, rows] = attention.backward(
                dout_[:, :, rows], q_[:, :, rows], k[:, rows], v[:, rows], out_[:, :, rows], lse_[:, :, rows]
            )
        return dq, dk, dv, None if sinks is None else _sink_gradient(grads[0], out, lse, sinks), None


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Let sinks [Hk, G] take their part of the softmax of out [Hk, G, n, D] and lse [Hk, G, n]."""
    merged = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(-1))
    return out * (lse - merged).exp().unsqueeze(-1), merged


def _sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return d(sinks) [H]: a sink's probability times (0 - sum(dout * out)), over all queries."""
    taken = (sinks.to(lse.dtype).unsqueeze(-1) - lse).exp()
    return -(taken * (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum(-1).to(sinks.dtype)


def _by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """View x [H, ...] as [Hk, G, ...]; query head h reads key head h // G."""
    return x.unflatten(0, (k.shape[0], x.shape[0] // k.shape[0]))
