"""Tiles by plain matrix products, any device and dtype, with dropout. Slow, and simple enough to be believed.

Hk key/value heads, G query heads per key/value head, n queries, m keys, D head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow.attention.base import Tile


class Masked:
    """`Backend` in plain torch. Sums are made in fp32 or wider."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        q_, k_, v_ = _widen(q, k, v)
        scores = _scores(q_, k_, tile, scale)
        lse = torch.logsumexp(scores, dim=-1)
        p = (scores - lse.unsqueeze(-1)).exp()
        keep = _keep(p, tile)
        out = torch.einsum("hgnm,hmd->hgnd", p if keep is None else p * keep, v_)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        dout, out, q, k, v = _widen(dout, out, q, k, v)
        p = (_scores(q, k, tile, scale) - lse.unsqueeze(-1)).exp()
        keep = _keep(p, tile)
        dv = torch.einsum("hgnm,hgnd->hmd", p if keep is None else p * keep, dout)
        dp = torch.einsum("hgnd,hmd->hgnm", dout, v)
        if keep is not None:
            dp = dp * keep
        # The softmax is normalised before dropout, and sum(p * dp) over all tiles is sum(dout * out).
        ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * scale
        return torch.einsum("hgnm,hmd->hgnd", ds, k), torch.einsum("hgnm,hgnd->hmd", ds, q), dv


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def _scores(q: Tensor, k: Tensor, tile: Tile, scale: float) -> Tensor:
    scores = torch.einsum("hgnd,hmd->hgnm", q, k) * scale
    if tile.causal:
        rows = torch.arange(q.shape[2], device=q.device) + tile.query_start
        columns = torch.arange(k.shape[1], device=q.device) + tile.key_start
        scores = scores.masked_fill(columns > rows.unsqueeze(-1), float("-inf"))
    return scores


def _keep(p: Tensor, tile: Tile) -> Tensor | None:
    if tile.dropout is None:
        return None
    kv_heads, per_kv, queries, keys = p.shape
    keep = tile.dropout.keep(kv_heads * per_kv, tile.query_start, queries, tile.key_start, keys, p)
    return keep.view(p.shape)
