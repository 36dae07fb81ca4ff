"""chunkflow: uniform chunks of long-tailed sequences, trained with exact gradients.

Read in this order: `records` (the words), `plan` (what runs where), `loader`, `executor` (how a step runs), `runner`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chunkflow.audit import AuditReport
    from chunkflow.balance import OnlineBalance
    from chunkflow.check import ExactReport, check_exact
    from chunkflow.config import PlannerConfig
    from chunkflow.errors import ChunkflowError, PlanError, SourceError, StateError, UnsupportedModelError
    from chunkflow.fit import CostModel
    from chunkflow.loader import ChunkLoader
    from chunkflow.overflow import Overflow
    from chunkflow.plan import StepPlan, plan_step
    from chunkflow.records import Chunk, Segment, StepBatch
    from chunkflow.runner import ChunkRunner
    from chunkflow.sources import Sample, Source
    from chunkflow.sources_jsonl import JsonLines
    from chunkflow.sources_memory import MemorySource
    from chunkflow.sources_open import open_source
    from chunkflow.sources_tables import FromDataset, ParquetFiles
    from chunkflow.sources_text import TextFolder
    from chunkflow.stream import StreamLoader
    from chunkflow.world import SINGLE

_HOME = {
    "AuditReport": "audit",
    "Chunk": "records",
    "ChunkLoader": "loader",
    "ChunkRunner": "runner",
    "ChunkflowError": "errors",
    "CostModel": "fit",
    "ExactReport": "check",
    "FromDataset": "sources_tables",
    "JsonLines": "sources_jsonl",
    "MemorySource": "sources_memory",
    "OnlineBalance": "balance",
    "Overflow": "overflow",
    "ParquetFiles": "sources_tables",
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
    "StreamLoader": "stream",
    "TextFolder": "sources_text",
    "UnsupportedModelError": "errors",
    "check_exact": "check",
    "open_source": "sources_open",
    "plan_step": "plan",
}
"""Where each public name lives. They are imported on first use: planning needs neither torch nor transformers."""

__all__ = [
    "SINGLE",
    "AuditReport",
    "Chunk",
    "ChunkLoader",
    "ChunkRunner",
    "ChunkflowError",
    "CostModel",
    "ExactReport",
    "FromDataset",
    "JsonLines",
    "MemorySource",
    "OnlineBalance",
    "Overflow",
    "ParquetFiles",
    "PlanError",
    "PlannerConfig",
    "Sample",
    "Segment",
    "Source",
    "SourceError",
    "StateError",
    "StepBatch",
    "StepPlan",
    "StreamLoader",
    "TextFolder",
    "UnsupportedModelError",
    "check_exact",
    "open_source",
    "plan_step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chunkflow' has no attribute {name!r}")
    return getattr(import_module(f"chunkflow.{_HOME[name]}"), name)
