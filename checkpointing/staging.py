"""From live memory into slabs, hashed while they are hot, and on to the flush threads: a dull loop over blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import xxhash

from checkpointing.blocks import Block
from checkpointing.errors import SaveError
from checkpointing.flush import FlushFile, FlushPool
from checkpointing.slabs import Slab, SlabRing
from checkpointing.sources import Source


@dataclass(slots=True)
class Stager:
    """Stages the blocks of one file."""

    ring: SlabRing
    pool: FlushPool
    file: FlushFile
    alive: Callable[[], None]
    """Gives a sign of life; raises to give the save up."""
    timeout_s: float
    hashes: dict[int, str] = field(default_factory=dict)
    """By where a block begins, the hashes of its pieces, one behind the other."""

    def stage(self, blocks: Sequence[Block], sources: Mapping[int, Source]) -> None:
        """Copy, hash and hand on every block."""
        slabs: list[Slab] = []
        try:
            for index, block in enumerate(blocks):
                self._check()
                slabs = slabs or self._slabs(len(blocks) - index)
                for one in block.segments:
                    sources[one.source].copy(one.source_at, slabs[-1], one.block_at, one.length)
                self.hashes[block.begin] = _hashed(slabs[-1], block)
                self.pool.submit(self.file, slabs[-1], block.length, block.begin)
                slabs.pop()  # it is the pool's now
        finally:
            for slab in slabs:
                self.ring.release(slab)

    def pieces(self) -> str:
        """Return the hashes of all pieces, in the order of the file."""
        return "".join(self.hashes[begin] for begin in sorted(self.hashes))

    def _slabs(self, wanted: int) -> list[Slab]:
        """Wait for slabs: for a third of all, so that two thirds are on their way to the disk meanwhile."""
        give_up = time.monotonic() + self.timeout_s
        wanted = min(wanted, max(1, self.ring.num_slabs // 3))
        while not (slabs := self.ring.acquire_several(wanted, 0.25)):
            self._check()
            if time.monotonic() > give_up:
                raise SaveError(f"no buffer came free for {self.timeout_s:g} s: the disk has stopped")
        return slabs

    def _check(self) -> None:
        self.alive()
        if self.file.error is not None:
            raise self.file.error


def _hashed(slab: Slab, block: Block) -> str:
    view, edges = slab.view, pairwise((0, *block.cuts))
    return b"".join([xxhash.xxh3_64_digest(view[begin:end]) for begin, end in edges]).hex()
