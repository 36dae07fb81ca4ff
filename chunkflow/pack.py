"""Pack whole short sequences into the fewest chunks, filling the ragged tails of groups first where they fit best.

C `chunk_tokens`. A *bin* is a chunk with room: the last chunk of a group, which holds the group's tail, or a standalone
chunk. Two tails never share a bin, since the chunk of a group has one prefix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from chunkflow.compiled import kernel

Ints: TypeAlias = NDArray[np.int64]

MOST_ROOMS = 1 << 20
"""Rooms that are told apart; of chunks with more tokens they are counted in larger units, rounded down."""


@kernel
def pack(shorts: Ints, tails: Ints, chunk_tokens: int) -> tuple[Ints, int]:
    """Place short sequences by best fit, longest first; return the bin of each, int64 [shorts], and how many there are.

    `shorts` int64 descending, each at most `chunk_tokens`. Bin n below len(tails) holds a tail of `tails[n]` tokens.
    """
    unit = chunk_tokens // MOST_ROOMS + 1
    num_rooms = chunk_tokens // unit + 1
    # Bins of equal room are a list (first[room], then after[bin]); `filled` has a bit for every room that has any.
    first = np.full(num_rooms, -1, dtype=np.int64)
    filled = np.zeros(num_rooms // 32 + 1, dtype=np.int64)
    where = np.empty(len(shorts), dtype=np.int64)
    after = np.empty(len(tails) + len(shorts), dtype=np.int64)
    left = np.empty(len(tails) + len(shorts), dtype=np.int64)
    for n in range(len(tails)):
        left[n] = chunk_tokens - tails[n]
        _push(n, left[n] // unit, first, after, filled)
    num_bins = len(tails)
    for i in range(len(shorts)):
        room = _tightest(-(-shorts[i] // unit), filled)
        if room < 0:
            n = num_bins
            num_bins += 1
            left[n] = chunk_tokens
        else:
            n = first[room]
            first[room] = after[n]
            if after[n] < 0:
                filled[room >> 5] ^= 1 << (room & 31)
        where[i] = n
        left[n] -= shorts[i]
        _push(n, left[n] // unit, first, after, filled)
    return where, num_bins


@kernel
def _push(n: int, room: int, first: Ints, after: Ints, filled: Ints) -> None:
    after[n] = first[room]
    first[room] = n
    filled[room >> 5] |= 1 << (room & 31)


@kernel
def _tightest(room: int, filled: Ints) -> int:
    """Return the smallest room that any bin has, of at least `room`; -1 when there is none."""
    word = room >> 5
    if word >= len(filled):
        return -1
    bits = filled[word] >> (room & 31) << (room & 31)
    while bits == 0:
        word += 1
        if word == len(filled):
            return -1
        bits = filled[word]
    bit = 0
    for half in (16, 8, 4, 2, 1):
        if bits & ((1 << half) - 1) == 0:
            bits >>= half
            bit += half
    return (word << 5) + bit


def lower_bound_chunks(lengths: Iterable[int] | Ints, *, chunk_tokens: int) -> int:
    """Chunks that no packing of sequences of these lengths can go below.

    Martello and Toth's L2 (Knapsack Problems, 1990, section 8.3) with the rule on tails: for every threshold `a`, items
    below `a` are forgotten, items above C - a stand alone, and among the others no bin holds two tails or two items
    above C / 2. How many bins hold one of each is at most a matching of them.
    """
    length = np.asarray(lengths if isinstance(lengths, np.ndarray) else list(lengths), dtype=np.int64)
    is_long = length > chunk_tokens
    full_chunks, rest = np.divmod(length[is_long] - 1, chunk_tokens)
    tails, shorts = np.sort(rest + 1), np.sort(length[~is_long])
    return int(full_chunks.sum()) + int(_most_bins(shorts, tails, chunk_tokens))


@kernel
def _most_bins(shorts: Ints, tails: Ints, chunk_tokens: int) -> int:
    """Return the largest bound over all thresholds that are worth a look; both arrays ascending."""
    best = _bins_above(0, shorts, tails, chunk_tokens)
    for items in (shorts, tails):
        for i in range(len(items)):
            if items[i] > chunk_tokens // 2:
                break
            if i == 0 or items[i] != items[i - 1]:
                best = max(best, _bins_above(items[i], shorts, tails, chunk_tokens))
    return best


@kernel
def _bins_above(threshold: int, shorts: Ints, tails: Ints, chunk_tokens: int) -> int:
    """Bins that the items of at least `threshold` need; both arrays ascending."""
    above = chunk_tokens - threshold + 1
    short_from, short_to = np.searchsorted(shorts, threshold), np.searchsorted(shorts, above)
    tail_from, tail_to = np.searchsorted(tails, threshold), np.searchsorted(tails, above)
    alone = len(shorts) - short_to + len(tails) - tail_to
    shorts, tails = shorts[short_from:short_to], tails[tail_from:tail_to]
    large = shorts[np.searchsorted(shorts, chunk_tokens // 2 + 1) :]
    apart = len(tails) + len(large) - _most_pairs(tails, large, chunk_tokens)
    by_tokens = -((-shorts.sum() - tails.sum()) // chunk_tokens)
    return int(alone + max(apart, by_tokens))


@kernel
def _most_pairs(tails: Ints, large: Ints, chunk_tokens: int) -> int:
    """Most bins that can hold one of `tails` and one of `large` (both ascending) together.

    A large item fits beside a prefix of `tails`, shorter the larger it is; by Hall's theorem the largest k items leave
    at least k minus that prefix without a partner, and the worst k decides.
    """
    worst, partners = 0, 0
    for k in range(1, len(large) + 1):
        while partners < len(tails) and tails[partners] <= chunk_tokens - large[-k]:
            partners += 1
        worst = max(worst, k - partners)
    return len(large) - worst
