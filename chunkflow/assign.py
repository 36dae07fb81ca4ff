"""Assign jobs (groups and standalone chunks) to data-parallel ranks by predicted time.

Longest processing time first, then moves and swaps between the slowest rank and another while they help; where there
are few jobs, a search through all assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from chunkflow.compiled import kernel

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

WORTHWHILE = 1e-4  # a step of the improvement must gain this part of the makespan; the cost model is coarser anyway
FEW_JOBS, MOST_NODES = 16, 100_000  # of the search through all; the latter takes a millisecond


@dataclass(frozen=True, slots=True)
class Assignment:
    """Jobs of each rank, as indices in the list of costs, and what they cost."""

    ranks: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    """Predicted cost per rank."""
    bound: float
    """No assignment has a slowest rank below this."""


def assign(costs: Sequence[float] | Floats, *, world_size: int) -> Assignment:
    """Give every job to one rank, with the slowest rank as fast as local search can make it. Deterministic.

    Every rank can hold every job: a plan refuses sequences beyond the memory cap (`PlannerConfig.max_tokens`).
    """
    cost = np.asarray(costs, dtype=np.float64)
    rank, bound = place(cost, world_size)
    mine = [np.flatnonzero(rank == r).tolist() for r in range(world_size)]
    return Assignment(
        ranks=tuple(map(tuple, mine)),
        costs=tuple(float(sum(cost[jobs].tolist())) for jobs in mine),
        bound=bound,
    )


def place(costs: Floats, world_size: int) -> tuple[Ints, float]:
    """Return the rank of each job, int64 [jobs], and `makespan_bound`."""
    bound = makespan_bound(costs, world_size=world_size)
    if world_size == 1:
        return np.zeros(len(costs), dtype=np.int64), bound
    by_cost = np.argsort(-costs, kind="stable")
    ordered = costs[by_cost]
    chosen = _longest_first(ordered, world_size)
    _improve(ordered, chosen, world_size, bound)
    if len(costs) <= FEW_JOBS:
        chosen = _search(ordered, chosen, world_size, bound)
    rank = np.empty_like(chosen)
    rank[by_cost] = chosen
    return rank, bound


def makespan_bound(costs: Sequence[float] | Floats, *, world_size: int) -> float:
    """Return the largest of: the mean per rank, the largest job, and the discrete bound.

    Of the k * world_size + 1 largest jobs some rank has k + 1, at least the k + 1 smallest of them.
    """
    ordered = np.sort(np.asarray(costs, dtype=np.float64))[::-1].copy()
    return float(_makespan_bound(ordered, world_size))


@kernel
def _makespan_bound(ordered: Floats, world_size: int) -> float:
    before = np.zeros(len(ordered) + 1)
    for job in range(len(ordered)):
        before[job + 1] = before[job] + ordered[job]
    bound = before[-1] / world_size
    if len(ordered):
        bound = max(bound, ordered[0])
    for last in range(world_size, len(ordered), world_size):
        crowd = 0.0
        for job in range(last - last // world_size, last + 1):
            crowd += ordered[job]
        bound = max(bound, crowd)
    return bound


@kernel
def _longest_first(ordered: Floats, world_size: int) -> Ints:
    """Give each job, the costliest first, to the rank with the least; the first of equals."""
    chosen = np.empty(len(ordered), dtype=np.int64)
    loads = np.zeros(world_size)
    for job in range(len(ordered)):
        rank = np.argmin(loads)
        chosen[job] = rank
        loads[rank] += ordered[job]
    return chosen


@kernel
def _load(ordered: Floats, chosen: Ints, rank: int) -> float:
    # Summed anew each time: a running total would drift, and improvement could go in circles.
    load = 0.0
    for job in range(len(ordered)):
        if chosen[job] == rank:
            load += ordered[job]
    return load


@kernel
def _improve(ordered: Floats, chosen: Ints, world_size: int, bound: float) -> None:
    """Make the best move or swap between the slowest rank and another, again and again, while it is worthwhile."""
    loads = np.zeros(world_size)
    for rank in range(world_size):
        loads[rank] = _load(ordered, chosen, rank)
    for _ in range(64 * world_size):
        slowest = int(np.argmax(loads))
        if loads[slowest] <= bound * (1 + WORTHWHILE):
            return
        best_gain, best_out, best_back, best_rank = loads[slowest] * WORTHWHILE, -1, -1, -1
        ours = np.flatnonzero(chosen == slowest)
        for other in range(world_size):
            gap = loads[slowest] - loads[other]
            if gap / 2 <= best_gain:
                continue
            theirs = np.flatnonzero(chosen == other)
            near = 0
            for out in ours:
                # Costs descend in both lists: the partner whose cost is next to the one wanted only moves on.
                wanted = ordered[out] - gap / 2
                while near < len(theirs) and ordered[theirs[near]] >= wanted:
                    near += 1
                for k in range(near - 1, near + 1):
                    back = theirs[k] if 0 <= k < len(theirs) else -1
                    shift = ordered[out] - (ordered[back] if back >= 0 else 0.0)
                    gain = min(shift, gap - shift)
                    if gain > best_gain:
                        best_gain, best_out, best_back, best_rank = gain, out, back, other
        if best_rank < 0:
            return
        chosen[best_out] = best_rank
        if best_back >= 0:
            chosen[best_back] = slowest
        loads[slowest] = _load(ordered, chosen, slowest)
        loads[best_rank] = _load(ordered, chosen, best_rank)


@kernel
def _search(ordered: Floats, start: Ints, world_size: int, bound: float) -> Ints:
    """Return the best of all assignments, or of those that `MOST_NODES` steps of branch and bound reach."""
    jobs = len(ordered)
    best, chosen = start.copy(), np.full(jobs, -1, dtype=np.int64)
    loads = np.zeros(world_size)
    shortest = 0.0
    for rank in range(world_size):
        shortest = max(shortest, _load(ordered, start, rank))
    job = 0
    for _ in range(MOST_NODES):
        if job < 0 or shortest <= bound:
            break
        if job == jobs:
            best[:] = chosen
            shortest = loads.max()
            job -= 1
            continue
        if chosen[job] >= 0:
            loads[chosen[job]] -= ordered[job]
        nxt = chosen[job] + 1
        while nxt < world_size:
            seen = False
            for earlier in range(nxt):  # an equal load was tried already
                seen = seen or loads[earlier] == loads[nxt]
            if not seen and loads[nxt] + ordered[job] < shortest * (1 - 1e-12):
                break
            nxt += 1
        if nxt == world_size:
            chosen[job] = -1
            job -= 1
            continue
        chosen[job] = nxt
        loads[nxt] += ordered[job]
        job += 1
    return best
