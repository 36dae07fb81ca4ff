"""How kernels are compiled: once a machine, and without the GIL, so that planning ahead does not slow the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(fn: F) -> F:
    """Compile a function over numpy arrays and numbers; sums keep the order they are written in, on any machine."""
    try:
        return cast(F, numba.njit(nogil=True, cache=True)(fn))
    except RuntimeError:  # no folder for the cache can be written to: compiled anew in every process, in a few seconds
        return cast(F, numba.njit(nogil=True)(fn))
