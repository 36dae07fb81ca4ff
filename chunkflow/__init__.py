"""chunkflow: uniform chunks of long-tailed sequences, trained with exact gradients.

Read in this order: `records` (the words), `plan` (what runs where), `loader`, `executor` (how a step runs), `runner`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chunkflow.errors import ChunkflowError, PlanError, SourceError, StateError, UnsupportedModelError
    from chunkflow.records import Chunk, Segment, StepBatch
    from chunkflow.runner import ChunkRunner
    from chunkflow.world import SINGLE

_HOME = {
    "SINGLE": "world",
    "Chunk": "records",
    "ChunkRunner": "runner",
    "ChunkflowError": "errors",
    "PlanError": "errors",
    "Segment": "records",
    "SourceError": "errors",
    "StateError": "errors",
    "StepBatch": "records",
    "UnsupportedModelError": "errors",
}
"""Where each public name lives. They are imported on first use: planning needs neither torch nor transformers."""

__all__ = [
    "SINGLE",
    "Chunk",
    "ChunkRunner",
    "ChunkflowError",
    "PlanError",
    "Segment",
    "SourceError",
    "StateError",
    "StepBatch",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chunkflow' has no attribute {name!r}")
    return getattr(import_module(f"chunkflow.{_HOME[name]}"), name)
