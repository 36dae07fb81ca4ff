"""Which bytes a hash covers. Pure; all numbers are bytes.

A tensor's bytes are cut at every multiple of `piece_bytes` of the *file*, so that a writer that fills aligned buffers
hashes each piece in one call, while it is hot. An empty tensor has no pieces.
"""

from __future__ import annotations

from itertools import pairwise

PIECE_BYTES = 4 * 2**20
"""What this version writes. Smaller ones cost the interpreter's lock, larger ones leave the cache."""

WHOLE = 2**63
"""The `piece_bytes` of format 1: no file is as long, so a tensor is one piece."""


def piece_ranges(begin: int, end: int, piece_bytes: int) -> list[tuple[int, int]]:
    """Return (begin, end) of each piece of the bytes `begin .. end` of a file."""
    cuts = [begin, *range(begin - begin % piece_bytes + piece_bytes, end, piece_bytes), end]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def num_pieces(begin: int, end: int, piece_bytes: int) -> int:
    """Return how many pieces the bytes `begin .. end` of a file have."""
    return -(-end // piece_bytes) - begin // piece_bytes if end > begin else 0
