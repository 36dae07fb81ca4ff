"""Settings of expert-parallel layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import MoeConfigError

EXCHANGES = ("direct", "1d", "2d")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """How the experts of a model are spread; the axes themselves come with the mesh."""

    exchange: Literal["direct", "1d", "2d"] = "direct"
    """The all-to-all: straight, or over two levels through one rank a node (1d) or all of them (2d)."""
    node_ranks: int = 1
    """Ranks of the `ep` axis on one node; read by the two-level exchanges only."""
    timeout_s: float = 300.0
    """After this a collective whose peer does not come is an error that names rank, layer and operation."""
    grouped_mm: bool = True
    """Use `torch.nn.functional.grouped_mm` where the dtype and the sizes allow; False: one product an expert."""

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise MoeConfigError(f"exchange is {self.exchange!r}; choose one of {', '.join(EXCHANGES)}")
        if self.node_ranks < 1:
            raise MoeConfigError(f"node_ranks is {self.node_ranks}; it must be at least 1")
        if not self.timeout_s > 0:
            raise MoeConfigError(f"timeout_s is {self.timeout_s}; it must be positive, in seconds")
