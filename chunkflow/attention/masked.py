"""Tiles by plain matrix products, any device and dtype, with dropout. Slow, and simple enough to be believed.

Hk key/value heads, G query heads per key/value head, n queries, m keys, D head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow.attention.base import Scoring, hidden_pairs
from chunkflow.attention.tiles import Tile


class Masked:
    """`Backend` in plain torch. Sums are made in fp32 or wider."""

    causal_rows: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, how: Scoring) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        q_, k_, v_ = _widen(q, k, v)
        scores, _ = _scores(q_, k_, tile, how)
        lse = torch.logsumexp(scores, dim=-1)
        p = (scores - lse.unsqueeze(-1)).exp()
        keep = _keep(p, tile, how)
        out = torch.einsum("hgnm,hmd->hgnd", p if keep is None else p * keep, v_)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: Tile, how: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        dout, out, q, k, v = _widen(dout, out, q, k, v)
        scores, slope = _scores(q, k, tile, how)
        p = (scores - lse.unsqueeze(-1)).exp()
        keep = _keep(p, tile, how)
        dv = torch.einsum("hgnm,hgnd->hmd", p if keep is None else p * keep, dout)
        dp = torch.einsum("hgnd,hmd->hgnm", dout, v)
        if keep is not None:
            dp = dp * keep
        # The softmax is normalised before dropout, and sum(p * dp) over all tiles is sum(dout * out).
        ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * how.scale
        ds = ds if slope is None else ds * slope
        return torch.einsum("hgnm,hmd->hgnd", ds, k), torch.einsum("hgnm,hgnd->hmd", ds, q), dv


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def _scores(q: Tensor, k: Tensor, tile: Tile, how: Scoring) -> tuple[Tensor, Tensor | None]:
    """Return scores [Hk, G, n, m], -inf where hidden; and d(capped score)/d(score) where there is a cap."""
    scores, slope = torch.einsum("hgnd,hmd->hgnm", q, k) * how.scale, None
    if how.softcap is not None:
        capped = torch.tanh(scores / how.softcap)
        scores, slope = capped * how.softcap, 1 - capped.square()
    hidden = hidden_pairs(tile, q.device)
    return (scores if hidden is None else scores.masked_fill(hidden, float("-inf"))), slope


def _keep(p: Tensor, tile: Tile, how: Scoring) -> Tensor | None:
    if how.dropout is None:
        return None
    kv_heads, per_kv, queries, keys = p.shape
    keep = how.dropout.keep(kv_heads * per_kv, tile.query_start, queries, tile.key_start, keys, p)
    return keep.view(p.shape)
