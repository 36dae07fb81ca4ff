"""The fence before every optimizer step, and what is known of who steps what.

torch calls the hook before `step` of any optimizer of this process: subclasses, fused ones, optimizers in the backward
pass, and when GradScaler skips. A subclass that calls `super().step()` calls it twice.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import count
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
        # Numbered: the `id` of one that is gone may be that of a new one.
        self._seen: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._numbers = count()

    def note(self, optimizer: Optimizer) -> None:
        """Remember an optimizer that is about to step."""
        if optimizer not in self._seen:
            self._seen[optimizer] = next(self._numbers)

    def epoch(self) -> tuple[tuple[int, int, int], ...]:
        """Return something that changes when the memory that is owned may have changed."""
        return tuple(
            (number, len(one.state), sum(len(g["params"]) for g in one.param_groups))
            for one, number in self._seen.items()
        )

    def memory(self) -> Owned:
        """Return the memory that optimizers step: parameters and their slots."""
        return Owned(one for optimizer in self._seen for one in _tensors(optimizer))


class Owned:
    """Memory that optimizers step, by address: beside a parameter one storage may hold what changes in forward."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in sorted(map(_span, tensors)):
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            elif begin < end:
                self._begins.append(begin)
                self._ends.append(end)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether all elements of a tensor lie in it."""
        begin, end = _span(tensor)
        at = bisect_right(self._begins, begin) - 1
        return at >= 0 and end <= self._ends[at]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor: a DTensor's own `data_ptr` is 0."""
    return getattr(tensor, "_local_tensor", tensor)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one past the last; twice 0 where there are none."""
    here = local(tensor)
    if here.layout is not torch.strided or not (begin := here.data_ptr()):
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(here.shape, here.stride(), strict=True))
    return begin, begin + (last + 1) * here.itemsize


def _tensors(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for slots in optimizer.state.values():
        yield from (value for value in slots.values() if isinstance(value, torch.Tensor))
