"""Split a sequence that is longer than a chunk into consecutive, dependent segments."""

from __future__ import annotations

from chunkflow.records import Segment


def split(sample: int, length: int, *, chunk_tokens: int) -> tuple[Segment, ...]:
    """Return the segments of one sequence in order, each at offset 0 of a chunk of its own.

    All are `chunk_tokens` long but the last, which has what is left (1 to `chunk_tokens` tokens).
    """
    starts = range(0, length, chunk_tokens)
    return tuple(Segment(sample, start, min(chunk_tokens, length - start), 0) for start in starts)


def tail_tokens(length: int, *, chunk_tokens: int) -> int:
    """Tokens of the ragged last segment of a sequence longer than a chunk; `chunk_tokens` when it divides evenly."""
    return (length - 1) % chunk_tokens + 1
