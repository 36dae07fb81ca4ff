"""Chunks under the user's autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_weight_cache(device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast that is on, without its cache of cast weights; nothing where none is on.

    The cache would hand the weights that were cast in a forward without graph, which have no gradient, to the forward
    with one, and both of a chunk's forwards run within one autocast.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
