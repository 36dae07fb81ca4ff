"""The only place that opens, writes, fsyncs, renames and unlinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpointing.errors import CheckpointError
from checkpointing.storage.local import LocalStorage
from checkpointing.storage.paths import as_path, is_place, is_store

__all__ = ["as_path", "is_place", "is_store", "open_storage"]


def open_storage(text: str, patience_s: float = 600.0) -> tuple[Path, Any]:
    """Return (root, storage) of a path, or of `s3://bucket/prefix` (needs `pip install longrail[s3]`).

    A store that does not answer is an OSError well before `patience_s`, for which others wait for the caller. Raises
    CheckpointError on what is neither.
    """
    if not is_place(text):
        raise CheckpointError(f"{text!r} is neither a folder nor s3://bucket/prefix")
    if "://" not in text:
        return Path(text).absolute(), LocalStorage()
    from checkpointing.storage.object_store import ObjectStorage

    return ObjectStorage.open_url(text, patience_s)
