"""Hashes of parts of a tensor, by which a later save finds what has not changed. Touches memory, and no file.

A mark is (begin, end, hash): which bytes of the tensor as a rank holds it, and their xxh3-64 as they were staged. Marks
of one tensor lie in order. They are pieces, or, of what changes in parts, runs of rows within a piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import xxhash

from checkpointing.pieces import PIECE_BYTES, piece_ranges
from checkpointing.providers.base import Cost, Place, Provider
from checkpointing.providers.tensors import TensorProvider
from checkpointing.records import TensorSpec
from checkpointing.rows import Span, row_bytes
from checkpointing.slabs import Slab
from checkpointing.sources import Source

Mark: TypeAlias = tuple[int, int, str]

_PROBES, _PROBE_BYTES = 8, 2048
_FINE_BYTES, _MAX_FINE = 64 * 2**10, 4096
_hash = xxhash.xxh3_64_hexdigest


def view_of(provider: Provider | None, size: int) -> memoryview | None:
    """Return the `size` bytes of a row-major tensor in host memory, in place; None of anything else."""
    # Others are asked for their bytes once a save, when they are written.
    if not isinstance(provider, TensorProvider) or provider.cost is not Cost.VIEW or provider.place is not Place.HOST:
        return None
    (data,) = provider.chunks()
    return memoryview(data) if len(data) == size else None


def probes_of(view: memoryview) -> tuple[int, ...]:
    """Return the hashes of a few spots: if all of them change from save to save, no more is worth hashing."""
    stride = (len(view) - _PROBE_BYTES) // (_PROBES - 1)
    spots = range(0, stride * _PROBES, stride)
    return tuple([xxhash.xxh3_64_intdigest(view[at : at + _PROBE_BYTES]) for at in spots])


def fine_bytes(spec: TensorSpec) -> int:
    """Return how long the marks are of a tensor that changes in parts: whole rows, and not too many."""
    size = row_bytes(spec)
    return size * -(-max(_FINE_BYTES, spec.num_bytes // _MAX_FINE) // size)


def pieces_of(begin: int, end: int, at: int, hashes: Sequence[str] = ()) -> list[Mark]:
    """Return the pieces of bytes that lie from `at` on in a file, as marks; without hashes where there are none."""
    ranges = piece_ranges(at, at + end - begin, PIECE_BYTES)
    own = hashes or [""] * len(ranges)
    return [(low - at + begin, high - at + begin, hash_) for (low, high), hash_ in zip(ranges, own, strict=True)]


def equal_spans(view: memoryview, marks: Sequence[Mark]) -> list[Span]:
    """Return what has the bytes of its marks, neighbours as one."""
    found: list[Span] = []
    for begin, end, said in marks:
        if _hash(view[begin:end]) == said:
            joins = found and found[-1][1] == begin
            found[-1:] = [(found[-1][0], end)] if joins else [*found[-1:], (begin, end)]
    return found


def clipped(marks: Sequence[Mark], begin: int, end: int) -> Iterator[tuple[Mark, int, int]]:
    """Yield the marks that have something of `begin .. end`, and what."""
    first = bisect_right(marks, begin, key=lambda mark: mark[1])
    for mark in marks[first:]:
        if mark[0] >= end:
            return
        yield mark, max(begin, mark[0]), min(end, mark[1])


def proven(view: memoryview, marks: Sequence[Mark], begin: int, end: int) -> str | None:
    """Return the hash of bytes of a tensor that are those of its marks; None when they are others by now.

    Of a copy, as memory may change between two looks at it.
    """
    inside = [mark for mark, _, _ in clipped(marks, begin, end)]
    low = inside[0][0]
    copy = memoryview(bytes(view[low : inside[-1][1]]))
    if any(_hash(copy[a - low : b - low]) != said for a, b, said in inside):
        return None
    return _hash(copy[begin - low : end - low])


class MarkedSource:
    """Part of a source, of whose bytes marks are made as they are staged."""

    def __init__(self, source: Source, at: int, fine: int, marks: list[Mark]) -> None:
        self._source, self._at, self._fine, self._marks = source, at, fine, marks

    def copy(self, at: int, slab: Slab, slab_at: int, length: int) -> None:
        """Copy `length` bytes from `at` of the part into a slab."""
        begin = self._at + at
        self._source.copy(begin, slab, slab_at, length)
        if self._fine:
            skew = slab_at - begin
            for low, high in piece_ranges(begin, begin + length, self._fine):
                self._marks.append((low, high, _hash(slab.view[low + skew : high + skew])))
