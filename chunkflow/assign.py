"""Assign jobs (groups and standalone chunks) to data-parallel ranks by predicted time.

Longest processing time first, then moves and swaps between the slowest rank and another while they help.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

WORTHWHILE = 1e-4  # a step of the improvement must gain this part of the makespan; the cost model is coarser anyway


@dataclass(frozen=True, slots=True)
class Assignment:
    """Jobs of each rank, as indices in the list of costs, and what they cost."""

    ranks: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    """Predicted cost per rank."""
    bound: float
    """No assignment has a slowest rank below this."""


def assign(costs: Sequence[float], *, world_size: int) -> Assignment:
    """Give every job to one rank, with the slowest rank as fast as local search can make it. Deterministic."""
    bound = makespan_bound(costs, world_size=world_size)
    ranks = _longest_first(costs, world_size)
    while max(rank.cost for rank in ranks) > bound * (1 + WORTHWHILE) and _improve(ranks):
        pass
    return Assignment(
        ranks=tuple(tuple(sorted(job for _, job in rank.jobs)) for rank in ranks),
        costs=tuple(rank.cost for rank in ranks),
        bound=bound,
    )


def makespan_bound(costs: Sequence[float], *, world_size: int) -> float:
    """Return the largest of: the mean per rank, the largest job, and the discrete bound.

    Of the k * world_size + 1 largest jobs some rank has k + 1, at least the k + 1 smallest of them.
    """
    ordered = sorted(costs, reverse=True)
    crowds = range(world_size, len(ordered), world_size)
    discrete = (sum(ordered[last - last // world_size : last + 1]) for last in crowds)
    return max(sum(ordered) / world_size, max(ordered, default=0), max(discrete, default=0))


@dataclass(slots=True)
class _Rank:
    jobs: list[tuple[float, int]]
    """(cost, job), ascending."""
    cost: float

    def replace(self, out: tuple[float, int] | None, into: tuple[float, int] | None) -> None:
        jobs = [job for job in self.jobs if job != out]
        self.jobs = sorted([*jobs, into]) if into else jobs
        # Summed anew: a running total would drift, and improvement could go in circles.
        self.cost = sum(cost for cost, _ in self.jobs)


def _longest_first(costs: Sequence[float], world_size: int) -> list[_Rank]:
    jobs: list[list[tuple[float, int]]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        load, rank = heapq.heappop(loads)
        jobs[rank].append((costs[job], job))
        heapq.heappush(loads, (load + costs[job], rank))
    return [_Rank(sorted(mine), sum(cost for cost, _ in sorted(mine))) for mine in jobs]


def _improve(ranks: list[_Rank]) -> bool:
    """Make the best move or swap between the slowest rank and another; False when none is worthwhile."""
    slowest = max(ranks, key=lambda rank: rank.cost)
    best_gain, best = slowest.cost * WORTHWHILE, None
    for other in ranks:
        gap = slowest.cost - other.cost
        if gap / 2 <= best_gain:
            continue
        for out in slowest.jobs:
            for back in _partners(other.jobs, out[0] - gap / 2):
                shift = out[0] - (back[0] if back else 0)
                gain = min(shift, gap - shift)
                if gain > best_gain:
                    best_gain, best = gain, (other, out, back)
    if best is None:
        return False
    other, out, back = best
    slowest.replace(out, back)
    other.replace(back, out)
    return True


def _partners(jobs: list[tuple[float, int]], wanted: float) -> list[tuple[float, int] | None]:
    """Jobs whose cost is next to the one wanted on either side; None stands for no job at all, of cost 0."""
    above = bisect_left(jobs, (wanted, -1))
    return [jobs[above - 1] if above > 0 else None, *jobs[above : above + 1]]
