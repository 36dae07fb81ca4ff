"""Random state that a second forward has to see again, for dropout outside attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the state of the CPU's generator and of the device's, if that is another."""
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), on_device


@contextmanager
def replay(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Run a block from a saved state, then go on from where the generators were."""
    now = rng_state(device)
    _set(state, device)
    try:
        yield
    finally:
        _set(now, device)


def _set(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)
