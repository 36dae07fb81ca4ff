"""Attention of one span of a chunk over itself and the prefix of its sequence: tiles, merged.

Hk key/value heads, G query heads per key/value head, n queries of the span, D head width

The prefix is read from the group's state in forward and again in backward. The gradient that a span sends to its prefix
goes to the state, and the gradient that later chunks sent to this one comes from there: that route is what makes the
chunks exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunkflow.attention.base import Backend, Span, Tile, merge, prefix_blocks
from chunkflow.attention.dropout import AttentionDropout
from chunkflow.state import GroupState


@dataclass(frozen=True, slots=True)
class SpanAttention:
    """One span, in one layer. q, dout, out: [Hk, G, n, D]; k, v (the span's own): [Hk, n, D]; lse: [Hk, G, n]."""

    backend: Backend
    span: Span
    state: GroupState | None
    """State of the span's group; None for a whole short sequence."""
    layer: int
    scale: float
    dropout: AttentionDropout | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v for later chunks; return out and lse over the span and its prefix."""
        if self.state is not None:
            self.state.write(self.layer, self.span.prefix, k, v)
        out, lse = self.backend.forward(q, k, v, tile=self._own_tile(), scale=self.scale)
        if self.state is not None and self.span.prefix:
            out = out.to(lse.dtype)
            for start, stop in prefix_blocks(self.span.prefix):
                keys, values = self.state.read(self.layer, start, stop)
                part = self.backend.forward(q, keys, values, tile=self._prefix_tile(start), scale=self.scale)
                out, lse = merge(out, lse, *part)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv, with what all later chunks sent to dk and dv; those have run backward before."""
        dq, dk, dv = self.backend.backward(dout, q, k, v, out, lse, tile=self._own_tile(), scale=self.scale)
        if self.state is None:
            return dq, dk, dv
        dq = dq.to(lse.dtype)
        for start, stop in prefix_blocks(self.span.prefix):
            keys, values = self.state.read(self.layer, start, stop)
            tile = self._prefix_tile(start)
            part = self.backend.backward(dout, q, keys, values, out, lse, tile=tile, scale=self.scale)
            dq += part[0]
            self.state.add_gradient(self.layer, start, part[1], part[2])
        later = self.state.gradient(self.layer, self.span.prefix, self.span.length)
        return (dq, dk, dv) if later is None else (dq, dk + later[0], dv + later[1])

    def _own_tile(self) -> Tile:
        return Tile(self.span.prefix, self.span.prefix, causal=True, dropout=self.dropout)

    def _prefix_tile(self, start: int) -> Tile:
        return Tile(self.span.prefix, start, causal=False, dropout=self.dropout)
