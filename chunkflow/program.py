"""The op program of one rank: `f` forward without graph, `F` forward, `B` backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chunkflow.records import Chunk


def operations(chunks: Sequence[Chunk], retain: int) -> Iterator[tuple[str, int]]:
    """Yield (op, position in chunks) in the order in which they run."""
    position = 0
    while position < len(chunks):
        count = chunks[position].count
        group = range(position, position + count)
        early, kept = group[: max(0, count - retain)], group[max(0, count - retain) :]
        yield from (("f", p) for p in early)
        yield from (("F", p) for p in kept)
        yield from (("B", p) for p in reversed(kept))
        yield from ((op, p) for p in reversed(early) for op in "FB")
        position += count
