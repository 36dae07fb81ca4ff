"""Memory of a load or save: fresh pages, and the garbage collector."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LARGE = 256 * 2**10
_HUGE_PAGE = 2 * 2**20


def fresh(num_bytes: int) -> torch.Tensor:
    """Return uint8 [num_bytes], aligned to a page when it is large.

    In huge pages where the system has them: touching small ones for the first time costs as much as reading does.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or num_bytes < _LARGE:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")  # whatever the default device is
    # Linux aligns a mapping to huge pages when its length is a multiple of theirs; what is not touched costs nothing.
    length = num_bytes + (-num_bytes % _HUGE_PAGE if num_bytes >= _HUGE_PAGE else 0)
    mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(advice)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking at every object of the process again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
