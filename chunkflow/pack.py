"""Pack whole short sequences into the fewest chunks, filling the ragged tails of groups first where they fit best.

C `chunk_tokens`. A *bin* is a chunk with room: the last chunk of a group, which holds the group's tail, or a standalone
chunk. Two tails never share a bin, since the chunk of a group has one prefix.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Packing:
    """Which short samples stand where, in the order of their segments."""

    fills: dict[int, tuple[int, ...]]
    """For each long sample: the short ones behind its tail."""
    standalone: tuple[tuple[int, ...], ...]
    """For each standalone chunk: its samples."""


def pack(shorts: Mapping[int, int], tails: Mapping[int, int], *, chunk_tokens: int) -> Packing:
    """Place `shorts` ({sample: tokens}, each at most `chunk_tokens`) by best fit, longest first.

    `tails` are {long sample: tokens in its last chunk}. Equal for equal mappings, whatever their order.
    """
    longs = sorted(tails, key=lambda sample: (-tails[sample], sample))
    bins: list[list[int]] = [[] for _ in longs]
    rooms = sorted((chunk_tokens - tails[sample], n) for n, sample in enumerate(longs))
    for sample in sorted(shorts, key=lambda sample: (-shorts[sample], sample)):
        tokens = shorts[sample]
        tightest = bisect_left(rooms, (tokens, -1))
        if tightest < len(rooms):
            room, n = rooms.pop(tightest)
        else:
            room, n = chunk_tokens, len(bins)
            bins.append([])
        bins[n].append(sample)
        insort(rooms, (room - tokens, n))
    packed = [tuple(samples) for samples in bins]
    return Packing(dict(zip(longs, packed, strict=False)), tuple(packed[len(longs) :]))


def lower_bound_chunks(lengths: Iterable[int], *, chunk_tokens: int) -> int:
    """Chunks that no packing of sequences of these lengths can go below.

    Martello and Toth's L2 (Knapsack Problems, 1990, section 8.3) with the rule on tails: for every threshold `a`, items
    below `a` are forgotten, items above C - a stand alone, and among the others no bin holds two tails or two items
    above C / 2. How many bins hold one of each is at most a matching of them.
    """
    length = np.fromiter(lengths, dtype=np.int64)
    is_long = length > chunk_tokens
    full_chunks, rest = np.divmod(length[is_long] - 1, chunk_tokens)
    tails = np.sort(rest + 1)
    shorts = np.sort(length[~is_long])
    items = np.concatenate([tails, shorts])
    thresholds = np.unique(np.append(items[items <= chunk_tokens // 2], 0))
    bounds = (_bins_above(int(a), shorts, tails, chunk_tokens) for a in thresholds)
    return int(full_chunks.sum()) + max(bounds, default=0)


def _bins_above(threshold: int, shorts: NDArray[np.int64], tails: NDArray[np.int64], chunk_tokens: int) -> int:
    """Bins that the items of at least `threshold` need; both arrays ascending."""
    limits = [threshold, chunk_tokens - threshold + 1]
    short_from, short_to = np.searchsorted(shorts, limits)
    tail_from, tail_to = np.searchsorted(tails, limits)
    alone = len(shorts) - short_to + len(tails) - tail_to
    shorts, tails = shorts[short_from:short_to], tails[tail_from:tail_to]
    large = shorts[np.searchsorted(shorts, chunk_tokens // 2 + 1) :]
    apart = len(tails) + len(large) - _most_pairs(tails, large, chunk_tokens)
    by_tokens = -(-int(shorts.sum() + tails.sum()) // chunk_tokens)
    return int(alone) + max(apart, by_tokens)


def _most_pairs(tails: NDArray[np.int64], large: NDArray[np.int64], chunk_tokens: int) -> int:
    """Most bins that can hold one of `tails` and one of `large` (both ascending) together.

    A large item fits beside a prefix of `tails`, shorter the larger it is; by Hall's theorem the largest k items leave
    at least k minus that prefix without a partner, and the worst k decides.
    """
    partners = np.searchsorted(tails, chunk_tokens - large[::-1], side="right")
    left_over = np.arange(1, len(large) + 1) - partners
    return len(large) - int(left_over.max(initial=0))
