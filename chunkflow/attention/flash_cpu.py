"""Tiles by torch's flash attention for CPU, any float dtype; no dropout, no cap on scores.

Hk key/value heads, G query heads per key/value head, n queries, m keys, D head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow.attention.base import Scoring, hidden_pairs
from chunkflow.attention.tiles import Tile

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlashCpu:
    """`Backend` over the pair of aten operators, which give out and lse and take the merged ones back."""

    causal_rows: int | None = 128
    """The kernel computes all pairs of 512 keys with every block of queries, those that a causal mask hides too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, how: Scoring) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        causal, mask = _mask(q, tile)
        out, lse = _forward(_fold(q, tile), *_fold_keys(q, k, v, tile), 0.0, causal, attn_mask=mask, scale=how.scale)
        return _unfold(out, q, tile), _unfold(lse, q, tile)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: Tile, how: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        if dout.stride(-1) != 1:  # a broadcast gradient, which the kernel would misread
            dout = dout.contiguous()
        causal, mask = _mask(q, tile)
        dq, dk, dv = _backward(
            _fold(dout, tile),
            _fold(q, tile),
            *_fold_keys(q, k, v, tile),
            _fold(out, tile),
            _fold(lse, tile),
            0.0,
            causal,
            attn_mask=mask,
            scale=how.scale,
        )
        return _unfold(dq, q, tile), dk.sum(0), dv.sum(0)


def _mask(q: Tensor, tile: Tile) -> tuple[bool, Tensor | None]:
    """Return whether the kernel's own causal mask is enough, and else the mask [n, m] to add to the scores."""
    hidden = None if tile.window is None else hidden_pairs(tile, q.device)
    if hidden is None:
        return tile.causal, None
    return False, torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, float("-inf"))


def _by_position(tile: Tile) -> bool:
    """Whether query i has to meet key i, so that queries of several heads cannot be put one behind another."""
    return tile.causal or tile.window is not None


def _fold(x: Tensor, tile: Tile) -> Tensor:
    """Lay the G query heads where no key has to be repeated.

    Where positions matter the G heads become the batch: [G, Hk, n, ...]. Where everything is visible they become more
    queries of one head: [1, Hk, G * n, ...], and the keys are read once for all of them.
    """
    if _by_position(tile):
        return x.transpose(0, 1)
    return x.reshape(1, x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _fold_keys(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    batch = q.shape[1] if _by_position(tile) else 1
    return k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)


def _unfold(x: Tensor, q: Tensor, tile: Tile) -> Tensor:
    if _by_position(tile):
        return x.transpose(0, 1)
    return x.reshape(*q.shape[:3], *x.shape[3:])
