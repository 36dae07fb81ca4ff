"""The plans of a whole epoch, without its chunks: how full, how balanced, how long it takes to plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chunkflow.config import PlannerConfig
from chunkflow.errors import PlanError
from chunkflow.layout import Ints, Layout, make_layout
from chunkflow.overflow import Overflow, limit_of
from chunkflow.pack import lower_bound_chunks
from chunkflow.plan_input import check_lengths
from chunkflow.sampler import global_batch, steps_per_epoch


@dataclass(frozen=True, slots=True)
class Survey:
    """What the plans of an epoch add up to."""

    batches: int
    """Global batches of the epoch."""
    chunks: int
    lower_bound_chunks: int
    """No packing needs fewer."""
    max_over_bound: int
    """Chunks over the bound in the worst batch."""
    share_within_1: float
    """Part of the batches with at most one chunk over the bound."""
    fill: float
    """Tokens per token of room, 0 to 1."""
    split_sequences: int
    """Sequences trained in dependent chunks."""
    recomputed_tokens: int
    """Tokens that run forward twice."""
    straggler_ratio: float
    """Predicted time of the slowest rank over the mean, of all batches together."""
    makespan_over_bound: float
    """Predicted time of the slowest rank over max(mean, largest group, discrete bound), of the worst batch."""
    plan_seconds: float
    """Time to draw and plan all batches, in this process."""
    idle_ranks: int
    """Ranks without a chunk, in the batch that leaves the most."""
    long_batches: int
    """Batches in which one group takes longer than the mean of the ranks: no assignment balances those."""
    long_tokens: int
    """Of the longest such group; 0 where there is none."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def survey(
    lengths: Ints,
    *,
    config: PlannerConfig,
    batch: int,
    world_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Plan the first epoch over sequences int64 [N]; `progress` is called with batches done and in all.

    Raises PlanError on no lengths at all, a length below 1, over 2**31 - 1 or over `config.max_tokens`.
    """
    if not len(lengths):
        raise PlanError("the overflow policy leaves no sequence to plan; raise chunk_tokens or max_tokens")
    check_lengths(lengths, config.max_tokens)
    make_layout(np.arange(1), lengths[:1], config=config, world_size=world_size)  # the kernels are loaded
    steps, rows, seconds = steps_per_epoch(len(lengths), batch), [], 0.0
    for step in range(steps):
        started = time.perf_counter()
        samples = global_batch(seed, 0, step, num_samples=len(lengths), global_batch=batch)
        layout = make_layout(samples, lengths[samples], config=config, world_size=world_size)
        seconds += time.perf_counter() - started
        rows.append(_row(layout))
        if progress:
            progress(step + 1, steps)
    table = np.array(rows)
    over = table[:, 0] - table[:, 1]
    return Survey(
        batches=steps,
        chunks=int(table[:, 0].sum()),
        lower_bound_chunks=int(table[:, 1].sum()),
        max_over_bound=int(over.max()),
        share_within_1=float((over <= 1).mean()),
        fill=float(lengths.sum() / (table[:, 0].sum() * config.chunk_tokens)),
        split_sequences=int(table[:, 2].sum()),
        recomputed_tokens=int(table[:, 3].sum()),
        straggler_ratio=float(table[:, 4].sum() / table[:, 5].sum()),
        makespan_over_bound=float((table[:, 4] / table[:, 6]).max()),
        plan_seconds=seconds,
        idle_ranks=int(table[:, 7].max()),
        long_batches=int(np.count_nonzero(table[:, 8])),
        long_tokens=int(table[:, 8].max()),
    )


def _row(layout: Layout) -> tuple[float, ...]:
    """Return chunks, their bound, groups, recomputed tokens, slowest rank, mean rank, its bound, idle ranks, and the
    tokens of the longest group that takes longer than the mean rank.
    """
    loads = layout.loads
    long = layout.costs[: layout.num_groups] > loads.mean()
    bound = lower_bound_chunks(layout.lengths, chunk_tokens=layout.config.chunk_tokens)
    slowest = float(loads.max())
    return (
        layout.num_chunks,
        bound,
        layout.num_groups,
        layout.recomputed_tokens,
        slowest,
        float(loads.mean()),
        layout.bound,
        layout.world_size - len(np.unique(layout.rank)),
        layout.lengths[: layout.num_groups][long].max(initial=0),
    )


def overflowed(lengths: Ints, policy: Overflow, *, chunk_tokens: int, max_tokens: int | None) -> Ints:
    """Return the lengths int64 that a policy leaves of these. Pure; `raise` and `split` leave all."""
    limit = limit_of(policy, chunk_tokens=chunk_tokens, max_tokens=max_tokens)
    if limit is None or policy in (Overflow.SPLIT, Overflow.RAISE):
        return lengths
    if policy is Overflow.DROP:
        return lengths[lengths <= limit]
    if policy is Overflow.TRUNCATE:
        return np.minimum(lengths, limit)
    pieces = -(-lengths // limit)
    last = lengths - (pieces - 1) * limit
    cut = np.full(int(pieces.sum()), limit, dtype=np.int64)
    cut[np.cumsum(pieces) - 1] = last
    return cut
