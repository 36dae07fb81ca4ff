"""Which tiles attention over one span is made of: pure integers, the same in forward and backward.

A tile is a run of queries against a run of keys of one sequence, both by absolute position. Keys of a tile are either
all of the span itself or all before it. Every query of a tile sees at least one of its keys, so no row of a softmax is
empty; a query's tiles hold each key that it sees once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

PREFIX_BLOCK = 2048
"""Keys in one tile of what stands before a span; its borders are absolute positions."""
SMALLEST_WINDOW_BLOCK = 64
"""Queries in a tile under a window that is narrower than this: below, the loop costs more than masked products."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `query_start .. query_stop` against keys `key_start .. key_stop`, absolute positions."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    causal: bool = False
    """Keys after the query are hidden; queries and keys are the same positions then."""
    window: int | None = None
    """Keys `window` or more before the query are hidden; None where no pair of the tile is that far apart."""


def tiles_of(prefix: int, length: int, window: int | None, rows: int | None = None) -> Iterator[Tile]:
    """Yield the tiles of `length` queries behind `prefix` tokens; with a window, each sees its last `window` tokens.

    `rows`: at most so many queries in a causal tile, for kernels that compute many of the pairs that it hides.
    """
    stop = prefix + length
    if window is None or window >= stop:
        for start in range(prefix, stop, rows or length):
            end = min(start + (rows or length), stop)
            yield Tile(start, end, start, end, causal=True)
            if start > prefix:
                yield Tile(start, end, prefix, start)
        yield from (Tile(prefix, stop, low, high) for low, high in prefix_blocks(prefix))
        return
    size = max(window, SMALLEST_WINDOW_BLOCK)
    for start in range(prefix, stop, size):
        yield from _windowed(start, min(start + size, stop), prefix, window)


def prefix_blocks(prefix: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Cut tokens `start .. prefix` at the absolute block borders."""
    borders = [start, *range((start // PREFIX_BLOCK + 1) * PREFIX_BLOCK, prefix, PREFIX_BLOCK), prefix]
    yield from ((low, high) for low, high in pairwise(borders) if low < high)


def _windowed(start: int, stop: int, prefix: int, window: int) -> Iterator[Tile]:
    """Yield the tiles of queries `start .. stop`: their own, those all of them see, those only the first ones see."""
    yield Tile(start, stop, start, stop, causal=True, window=window if stop - start > window else None)
    seen_by_all = min(max(0, stop - window), start)
    for low, high in _either_side(seen_by_all, start, prefix):
        yield Tile(start, stop, low, high)
    for low, high in _either_side(max(0, start - window + 1), seen_by_all, prefix):
        # The last query that sees a key of low .. high is the one that sees key high - 1.
        yield Tile(start, min(stop, high - 1 + window), low, high, window=window)


def _either_side(start: int, stop: int, prefix: int) -> Iterator[tuple[int, int]]:
    """Cut keys `start .. stop` where the span begins, and before that at the block borders."""
    yield from prefix_blocks(min(stop, prefix), start)
    if max(start, prefix) < stop:
        yield max(start, prefix), stop
