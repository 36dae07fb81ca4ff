"""Which processes share a job, and which of them this is, from what the caller hands over."""

from __future__ import annotations

import torch.distributed as dist

from chunkflow.errors import ChunkflowError, PlanError

SINGLE = "single"
"""As `group`: this process alone, whatever torch.distributed knows."""


def resolve_group(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """Return the process group to work in, None for one process; by default the default group where there is one.

    Raises ChunkflowError under torchrun when there is none: a rank that took itself for the only one would train on
    everything and save over the others.
    """
    if isinstance(group, str):
        if group != SINGLE:
            raise ChunkflowError(f"group is {group!r}; it must be a process group, SINGLE or None")
        return None
    return group if group is not None else _default_group("pass group=SINGLE for a process of its own")


def resolve_place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return (rank, world size), where they are not given those of the default group, or (0, 1) without one."""
    if (rank is None) != (world_size is None):
        raise PlanError(f"rank is {rank} and world_size is {world_size}; give both, or neither")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise PlanError(f"rank is {rank} in a world of {world_size}; it must be 0 to {world_size - 1}")
        return rank, world_size
    group = _default_group("give rank and world_size")
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _default_group(instead: str) -> dist.ProcessGroup | None:
    if not dist.is_available():
        return None
    if dist.is_initialized():
        return dist.group.WORLD
    if dist.is_torchelastic_launched():
        raise ChunkflowError(
            "this process was started by torchrun and torch.distributed is not initialised, so every rank would take "
            f"itself for the only one; call torch.distributed.init_process_group() first, or {instead}"
        )
    return None
