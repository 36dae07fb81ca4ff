"""The only place that opens, writes, fsyncs, renames and unlinks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from checkpointing.errors import CheckpointError
from checkpointing.storage.local import LocalStorage

_STORES = ("s3", "gs", "az")


def is_store(path: str | os.PathLike[str]) -> bool:
    """Return whether a text means an object store, also one of which a `Path` has taken a slash: `s3:/bucket/run`."""
    scheme, separator, _ = os.fspath(path).partition(":/")
    return "://" in os.fspath(path) or bool(separator and scheme in _STORES)


def is_place(text: str) -> bool:
    """Return whether a text is a folder's name or a whole URL of an object store; not whether anything is there."""
    scheme, _, rest = text.partition(":/")
    whole = rest.startswith("/") and scheme in _STORES and rest.strip("/")
    return bool(text) and (bool(whole) or not is_store(text))


def open_storage(text: str) -> tuple[Path, Any]:
    """Return (root, storage) of a path, or of `s3://bucket/prefix` (needs `pip install longrail[s3]`).

    Raises CheckpointError on what is neither.
    """
    if not is_place(text):
        raise CheckpointError(f"{text!r} is neither a folder nor s3://bucket/prefix")
    if "://" not in text:
        return Path(text).absolute(), LocalStorage()
    from checkpointing.storage.object_store import ObjectStorage

    return ObjectStorage.open_url(text)
