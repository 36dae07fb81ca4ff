"""The only place that opens, writes, fsyncs, renames and unlinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpointing.errors import CheckpointError
from checkpointing.storage.local import LocalStorage

_STORES = ("s3", "gs", "az")


def open_storage(text: str) -> tuple[Path, Any]:
    """Return (root, storage) of a path, or of `s3://bucket/prefix` (needs `pip install longrail[s3]`).

    Raises CheckpointError on what is neither.
    """
    scheme, separator, rest = text.partition(":/")
    is_store = rest.startswith("/") and scheme in _STORES and rest.strip("/")
    if not is_store and ("://" in text or (separator and scheme in _STORES)):
        raise CheckpointError(f"{text!r} is neither a folder nor s3://bucket/prefix (or gs://, az://)")
    if "://" not in text:
        return Path(text).absolute(), LocalStorage()
    from checkpointing.storage.object_store import ObjectStorage

    return ObjectStorage.open_url(text)
