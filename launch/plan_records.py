"""What a plan is made of: a layout, and what it is predicted to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from launch.compose import EngineName


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a job would be laid out."""

    pp: int
    ep: int
    data: int
    """Ranks, or pipelines, that share the data."""
    engine: EngineName
    schedule: str
    chunk_tokens: int
    retain: int

    def settings(self) -> dict[str, Any]:
        """Return it as settings of a recipe."""
        found: dict[str, Any] = {"chunks.chunk_tokens": self.chunk_tokens, "chunks.retain": self.retain}
        if self.pp > 1:
            found |= {"pipeline.ranks": self.pp, "pipeline.schedule": self.schedule}
        if self.ep > 1:
            found["moe.ep"] = self.ep
        return found | ({"engine": self.engine} if self.engine != "ddp" else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step is predicted to be, without its reduction."""

    seconds: float
    bubble: float
    memory_bytes: float
    """On the fullest device, at the worst moment."""
    simulated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a layout is predicted to do in one optimizer step."""

    layout: Layout
    step_s: float
    bubble: float
    """Idle share of a pipeline's devices while it runs."""
    balance: float
    """Mean work of the data-parallel ranks over the busiest one's."""
    reduce_s: float
    held_bytes: float
    """Weights, gradients and moments, on the fullest device."""
    memory_bytes: float
    """All that is predicted there at the worst moment."""
    simulated: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)
