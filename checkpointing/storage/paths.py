"""Paths below a bucket, which are written as addresses."""

from __future__ import annotations

import os
from pathlib import Path, PosixPath

STORES = ("s3", "gs", "az")


class StorePath(PosixPath):
    """A path in an object store: `s3:` and `bucket` are its first parts, and its text is `s3://bucket/...` again."""

    def __str__(self) -> str:
        text = super().__str__()
        scheme, separator, rest = text.partition(":/")
        return f"{scheme}://{rest.lstrip('/')}" if separator and scheme in STORES else text


def is_store(path: str | os.PathLike[str]) -> bool:
    """Return whether a text means an object store, also one of which a `Path` has taken a slash: `s3:/bucket/run`."""
    scheme, separator, _ = os.fspath(path).partition(":/")
    return "://" in os.fspath(path) or bool(separator and scheme in STORES)


def as_path(text: str) -> Path:
    """Return the path of a folder, or of a place in an object store, which keeps both its slashes."""
    return StorePath(text) if is_store(text) else Path(text)


def is_place(text: str) -> bool:
    """Return whether a text is a folder's name or a whole URL of an object store; not whether anything is there."""
    scheme, _, rest = text.partition(":/")
    whole = rest.startswith("/") and scheme in STORES and rest.strip("/")
    return bool(text) and (bool(whole) or not is_store(text))
