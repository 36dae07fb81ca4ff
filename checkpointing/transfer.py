"""Small files, written whole; and their lengths."""

from __future__ import annotations

from pathlib import Path

from checkpointing.errors import IntegrityError
from checkpointing.records import FileEntry
from checkpointing.storage.local import LocalStorage


def write_small(storage: LocalStorage, path: Path, data: bytes) -> None:
    """Write a new file and make it durable. Raises OSError."""
    fd = storage.create(path, len(data))
    try:
        storage.write(fd, data)
        storage.sync(fd)
    finally:
        storage.close(fd)


def check_length(storage: LocalStorage, folder: Path, file: FileEntry) -> None:
    """Raise IntegrityError when the file is missing, cut or grown."""
    where = f"{folder.name}/{file.path}"
    try:
        length = storage.length(folder / file.path)
    except OSError as error:
        raise IntegrityError(f"{where}: {error.strerror}") from error
    if length != file.length:
        change = "cut" if length < file.length else "grown"
        raise IntegrityError(f"{where}: {length} bytes long and saved with {file.length}: it was {change}")
