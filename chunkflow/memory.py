"""Resident memory of this process, as Linux counts it, and the one glibc setting that makes the count repeatable."""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path

_M_MMAP_THRESHOLD = -3
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def fix_mmap_threshold(threshold_bytes: int) -> bool:
    """Give memory of `threshold_bytes` and more back to the system when it is freed; return whether glibc agreed.

    Left alone, glibc raises its threshold to the largest block ever freed (up to 32 MiB) and keeps what it frees, 25 to
    60 MB of a small job. A low threshold costs page faults on every large tensor: 1 MiB is nearly free, 64 KiB is for
    measurements. Process-wide; call once, early.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, threshold_bytes) == 1


def resident_bytes() -> int:
    """Return the resident set of this process now."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Return the largest resident set since the process began, or since `reset_peak`."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Begin to measure the peak anew."""
    _CLEAR_REFS.write_text("5")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}; resident memory is read on Linux only")
