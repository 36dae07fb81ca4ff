"""Words in shared memory: one process writes a number, others wait until it is there.

A word only grows while anybody waits for it. Waiting is a futex on its lower half: a waiter sleeps until the writer
wakes it, and looks again by itself every few milliseconds, since a wake may come before the sleep.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from typing import Any

from torch import Tensor

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None
_WAIT, _WAKE, _EVERYBODY = 0, 1, 2**31 - 1
_POLL_S = 0.0002


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Words:
    """The int64 words of a region of shared memory, uint8 [8 * num].

    A store of 8 aligned bytes is one store, and the processors this runs on (x86-64; AArch64 through the system call
    that wakes) let nobody see it before what was written earlier.
    """

    def __init__(self, region: Tensor) -> None:
        self._region = region  # keeps the mapping
        array: Any = region.numpy()  # a buffer, which numpy's types do not say in Python 3.11
        self._words = memoryview(array).cast("q")
        self._address = region.data_ptr()
        self._syscall = ctypes.CDLL(None).syscall if _FUTEX is not None else None

    def __getitem__(self, word: int) -> int:
        return self._words[word]

    def publish(self, word: int, value: int) -> None:
        """Set a word and wake who waits for it."""
        self._words[word] = value
        if self._syscall is not None:
            self._syscall(_FUTEX, ctypes.c_void_p(self._address + 8 * word), _WAKE, _EVERYBODY, None, None, 0)

    def sleep(self, word: int, seen: int, seconds: float) -> None:
        """Return when the word is no longer `seen`, or after some seconds, or now and then without a reason."""
        if self._syscall is None:
            time.sleep(min(seconds, _POLL_S))
            return
        whole = int(seconds)
        timeout = _Timespec(whole, int((seconds - whole) * 1e9))
        low = ctypes.c_uint32(seen & 0xFFFFFFFF)
        place = ctypes.c_void_p(self._address + 8 * word)
        self._syscall(_FUTEX, place, _WAIT, low, ctypes.byref(timeout), None, 0)
