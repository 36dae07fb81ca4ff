"""Where every sequence of a step goes, as arrays: what the objects of a plan are made from, when somebody asks.

N sequences of the step, G groups, S standalone chunks; jobs are the groups, from the longest sequence down, and behind
them the standalone chunks. Sequences are numbered from the longest down here, equal ones by their sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from chunkflow.assign import place
from chunkflow.config import PlannerConfig
from chunkflow.order import order_jobs
from chunkflow.pack import pack
from chunkflow.records import Chunk, Segment

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The sequences in their jobs, the jobs on their ranks."""

    samples: Ints
    """int64 [N]: the sample of each sequence."""
    lengths: Ints
    """int64 [N], descending."""
    packed: Ints
    """int64 [N - G]: the short sequences, job by job, in the order of their segments."""
    ends: Ints
    """int64 [G + S + 1]: the short sequences of job j are packed[ends[j]:ends[j + 1]]."""
    counts: Ints
    """int64 [G + S]: chunks of each job."""
    costs: Floats
    """float64 [G + S]: predicted time of each job; the unit is the forward of one token without its attention."""
    rank: Ints
    """int64 [G + S]: the rank that trains each job."""
    bound: float
    """No assignment has a slowest rank below this."""
    config: PlannerConfig
    world_size: int

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.lengths) - len(self.packed)

    @property
    def num_chunks(self) -> int:
        """Chunks over all ranks."""
        return int(self.counts.sum())

    @property
    def loads(self) -> Floats:
        """Return float64 [ranks], the predicted time of each rank."""
        return np.bincount(self.rank, weights=self.costs, minlength=self.world_size).astype(np.float64)

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that run forward twice."""
        first = np.maximum(self.counts[: self.num_groups] - self.config.retain, 0)
        return int(first.sum()) * self.config.chunk_tokens

    @property
    def digest(self) -> str:
        """Return the xxh3 hex digest of which rank trains which tokens of which sample."""
        digest = xxhash.xxh3_128()
        for array in (self.samples, self.lengths, self.packed, self.ends, self.counts, self.rank):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def jobs(self) -> list[Ints]:
        """Return the jobs of every rank in the order they run."""
        return order_jobs(self.rank, self.counts, world_size=self.world_size, retain=self.config.retain)

    def chunks(self, jobs: Iterable[int]) -> tuple[Chunk, ...]:
        """Return the chunks of these jobs, in forward order."""
        return tuple(chunk for job in jobs for chunk in self._job(job))

    def _job(self, job: int) -> list[Chunk]:
        fill = self.packed[self.ends[job] : self.ends[job + 1]]
        if job >= self.num_groups:
            return [Chunk(self._side_by_side(fill, 0))]
        sample, length, size = int(self.samples[job]), int(self.lengths[job]), self.config.chunk_tokens
        count, last = int(self.counts[job]), size * (int(self.counts[job]) - 1)
        chunks = [Chunk((Segment(sample, n * size, size, 0),), job, n, count) for n in range(count - 1)]
        tail = Segment(sample, last, length - last, 0)
        return [*chunks, Chunk((tail, *self._side_by_side(fill, length - last)), job, count - 1, count)]

    def _side_by_side(self, sequences: Ints, offset: int) -> tuple[Segment, ...]:
        segments = []
        for sample, length in zip(self.samples[sequences].tolist(), self.lengths[sequences].tolist(), strict=True):
            segments.append(Segment(sample, 0, length, offset))
            offset += length
        return tuple(segments)


def make_layout(samples: Ints, lengths: Ints, *, config: PlannerConfig, world_size: int) -> Layout:
    """Split, pack and assign sequences int64 [N], each of at least one token. Pure; the order of `samples` is nothing.

    Groups and chunks do not depend on `world_size`.
    """
    descending = np.lexsort((samples, -lengths))
    samples, lengths, size = samples[descending], lengths[descending], config.chunk_tokens
    num_groups = int(np.count_nonzero(lengths > size))
    tails = (lengths[:num_groups] - 1) % size + 1
    by_tail = np.argsort(-tails, kind="stable")
    where, num_bins = pack(lengths[num_groups:], tails[by_tail], size)
    # Bins of tails are numbered by tail, jobs by length.
    job = np.where(where < num_groups, np.append(by_tail, -1)[np.minimum(where, num_groups)], where)
    packed = np.argsort(job, kind="stable")
    ends = np.concatenate([[0], np.cumsum(np.bincount(job, minlength=num_bins))]).astype(np.int64)
    counts = np.ones(num_bins, dtype=np.int64)
    counts[:num_groups] = -(-lengths[:num_groups] // size)
    costs = _costs(lengths, num_groups, job, counts, config)
    rank, bound = place(costs, world_size)
    return Layout(samples, lengths, packed + num_groups, ends, counts, costs, rank, bound, config, world_size)


def _costs(lengths: Ints, num_groups: int, job: Ints, counts: Ints, config: PlannerConfig) -> Floats:
    """Return float64 [jobs]: forward, a backward of two forwards, and the forwards that are run again."""
    forward = lengths + config.pair_cost * (lengths * (lengths + 1) / 2)
    own = np.bincount(job, weights=forward[num_groups:], minlength=len(counts)).astype(np.float64)
    own[:num_groups] += forward[:num_groups]
    again = np.maximum(counts[:num_groups] - config.retain, 0) * config.chunk_tokens
    own *= 3
    own[:num_groups] += again + config.pair_cost * (again * (again + 1) / 2)
    return own
