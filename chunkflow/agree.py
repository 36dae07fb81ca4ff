"""Do all ranks load the same thing? Asked before the first step, since afterwards they would hang or train nonsense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from chunkflow.errors import PlanError


def require_agreement(group: dist.ProcessGroup, settings: Mapping[str, Any]) -> None:
    """Compare flat settings over a group. Every rank calls; raises the same PlanError on all, or on none."""
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, dict(settings), group=group)
    difference = first_difference(answers)
    if difference is not None:
        raise PlanError(difference)


def first_difference(answers: Sequence[Mapping[str, Any]]) -> str | None:
    """Return in words how two ranks differ, None when all agree. Pure."""
    ours = answers[0]
    for rank, theirs in enumerate(answers):
        keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
        if keys:
            parts = ", ".join(f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}" for key in keys)
            return f"the loaders of ranks 0 and {rank} differ: {parts}; give every rank the same data and settings"
    return None
