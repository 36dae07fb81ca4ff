"""The seam between attention over chunks and the kernels that compute one tile of it.

Hk key/value heads, G query heads per key/value head, n queries, m keys, D head width

A tile is a run of queries against a run of keys of one sequence: the chunk's own tokens (causal), or a block of what
stands before it (everything visible). Tiles are merged by log-sum-exp, so no more than a tile is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chunkflow.attention.dropout import AttentionDropout
from chunkflow.state import GroupState

PREFIX_BLOCK = 2048
"""Keys in one tile of the prefix; its borders are absolute positions."""


@dataclass(frozen=True, slots=True)
class Span:
    """The queries `start .. start + length` of a chunk, and the tokens of their sequence before them."""

    start: int
    length: int
    prefix: int
    sample: int


@dataclass(frozen=True, slots=True)
class ChunkView:
    """What attention has to know about the chunk that is running; handed to the model as a keyword argument."""

    spans: tuple[Span, ...]
    state: GroupState | None = None
    """State of the group whose tokens are the first span; None for a standalone chunk."""
    dropout_seed: int = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """Where a tile stands: absolute position of its first query and key, and whether later keys are hidden."""

    query_start: int
    key_start: int
    causal: bool
    dropout: AttentionDropout | None = None


class Backend(Protocol):
    """Computes one tile. q, out: [Hk, G, n, D]; k, v: [Hk, m, D]; lse: [Hk, G, n], natural log, fp32 or wider."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        """Return out and lse of these keys alone."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv of this tile, given out and lse merged over *all* tiles of these queries."""
        ...


def prefix_blocks(prefix: int) -> Iterator[tuple[int, int]]:
    """Cut tokens `0 .. prefix` at the absolute block borders."""
    for start in range(0, prefix, PREFIX_BLOCK):
        yield start, min(start + PREFIX_BLOCK, prefix)


def merge(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial softmax results over disjoint keys; out is updated in place."""
    merged = torch.logaddexp(lse, tile_lse)
    out.mul_((lse - merged).exp_().unsqueeze(-1))
    out.addcmul_(tile_out.to(out.dtype), (tile_lse - merged).exp_().unsqueeze(-1).to(out.dtype))
    return out, merged
