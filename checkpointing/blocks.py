"""How a data file is filled: in blocks that end at multiples of PIECE_BYTES. Pure; all numbers are bytes.

A block is one buffer, one write, and one or more pieces to hash: no piece crosses a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from checkpointing.pieces import PIECE_BYTES


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of the file that come from one source, in order."""

    source: int
    """Which one."""
    begin: int
    end: int
    urgent: bool = False
    """To be copied before `save` returns."""
    cuts: tuple[int, ...] = ()
    """Where in the file one tensor ends and the next begins, inside of the extent."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What one source gives to one block."""

    source: int
    source_at: int
    block_at: int
    length: int


@dataclass(frozen=True, slots=True)
class Block:
    """One buffer's worth of the file."""

    begin: int
    """Where in the file it begins."""
    length: int
    segments: tuple[Segment, ...]
    cuts: tuple[int, ...]
    """Ends of its pieces, relative to `begin`, the last being `length`."""
    urgent: bool


def plan_blocks(extents: Sequence[Extent], begin: int, end: int) -> tuple[Block, ...]:
    """Return the blocks of the file's bytes `begin .. end` in the order they are to be filled.

    That is the urgent ones first, else as they lie in the file. `extents` lie one behind the other and cover it.
    """
    if begin >= end:
        return ()
    blocks, at = [], 0
    edges = [begin, *range(begin - begin % PIECE_BYTES + PIECE_BYTES, end, PIECE_BYTES), end]
    for low, high in pairwise(edges):
        inside = []
        while at < len(extents) and extents[at].begin < high:
            inside.append(extents[at])
            if extents[at].end > high:
                break
            at += 1
        if low < high:
            blocks.append(_block(low, high, inside))
    return tuple(sorted(blocks, key=lambda block: (not block.urgent, block.begin)))


def _block(low: int, high: int, extents: Sequence[Extent]) -> Block:
    segments, cuts, urgent = [], [], False
    for one in extents:
        begin, end = max(one.begin, low), min(one.end, high)
        if begin < end:
            segments.append(Segment(one.source, begin - one.begin, begin - low, end - begin))
            urgent = urgent or one.urgent
            cuts += [cut - low for cut in one.cuts if begin < cut < end]
            cuts.append(end - low)
    return Block(low, high - low, tuple(segments), tuple(cuts), urgent)
