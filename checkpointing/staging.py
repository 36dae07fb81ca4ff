"""From live memory into slabs, hashed while they are hot, and on to the flush threads: a dull loop over blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
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

    def stage(self, blocks: Iterable[Block], sources: Mapping[int, Source]) -> None:
        """Copy, hash and hand on every block."""
        for block in blocks:
            slab = self._slab()
            try:
                for one in block.segments:
                    sources[one.source].copy(one.source_at, slab, one.block_at, one.length)
                self.hashes[block.begin] = _hashed(slab, block)
                self.pool.submit(self.file, slab, block.length, block.begin)
            except BaseException:
                self.ring.release(slab)
                raise

    def pieces(self) -> str:
        """Return the hashes of all pieces, in the order of the file."""
        return "".join(self.hashes[begin] for begin in sorted(self.hashes))

    def _slab(self) -> Slab:
        give_up = time.monotonic() + self.timeout_s
        while True:
            self.alive()
            if self.file.error is not None:
                raise self.file.error
            slab = self.ring.acquire(0.25)
            if slab is not None:
                return slab
            if time.monotonic() > give_up:
                raise SaveError(f"no buffer came free for {self.timeout_s:g} s: the disk has stopped")


def _hashed(slab: Slab, block: Block) -> str:
    view, edges = slab.view, pairwise((0, *block.cuts))
    return b"".join([xxhash.xxh3_64_digest(view[begin:end]) for begin, end in edges]).hex()
