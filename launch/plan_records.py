"""What a plan is made of: a layout, and what it is predicted to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from launch.compose import EngineName
from launch.config import FinetuneConfig
from launch.recipe import flatten_config
from pipeline.config import PipelineConfig

_PLANNED = ("ranks", "schedule", "timeout_s")
_NOT_PLANNED = {"moe.esp": 1} | {
    f"pipeline.{field.name}": field.default for field in fields(PipelineConfig) if field.name not in _PLANNED
}
"""Settings that no layout has, as every layout needs them."""


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

    def settings(self, recipe: FinetuneConfig) -> dict[str, Any]:
        """Return its chunks, and the settings that have to be others than a recipe's to make it."""
        spread, one_level = self.ep > 1, {"moe.exchange": "direct", "moe.node_ranks": 1}
        unfit = one_level if spread and self.ep % recipe.moe.node_ranks else {}
        wanted = {
            "pipeline.ranks": self.pp, "pipeline.schedule": self.schedule, "moe.ep": self.ep if spread else None,
            "engine": self.engine, **_NOT_PLANNED, **(unfit if spread else {"moe.plan": None, **one_level}),
        }  # fmt: skip
        given = flatten_config(recipe)
        chunks = {"chunks.chunk_tokens": self.chunk_tokens, "chunks.retain": self.retain}
        return chunks | {key: value for key, value in wanted.items() if given[key] != value}


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


def size(num_bytes: float) -> str:
    """Return bytes as a plan prints them: `0.3 MB`, `80.0 GB`."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
