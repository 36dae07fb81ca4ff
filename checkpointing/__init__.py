"""checkpointing: lazy, asynchronous checkpoints that are whole or absent, verified on load.

Names are loaded on first use, so that `checkpoint verify` and its like run without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpointing.checkpointer import SINGLE, Checkpointer
    from checkpointing.config import CheckpointConfig
    from checkpointing.errors import (
        CheckpointError,
        FormatError,
        IntegrityError,
        PassedOverError,
        RankError,
        SaveError,
        StateError,
        VersionError,
    )
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
    "SINGLE", "CheckpointConfig", "CheckpointError", "Checkpointer", "CompositeProvider", "Cost", "FormatError",
    "IntegrityError", "KeepBest", "KeepEvery", "KeepLast", "Mutability", "ObjectProvider", "PassedOverError", "Place",
    "Provider", "RankError", "RestoreInfo", "SaveError", "SaveHandle", "StateError", "TensorProvider", "VersionError",
]  # fmt: skip

_ERRORS = (
    "CheckpointError", "FormatError", "IntegrityError", "PassedOverError", "RankError", "SaveError", "StateError",
    "VersionError",
)  # fmt: skip
_HOMES = {
    "SINGLE": "checkpointer",
    "Checkpointer": "checkpointer",
    "CheckpointConfig": "config",
    **dict.fromkeys(_ERRORS, "errors"),
    "SaveHandle": "handle",
    "RestoreInfo": "records",
    **dict.fromkeys(("KeepBest", "KeepEvery", "KeepLast"), "retention"),
    **dict.fromkeys(
        ("CompositeProvider", "Cost", "Mutability", "ObjectProvider", "Place", "Provider", "TensorProvider"),
        "providers",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'checkpointing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"checkpointing.{_HOMES[name]}"), name)
