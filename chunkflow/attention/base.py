"""The seam between attention over chunks and the kernels that compute one tile of it.

Hk key/value heads, G query heads per key/value head, n queries, m keys, D head width

Attention of a span is made of tiles (`chunkflow.attention.tiles`), which are merged by log-sum-exp, so no more than a
tile is ever in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chunkflow.attention.dropout import AttentionDropout
from chunkflow.attention.tiles import Tile
from chunkflow.state import GroupState


@dataclass(frozen=True, slots=True)
class Span:
    """The queries `start .. start + length` of a chunk, and the tokens of their sequence before them."""

    start: int
    length: int
    prefix: int
    sample: int


class ChunkView:
    """What attention has to know about the chunk that is running; handed to the model as a keyword argument.

    `state` is that of the group whose tokens are the first span; None for a standalone chunk. No dataclass: FSDP2 looks
    into those among a layer's arguments, for tensors to cast, and copies them.
    """

    __slots__ = ("dropout_seed", "spans", "state")

    def __init__(self, spans: tuple[Span, ...], state: GroupState | None = None, dropout_seed: int = 0) -> None:
        self.spans, self.state, self.dropout_seed = spans, state, dropout_seed


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores become probabilities, the same in every tile of a layer and span."""

    scale: float
    softcap: float | None = None
    """Scores are replaced by softcap * tanh(scores / softcap)."""
    dropout: AttentionDropout | None = None


class Backend(Protocol):
    """Computes one tile, of any kind that `tiles_of` gives.

    q, out: [Hk, G, n, D]; k, v: [Hk, m, D]; lse: [Hk, G, n], natural log, fp32 or wider.
    """

    causal_rows: int | None
    """Queries of a causal tile at most: where a kernel computes pairs that the mask hides, several are faster."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, how: Scoring) -> tuple[Tensor, Tensor]:
        """Return out and lse of these keys alone."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: Tile, how: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv of this tile, given out and lse merged over *all* tiles of these queries."""
        ...


def merge(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial softmax results over disjoint keys; out is updated in place."""
    merged = torch.logaddexp(lse, tile_lse)
    out.mul_((lse - merged).exp_().unsqueeze(-1))
    out.addcmul_(tile_out.to(out.dtype), (tile_lse - merged).exp_().unsqueeze(-1).to(out.dtype))
    return out, merged


def hidden_pairs(tile: Tile, device: torch.device) -> Tensor | None:
    """Return bool [n, m], true where the query may not see the key; None where it sees all."""
    if not tile.causal and tile.window is None:
        return None
    rows = torch.arange(tile.query_start, tile.query_stop, device=device).unsqueeze(-1)
    columns = torch.arange(tile.key_start, tile.key_stop, device=device)
    hidden = columns > rows if tile.causal else torch.zeros_like(columns > rows)
    return hidden if tile.window is None else hidden | (columns <= rows - tile.window)
