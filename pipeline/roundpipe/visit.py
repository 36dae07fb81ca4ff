"""One slot on one device for one round: what it brought there, until it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pipeline.roundpipe.arena import Lease
from pipeline.roundpipe.transfers import Job

Key = tuple[int, str]
"""Layer and parameter name."""


@dataclass(slots=True, eq=False)
class Visit:
    """Filled by the upload and by the first backward."""

    slot: int
    layers: tuple[int, int]
    step: int
    round: int
    version: int
    homes: frozenset[int]
    """Layers whose versions count for its weights."""
    weights: dict[Key, Tensor] = field(default_factory=dict)
    gradients: dict[Key, Tensor] = field(default_factory=dict)
    weight_leases: list[Lease] = field(default_factory=list)
    gradient_leases: list[Lease] = field(default_factory=list)
    tables: set[Key] = field(default_factory=set)
    """Of which a gradient has been added in this visit."""
    upload: Job | None = None
    download: Job | None = None
    first_step: int = 0
    """What errors call the first step of the run."""

    def __str__(self) -> str:
        return f"slot {self.slot}, step {self.first_step + self.step}, round {self.round}"

    def drop_weights(self) -> None:
        """Free the weights."""
        _drop(self.weights, self.weight_leases)

    def drop_gradients(self) -> None:
        """Free the gradients."""
        _drop(self.gradients, self.gradient_leases)


def _drop(tensors: dict[Key, Tensor], leases: list[Lease]) -> None:
    tensors.clear()
    for lease in leases:
        lease.free()
    leases.clear()
