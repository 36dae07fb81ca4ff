"""checkpointing: lazy, asynchronous checkpoints that are whole or absent, verified on load."""

from checkpointing.checkpointer import SINGLE, Checkpointer
from checkpointing.errors import CheckpointError
from checkpointing.handle import SaveHandle
from checkpointing.providers import (
    CompositeProvider,
    Cost,
    Mutability,
    ObjectProvider,
    Place,
    Provider,
    TensorProvider,
)
from checkpointing.records import RestoreInfo
from checkpointing.retention import KeepBest, KeepEvery, KeepLast

__all__ = [
    "SINGLE", "CheckpointError", "Checkpointer", "CompositeProvider", "Cost", "KeepBest", "KeepEvery", "KeepLast",
    "Mutability", "ObjectProvider", "Place", "Provider", "RestoreInfo", "SaveHandle", "TensorProvider",
]  # fmt: skip
