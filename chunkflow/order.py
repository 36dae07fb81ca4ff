"""The order of the ranks' jobs, and the op program that all of them can run.

A rank's groups come first, those with the most chunks leading, so that the step which needs the most memory comes
first; where the first group of another rank is longer, standalone chunks fill the blocks that would be dummies. With
one rule for all ranks their programs are nearly alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from chunkflow.program import block_text


def order_jobs(ranks: Sequence[Iterable[int]], counts: Sequence[int], *, retain: int) -> list[list[int]]:
    """Return the jobs of each rank in the order they run; `counts` are chunks per job, jobs are numbered by size.

    Between two groups stand as many standalone chunks as the longest group in that place has blocks to spare.
    """
    groups = [sorted((j for j in jobs if counts[j] > 1), key=lambda j: (-counts[j], j)) for jobs in ranks]
    singles = [sorted(j for j in jobs if counts[j] == 1) for jobs in ranks]
    ordered: list[list[int]] = [[] for _ in ranks]
    used = [0] * len(groups)
    for place in zip_longest(*groups):
        blocks = [0 if job is None else _blocks(counts[job], retain) for job in place]
        for rank, job in enumerate(place):
            spare = max(blocks) - blocks[rank]
            fill = singles[rank][used[rank] : used[rank] + spare]
            used[rank] += len(fill)
            ordered[rank] += [*([] if job is None else [job]), *fill]
    for rank, rest in enumerate(singles):
        ordered[rank] += rest[used[rank] :]
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
