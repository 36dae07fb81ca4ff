"""Attention of one span of a chunk over itself and the prefix of its sequence: tiles, merged.

Hk key/value heads, G query heads per key/value head, n queries of the span, D head width

The prefix is read from the group's state in forward and again in backward. The gradient that a span sends to its prefix
goes to the state, and the gradient that later chunks sent to this one comes from there: that route is what makes the
chunks exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkflow.attention.base import Backend, Scoring, Span, merge
from chunkflow.attention.tiles import Tile, tiles_of
from chunkflow.state import GroupState


@dataclass(frozen=True, slots=True)
class SpanAttention:
    """One span, in one layer. q, dout, out: [Hk, G, n, D]; k, v (the span's own): [Hk, n, D]; lse: [Hk, G, n]."""

    backend: Backend
    span: Span
    state: GroupState | None
    """State of the span's group; None for a whole short sequence."""
    layer: int
    how: Scoring
    window: int | None = None
    """How many tokens each query sees, itself included; None for all before it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v for later chunks; return out and lse over the span and its prefix."""
        if self.state is not None:
            self.state.write(self.layer, self.span.prefix, k, v)
        tiles = list(self._tiles())
        if len(tiles) == 1:
            return self.backend.forward(q, k, v, tile=tiles[0], how=self.how)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=wide)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        for tile in tiles:
            rows = self._rows(tile)
            part = self.backend.forward(q[:, :, rows], *self._keys(tile, k, v), tile=tile, how=self.how)
            if tile.causal:  # the first tile of these queries
                out[:, :, rows], lse[:, :, rows] = part
            else:
                _, lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], *part)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv, with what all later chunks sent to dk and dv; those have run backward before."""
        tiles = list(self._tiles())
        if len(tiles) == 1:
            dq, dk, dv = self.backend.backward(dout, q, k, v, out, lse, tile=tiles[0], how=self.how)
        else:
            dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
            for tile in tiles:
                self._add_tile(tile, (dq, dk, dv), dout, q, k, v, out, lse)
        if self.state is None:
            return dq, dk, dv
        later = self.state.gradient(self.layer, self.span.prefix, self.span.length, dk.device)
        return (dq, dk, dv) if later is None else (dq, dk + later[0], dv + later[1])

    def _add_tile(
        self, tile: Tile, grads: tuple[Tensor, Tensor, Tensor], dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
        out: Tensor, lse: Tensor,
    ) -> None:  # fmt: skip
        """Run one tile's backward; add it to the gradients, and to those of the prefix."""
        rows = self._rows(tile)
        keys, values = self._keys(tile, k, v)
        dout, q, out, lse = (x[:, :, rows] for x in (dout, q, out, lse))
        dq, dk, dv = self.backend.backward(dout, q, keys, values, out, lse, tile=tile, how=self.how)
        grads[0][:, :, rows] += dq
        if tile.key_start < self.span.prefix:
            assert self.state is not None
            self.state.add_gradient(self.layer, tile.key_start, dk, dv)
        else:
            columns = slice(tile.key_start - self.span.prefix, tile.key_stop - self.span.prefix)
            grads[1][:, columns] += dk
            grads[2][:, columns] += dv

    def _tiles(self) -> Iterator[Tile]:
        return tiles_of(self.span.prefix, self.span.length, self.window, self.backend.causal_rows)

    def _rows(self, tile: Tile) -> slice:
        return slice(tile.query_start - self.span.prefix, tile.query_stop - self.span.prefix)

    def _keys(self, tile: Tile, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a tile: the span's own, or the prefix's."""
        if tile.key_start < self.span.prefix:
            assert self.state is not None
            return self.state.read(self.layer, tile.key_start, tile.key_stop, k.device)
        columns = slice(tile.key_start - self.span.prefix, tile.key_stop - self.span.prefix)
        return k[:, columns], v[:, columns]
