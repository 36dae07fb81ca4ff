"""Which rank of how many this process is."""

from __future__ import annotations

import torch.distributed as dist

from chunkflow.errors import PlanError


def resolve_place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return (rank, world size), from the default process group where they are not given."""
    if (rank is None) != (world_size is None):
        raise PlanError(f"rank is {rank} and world_size is {world_size}; give both, or neither")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise PlanError(f"rank is {rank} in a world of {world_size}; it must be 0 to {world_size - 1}")
        return rank, world_size
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if dist.is_available() and dist.is_torchelastic_launched():
        raise PlanError(
            "this process was started by torchrun and torch.distributed is not initialised, so every rank would load "
            "rank 0's data; call torch.distributed.init_process_group() first, or give rank and world_size"
        )
    return 0, 1
