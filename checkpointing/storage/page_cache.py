"""What of a file the page cache has, asked without reading anything into it.

A read that may not wait (RWF_NOWAIT) would tell, too, but begins to read what is not there.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

_CACHESTAT = 451
"""cachestat(2), Linux 6.5; the same number on every architecture but alpha."""


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently"))


def cached_bytes(fd: int, offset: int, length: int) -> int:
    """Return how many bytes of a range are in memory; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    found = _Stat()
    error = ctypes.CDLL(None).syscall(_CACHESTAT, fd, ctypes.byref(_Range(offset, length)), ctypes.byref(found), 0)
    return 0 if error else found.cached * mmap.PAGESIZE
