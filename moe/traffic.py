"""Which rows go where, in every chunk of a layer: pure integer arithmetic, the same on every rank.

A *bucket* is the rows that one rank sends to one expert. Every bucket is cut at the same fractions, so one exchange of
bucket sizes serves any number of chunks, forward and backward; a *piece* lies between two neighbouring cuts of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Small buckets would otherwise all put their last row into the last chunk: each has an offset of its own, in 1/_PHASES.
_PHASES = 1 << 16
_GOLDEN = 40503


def cuts(forward_chunks: int, backward_chunks: int) -> list[Fraction]:
    """Return the ascending cuts of both directions, with 0 and 1: one more than there are pieces."""
    return sorted({Fraction(i, r) for r in (forward_chunks, backward_chunks) for i in range(r + 1)})


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """Return `starts[0], starts[0] + 1, ... ` for every start, `lengths` of each, one after the other."""
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    return np.arange(total, dtype=np.int64) + np.repeat(starts - before, lengths)


@dataclass(frozen=True)
class Traffic:
    """The bucket sizes of one layer in one step, as rank (`member`, `position`) of its `esp` and `ep` axes sees them.

    `rows_SPE[s, p, e]`: rows that rank (s, p) sends to expert e; expert e is at `e // experts_per_rank` of ep.
    """

    rows_SPE: Ints
    member: int
    position: int

    @property
    def num_members(self) -> int:
        """Ranks that share one expert, of the `esp` axis."""
        return self.rows_SPE.shape[0]

    @property
    def num_ranks(self) -> int:
        """Ranks among which experts are spread, P."""
        return self.rows_SPE.shape[1]

    @property
    def experts_per_rank(self) -> int:
        """Experts of one rank."""
        return self.rows_SPE.shape[2] // self.num_ranks

    @cached_property
    def _phases(self) -> Ints:
        numbers = np.arange(self.rows_SPE.size, dtype=np.int64).reshape(self.rows_SPE.shape)
        return numbers * _GOLDEN % _PHASES

    def borders(self, cut: Fraction) -> Ints:
        """Return the row of every bucket at which `cut` falls: 0 for 0, the size for 1, ascending in between."""
        if (known := self._borders.get(cut)) is None:
            share = self.rows_SPE * cut.numerator * _PHASES + self._phases * cut.denominator
            known = self._borders[cut] = share // (cut.denominator * _PHASES)
        return known

    @cached_property
    def _borders(self) -> dict[Fraction, Ints]:
        """Both directions of a layer ask for the same ones, chunks and pieces too."""
        return {}

    def chunk(self, start: Fraction, end: Fraction) -> ChunkTraffic:
        """Return what moves in the chunk between two cuts."""
        if (known := self._chunks.get((start, end))) is None:
            known = self._chunks[start, end] = ChunkTraffic(self, self.borders(start), self.borders(end))
        return known

    @cached_property
    def _chunks(self) -> dict[tuple[Fraction, Fraction], ChunkTraffic]:
        """Of both directions: with as many chunks they are the same."""
        return {}

    @property
    def own_experts(self) -> slice:
        """Experts of this rank."""
        return slice(self.position * self.experts_per_rank, (self.position + 1) * self.experts_per_rank)

    @cached_property
    def held_by_expert(self) -> Ints:
        """Rows that each expert of this rank gets in the whole step."""
        return self.rows_SPE[:, :, self.own_experts].sum((0, 1))


@dataclass(frozen=True)
class ChunkTraffic:
    """What moves in one chunk. Rows travel ordered by (destination, expert) and arrive ordered by (source, expert)."""

    traffic: Traffic
    start_SPE: Ints
    end_SPE: Ints

    @cached_property
    def send_index(self) -> Ints:
        """Return which of this rank's rows, which lie expert by expert, go; in the order in which they travel."""
        t = self.traffic
        sizes_E, start_E, end_E = (a[t.member, t.position] for a in (t.rows_SPE, self.start_SPE, self.end_SPE))
        return ranges(np.cumsum(sizes_E) - sizes_E + start_E, end_E - start_E)

    @cached_property
    def matrix(self) -> Ints:
        """Return `[S, P, P]`: the rows that go from (s, source) to (s, destination)."""
        t = self.traffic
        return (self.end_SPE - self.start_SPE).reshape(*t.rows_SPE.shape[:2], t.num_ranks, -1).sum(3)

    @cached_property
    def member_rows(self) -> Ints:
        """Rows that each rank of the `esp` axis gets by dispatch, and gives the others by gather."""
        return self.matrix[:, :, self.traffic.position].sum(1)

    @property
    def rows_held(self) -> int:
        """Rows this rank computes on after gather."""
        return int(self.member_rows.sum())

    def piece_index(self, start: Fraction, end: Fraction) -> tuple[Ints, list[int]]:
        """Return which rows of the gathered chunk form a piece, expert by expert, and how many each expert has.

        The piece lies inside the chunk.
        """
        if (known := self._pieces.get((start, end))) is None:
            known = self._pieces[start, end] = self._piece_index(start, end)
        return known

    @cached_property
    def _pieces(self) -> dict[tuple[Fraction, Fraction], tuple[Ints, list[int]]]:
        return {}

    def _piece_index(self, start: Fraction, end: Fraction) -> tuple[Ints, list[int]]:
        t = self.traffic
        held_SPe = (self.end_SPE - self.start_SPE)[:, :, t.own_experts]
        offsets_SPe = (np.cumsum(held_SPe) - held_SPe.ravel()).reshape(held_SPe.shape)
        first, last = (t.borders(cut)[:, :, t.own_experts] for cut in (start, end))
        skipped = first - self.start_SPE[:, :, t.own_experts]
        starts, lengths = ((a.transpose(2, 0, 1)) for a in (offsets_SPe + skipped, last - first))
        return ranges(starts.ravel(), lengths.ravel()), [int(n) for n in lengths.sum((1, 2))]
