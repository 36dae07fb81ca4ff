"""Attention dropout whose mask belongs to positions, not to the order in which things run.

The mask of a (query, key) pair is drawn from a counter keyed by (seed, sample, layer, query block, key block), all
absolute. So it is the same in a recompute, in any chunking of the sequence, and in the full-sequence run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

BLOCK = 128
"""Side of the square block of (query, key) pairs drawn from one counter."""


@dataclass(frozen=True, slots=True)
class AttentionDropout:
    """Dropout of one layer over one sequence."""

    probability: float
    seed: int
    sample: int
    layer: int

    def keep(self, heads: int, query_start: int, queries: int, key_start: int, keys: int, like: Tensor) -> Tensor:
        """Return multipliers [heads, queries, keys], 0 or 1 / (1 - probability), in the dtype and device of `like`."""
        rows = range(query_start // BLOCK, -(-(query_start + queries) // BLOCK))
        columns = range(key_start // BLOCK, -(-(key_start + keys) // BLOCK))
        drawn = torch.cat([torch.cat([self._block(heads, r, c) for c in columns], dim=2) for r in rows], dim=1)
        top, left = query_start - rows.start * BLOCK, key_start - columns.start * BLOCK
        kept = drawn[:, top : top + queries, left : left + keys] >= self.probability
        return kept.to(device=like.device, dtype=like.dtype) / (1 - self.probability)

    def _block(self, heads: int, row: int, column: int) -> Tensor:
        key = f"{self.seed}/{self.sample}/{self.layer}/{row}/{column}"
        # Drawn on the CPU everywhere, so that every device sees the same mask.
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(key.encode()) >> 1)
        return torch.rand(heads, BLOCK, BLOCK, generator=generator)
