"""Numbers about a run: how evenly experts are loaded, and how much of a link's work other work covers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log

Interval = tuple[float, float]


def load_balance(rows_per_expert: Sequence[int], *, prefix: str = "moe") -> dict[str, float]:
    """Return metrics of one layer in one step; `rows_per_expert` is summed over ranks.

    `imbalance` is the busiest expert over the mean (1 is even), `entropy` relative to an even load (1 is even), `dead`
    the number of experts without rows, and `expert_N` each expert's share.
    """
    total, count = sum(rows_per_expert), len(rows_per_expert)
    if not total:
        return {f"{prefix}/imbalance": 1.0, f"{prefix}/entropy": 1.0, f"{prefix}/dead": float(count)}
    shares = [n / total for n in rows_per_expert]
    entropy = -sum(p * log(p) for p in shares if p) / log(count) if count > 1 else 1.0
    return {
        f"{prefix}/imbalance": max(shares) * count,
        f"{prefix}/entropy": entropy,
        f"{prefix}/dead": float(sum(n == 0 for n in rows_per_expert)),
        **{f"{prefix}/expert_{i}": share for i, share in enumerate(shares)},
    }


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the intervals merged, ascending."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def covered(work: Iterable[Interval], by: Iterable[Interval]) -> float:
    """Return how long `work` runs while something of `by` runs too."""
    cover = union(by)
    return sum(max(0.0, min(end, b) - max(start, a)) for start, end in union(work) for a, b in cover)
