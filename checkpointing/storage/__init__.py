"""The only place that opens, writes, fsyncs, renames and unlinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpointing.storage.local import LocalStorage


def open_storage(text: str) -> tuple[Path, Any]:
    """Return (root, storage) of a path, or of `s3://bucket/prefix` (needs `pip install longrail[s3]`)."""
    if "://" not in text:
        return Path(text).absolute(), LocalStorage()
    from checkpointing.storage.object_store import ObjectStorage

    return ObjectStorage.open_url(text)
