"""checkpointing: checkpoints that are whole or absent, verified on load."""

from checkpointing.checkpointer import SINGLE, Checkpointer
from checkpointing.errors import CheckpointError
from checkpointing.handle import SaveHandle
from checkpointing.records import RestoreInfo
from checkpointing.retention import KeepLast

__all__ = ["SINGLE", "CheckpointError", "Checkpointer", "KeepLast", "RestoreInfo", "SaveHandle"]
