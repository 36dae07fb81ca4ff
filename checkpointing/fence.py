"""The fence before every optimizer step, and what is known of who steps what.

torch calls the hook before `step` of any optimizer of this process: subclasses, fused ones, optimizers in the backward
pass, and when GradScaler skips. A subclass that calls `super().step()` calls it twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StepHook:
    """Calls `fence` before every optimizer step of the process, until `remove`."""

    def __init__(self, owners: Owners, fence: Callable[[], None]) -> None:
        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            owners.note(optimizer)
            fence()

        self._handle = register_optimizer_step_pre_hook(before_step)

    def remove(self) -> None:
        """Take the hook away; may be called twice."""
        self._handle.remove()


class Owners:
    """The optimizers that were seen to step: their tensors change behind the fence only, so they may be copied late."""

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def note(self, optimizer: Optimizer) -> None:
        """Remember an optimizer that is about to step."""
        self._seen.add(optimizer)

    def epoch(self) -> tuple[tuple[int, int, int], ...]:
        """Return something that changes when the memory that is owned may have changed."""
        return tuple(
            sorted((id(one), len(one.state), sum(len(g["params"]) for g in one.param_groups)) for one in self._seen)
        )

    def storages(self) -> set[int]:
        """Return where the memory lies that optimizers step: parameters and their slots."""
        return {local(one).untyped_storage().data_ptr() for optimizer in self._seen for one in _tensors(optimizer)}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor: a DTensor's own `data_ptr` is 0."""
    return getattr(tensor, "_local_tensor", tensor)


def _tensors(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for slots in optimizer.state.values():
        yield from (value for value in slots.values() if isinstance(value, torch.Tensor))
