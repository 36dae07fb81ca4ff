"""How the planner's inner loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call; keep the machine code on disk where a folder for it can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba raises where neither the package's nor the user's cache folder is writable
        return njit(nogil=True)(function)
