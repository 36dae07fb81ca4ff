"""Random state of the CPU and the device, that a second forward has to see again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """State of the CPU's generator, and of the device's where that is another."""

    cpu: Tensor
    device: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """Return the state as it is."""
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return RandomState(torch.get_rng_state(), own)

    def set(self, device: torch.device) -> None:
        """Put the generators there."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)


@contextmanager
def replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """Run a block from a saved state, then go on from where the generators were."""
    before = RandomState.now(device)
    state.set(device)
    try:
        yield
    finally:
        before.set(device)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator, and the device's where that is another. (`torch.manual_seed` formats a stack trace.)"""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
