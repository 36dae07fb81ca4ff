"""How ranks hand bytes to each other during a load."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist


class Exchange(Protocol):
    """How ranks hand bytes to each other during a load."""

    rank: int

    def broadcast(self, data: torch.Tensor, reader: int) -> None:
        """Give all ranks what `reader` has; a collective."""
        ...

    def send(self, data: torch.Tensor, rank: int) -> None:
        """Give bytes to one rank, which must be receiving them."""
        ...

    def receive(self, data: torch.Tensor, rank: int) -> None:
        """Take bytes from one rank."""
        ...


class NoExchange:
    """One process: nothing to hand over."""

    rank = 0

    def broadcast(self, data: torch.Tensor, reader: int) -> None:
        """Nobody else."""

    def send(self, data: torch.Tensor, rank: int) -> None:
        """Nobody else."""

    def receive(self, data: torch.Tensor, rank: int) -> None:
        """Nobody else."""


class GroupExchange:
    """Over a process group; through its device where the group cannot move host memory.

    Raises RuntimeError when another rank does not take part within `timeout_s`; the group is of no use then.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.rank, self._group, self._timeout = dist.get_rank(group), group, timedelta(seconds=timeout_s)
        on_host = "cpu" in str(dist.get_backend_config(group)) or dist.get_backend(group) == "gloo"
        self._device = None if on_host else torch.accelerator.current_accelerator()

    def broadcast(self, data: torch.Tensor, reader: int) -> None:
        """Give all ranks what `reader` has; a collective."""
        moved = self._there(data)
        self._await(dist.broadcast(moved, group=self._group, group_src=reader, async_op=True))
        if moved is not data:
            data.copy_(moved)

    def send(self, data: torch.Tensor, rank: int) -> None:
        """Give bytes to one rank."""
        self._await(dist.isend(self._there(data), group=self._group, group_dst=rank))

    def receive(self, data: torch.Tensor, rank: int) -> None:
        """Take bytes from one rank."""
        moved = self._there(data)
        self._await(dist.irecv(moved, group=self._group, group_src=rank))
        if moved is not data:
            data.copy_(moved)

    def _await(self, work: dist.Work | None) -> None:
        if work is not None:
            work.wait(self._timeout)

    def _there(self, data: torch.Tensor) -> torch.Tensor:
        return data if self._device is None else data.to(self._device)


def open_exchange(group: dist.ProcessGroup | str | None, world_size: int, timeout_s: float) -> Exchange:
    """Return how the ranks of a group, or of the default one, hand bytes over."""
    if world_size == 1:
        return NoExchange()
    members = group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD
    assert members is not None
    return GroupExchange(members, timeout_s)
