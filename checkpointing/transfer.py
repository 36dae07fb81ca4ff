"""Bytes to a data file, hashed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash

from checkpointing.errors import IntegrityError
from checkpointing.pieces import PIECE_BYTES, piece_ranges
from checkpointing.records import FileEntry
from checkpointing.storage.local import LocalStorage


def write_file(
    storage: LocalStorage,
    path: Path,
    length: int,
    blocks: Iterable[Callable[[], memoryview | bytes]],
    wrote: Callable[[int], None],
) -> list[list[str]]:
    """Write the blocks one behind the other into a new file and make it durable.

    `blocks` are made one at a time, so that at most one copy of a tensor is alive. `wrote` is told of every piece in
    bytes. Returns the hashes of the pieces of each block. Raises OSError.
    """
    hashes: list[list[str]] = []
    fd, at = storage.create(path, length), 0
    try:
        for block in blocks:
            data = memoryview(block())
            pieces = [data[a - at : b - at] for a, b in piece_ranges(at, at + len(data), PIECE_BYTES)]
            hashes.append([])
            for piece in pieces:
                hashes[-1].append(xxhash.xxh3_64_hexdigest(piece))
                storage.write(fd, piece)
                wrote(len(piece))
            at += len(data)
        storage.sync(fd)
    finally:
        storage.close(fd)
    return hashes


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
