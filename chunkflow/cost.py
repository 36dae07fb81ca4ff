"""Predicted time of chunks. The unit is the forward of one token without its attention; backward costs two forwards."""

from __future__ import annotations

from collections.abc import Sequence

from chunkflow.config import PlannerConfig
from chunkflow.records import Chunk


def num_pairs(chunk: Chunk) -> int:
    """Pairs (query, key) of causal attention: each token sees itself and all before it in its own sequence."""
    return sum(s.length * s.start + s.length * (s.length + 1) // 2 for s in chunk.segments)


def forward_cost(chunk: Chunk, config: PlannerConfig) -> float:
    """Time of one forward of a chunk."""
    return chunk.num_tokens + config.pair_cost * num_pairs(chunk)


def num_recomputed(chunks: Sequence[Chunk], config: PlannerConfig) -> int:
    """How many chunks of a job (the first ones) run forward twice."""
    return max(0, len(chunks) - config.retain)


def job_cost(chunks: Sequence[Chunk], config: PlannerConfig) -> float:
    """Time of a job (all chunks of a group in order, or one standalone chunk): forward, backward and recompute."""
    forward = [forward_cost(chunk, config) for chunk in chunks]
    return 3 * sum(forward) + sum(forward[: num_recomputed(chunks, config)])
