"""The order of the ranks' jobs, and the op program that all of them can run.

A rank's groups come first, those with the most chunks leading, so that the step which needs the most memory comes
first; where the first group of another rank is longer, standalone chunks fill the blocks that would be dummies. With
one rule for all ranks their programs are nearly alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from chunkflow.compiled import kernel
from chunkflow.program import block_text

Ints: TypeAlias = NDArray[np.int64]


def order_jobs(rank: Ints, counts: Ints, *, world_size: int, retain: int) -> list[Ints]:
    """Return the jobs of each rank in the order they run, int64 [its jobs].

    `rank` int64 [jobs] is the rank of each, `counts` int64 [jobs] its chunks; groups are numbered before standalone
    chunks, those with the most chunks first. Between two groups stand as many standalone chunks as the longest group
    in that place has blocks to spare.
    """
    by_rank = np.argsort(rank, kind="stable")
    ends = np.concatenate([[0], np.cumsum(np.bincount(rank, minlength=world_size))]).astype(np.int64)
    ordered = _interleaved(by_rank, ends, counts[by_rank], retain)
    return [ordered[ends[r] : ends[r + 1]] for r in range(world_size)]


@kernel
def _interleaved(by_rank: Ints, ends: Ints, counts: Ints, retain: int) -> Ints:
    """Return `by_rank`, each rank's part ends[r]:ends[r + 1] in the order it runs; `counts` are in its order."""
    world_size, ordered = len(ends) - 1, np.empty_like(by_rank)
    group, to = ends[:-1].copy(), ends[:-1].copy()
    single = np.empty(world_size, dtype=np.int64)
    for r in range(world_size):
        single[r] = ends[r] + np.count_nonzero(counts[ends[r] : ends[r + 1]] > 1)
    last_group = single.copy()
    while (group < last_group).any():
        widest = 0
        for r in range(world_size):
            if group[r] < last_group[r]:
                widest = max(widest, 1 + max(0, counts[group[r]] - retain))
        for r in range(world_size):
            spare = widest
            if group[r] < last_group[r]:
                spare -= 1 + max(0, counts[group[r]] - retain)
                ordered[to[r]] = by_rank[group[r]]
                group[r] += 1
                to[r] += 1
            while spare > 0 and single[r] < ends[r + 1]:
                ordered[to[r]] = by_rank[single[r]]
                single[r] += 1
                to[r] += 1
                spare -= 1
    for r in range(world_size):
        for rest in range(single[r], ends[r + 1]):
            ordered[to[r]] = by_rank[rest]
            to[r] += 1
    return ordered


def _blocks(count: int, retain: int) -> int:
    """Blocks with a backward in the program of a job."""
    return 1 + max(0, count - retain)


def envelope(counts: Sequence[Sequence[int]], *, retain: int) -> str:
    """Return a program that contains those of ranks whose jobs, in order, have so many chunks each.

    The n-th groups of the ranks run side by side, each place as long as its longest.
    """
    groups = [[count for count in mine if count > 1] for mine in counts]
    blocks = [sum(_blocks(count, retain) for count in mine) for mine in counts]
    program: list[str] = []
    reached = [0] * len(groups)  # blocks that a rank has had room for, in order
    for place in zip_longest(*groups, fillvalue=0):
        longest = max(place)
        program += ["f" * max(0, longest - retain), block_text(min(longest, retain)), "FB" * max(0, longest - retain)]
        reached = [n + _blocks(longest, retain) for n in reached]
    missing = max((need - had for need, had in zip(blocks, reached, strict=True)), default=0)
    return "".join(program) + "FB" * max(0, missing)
