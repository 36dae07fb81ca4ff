"""Which processes share a job, from what the caller hands over."""

from __future__ import annotations

import torch.distributed as dist

from chunkflow.errors import ChunkflowError

SINGLE = "single"
"""As `group`: this process alone, whatever torch.distributed knows."""


def resolve_group(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """Return the process group to work in, None for one process.

    None means the default group where torch.distributed is initialised. Under torchrun it has to be: a rank that took
    itself for the only one would train on everything and save over the others.
    """
    if isinstance(group, str):
        if group != SINGLE:
            raise ChunkflowError(f"group is {group!r}; it must be a process group, SINGLE or None")
        return None
    if group is not None:
        return group
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    if dist.is_available() and dist.is_torchelastic_launched():
        raise ChunkflowError(
            "started by torchrun, but torch.distributed is not initialised; call init_process_group first, "
            "or pass group=SINGLE for a process of its own"
        )
    return None
