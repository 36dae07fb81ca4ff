"""What `doctor` and the audits return, and how ranks tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, where, and what to do."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


def from_all_ranks(own: list[Finding]) -> list[Finding]:
    """Return the findings of all ranks, on every rank. Every rank calls."""
    return [finding for part in gather(own) for finding in part]


def gather(own: Any) -> list[Any]:
    """Return what every rank gave, by rank, on every rank. Every rank calls."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every
