"""chunkflow: uniform chunks of long-tailed sequences, trained with exact gradients.

Read in this order: `records` (the words), `plan` (what runs where), `loader`, `executor` (how a step runs), `runner`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chunkflow.check import ExactReport, check_exact
    from chunkflow.config import PlannerConfig
    from chunkflow.errors import ChunkflowError, PlanError, SourceError, StateError, UnsupportedModelError
    from chunkflow.loader import ChunkLoader
    from chunkflow.plan import StepPlan, plan_step
    from chunkflow.records import Chunk, Segment, StepBatch
    from chunkflow.runner import ChunkRunner
    from chunkflow.sources import Sample, Source
    from chunkflow.sources_jsonl import JsonLines
    from chunkflow.sources_memory import MemorySource
    from chunkflow.sources_text import TextFolder
    from chunkflow.world import SINGLE

_HOME = {
    "Chunk": "records",
    "ChunkLoader": "loader",
    "ChunkRunner": "runner",
    "ChunkflowError": "errors",
    "ExactReport": "check",
    "JsonLines": "sources_jsonl",
    "MemorySource": "sources_memory",
    "PlanError": "errors",
    "PlannerConfig": "config",
    "SINGLE": "world",
    "Sample": "sources",
    "Segment": "records",
    "Source": "sources",
    "SourceError": "errors",
    "StateError": "errors",
    "StepBatch": "records",
    "StepPlan": "plan",
    "TextFolder": "sources_text",
    "UnsupportedModelError": "errors",
    "check_exact": "check",
    "plan_step": "plan",
}
"""Where each public name lives. They are imported on first use: planning needs neither torch nor transformers."""

__all__ = [
    "SINGLE",
    "Chunk",
    "ChunkLoader",
    "ChunkRunner",
    "ChunkflowError",
    "ExactReport",
    "JsonLines",
    "MemorySource",
    "PlanError",
    "PlannerConfig",
    "Sample",
    "Segment",
    "Source",
    "SourceError",
    "StateError",
    "StepBatch",
    "StepPlan",
    "TextFolder",
    "UnsupportedModelError",
    "check_exact",
    "plan_step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chunkflow' has no attribute {name!r}")
    return getattr(import_module(f"chunkflow.{_HOME[name]}"), name)
