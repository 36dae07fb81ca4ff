"""A ring of buffers through which all bytes pass: pre-faulted, aligned, and never more than its budget.

In huge pages where there are any: the kernel pins the pages of a write one by one, which is a third of its cost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from checkpointing.errors import SaveError
from checkpointing.memory import fresh
from checkpointing.pieces import PIECE_BYTES

_BATCH = 4
"""Slabs mapped at a time."""


@dataclass(frozen=True, slots=True)
class Slab:
    """One buffer of PIECE_BYTES, aligned to a page."""

    address: int
    view: memoryview


class SlabRing:
    """At most `budget_bytes`, cut into slabs. Memory is mapped when it is first needed, and kept until `close`."""

    def __init__(self, budget_bytes: int) -> None:
        self.num_slabs = max(_BATCH, budget_bytes // PIECE_BYTES)
        self._free: list[Slab] = []
        self._mapped = 0
        lock = threading.Lock()
        self._one, self._several = threading.Condition(lock), threading.Condition(lock)
        self._wanted = 0

    def acquire(self, timeout_s: float) -> Slab | None:
        """Return a free slab, or None when there is none for `timeout_s`."""
        with self._one:
            self._map(1)
            if not self._one.wait_for(lambda: self._free, timeout_s):
                return None
            # The slab given back last is taken first, while it is in the cache.
            return self._free.pop()

    def acquire_several(self, wanted: int, timeout_s: float) -> list[Slab]:
        """Return `wanted` slabs; fewer, or none, when they do not come free within `timeout_s`. For one thread.

        It is woken once for all of them: waking for each of 200 takes more from training than copying into it does.
        """
        with self._several:
            self._map(wanted)
            self._wanted = wanted
            self._several.wait_for(lambda: len(self._free) >= wanted, timeout_s)
            taken = self._free[-wanted:]
            del self._free[-wanted:]
            return taken

    def release(self, slab: Slab) -> None:
        """Give a slab back."""
        with self._one:
            self._free.append(slab)
            self._one.notify()
            if len(self._free) >= self._wanted:
                self._several.notify()

    @contextmanager
    def borrowed(self, timeout_s: float) -> Iterator[Slab]:
        """Hold a slab inside. Raises SaveError when none comes free in time."""
        slab = self.acquire(timeout_s)
        if slab is None:
            raise SaveError(f"no buffer came free for {timeout_s:g} s: the disk has stopped")
        try:
            yield slab
        finally:
            self.release(slab)

    def close(self) -> None:
        """Forget the memory. Slabs that a hung write still holds keep theirs alive."""
        with self._one:
            self._free.clear()

    def _map(self, wanted: int) -> None:
        # First touch of pages is dear in virtual machines: once, here, and not in the copies.
        while len(self._free) < wanted and self._mapped < self.num_slabs:
            count = min(_BATCH, self.num_slabs - self._mapped)
            memory = fresh(count * PIECE_BYTES).zero_()
            start, view = memory.data_ptr(), memory.numpy().data
            cuts = range(0, count * PIECE_BYTES, PIECE_BYTES)
            self._free += [Slab(start + at, view[at : at + PIECE_BYTES]) for at in cuts]
            self._mapped += count
