"""Bytes from a data file, hashed on the way; and small files, written whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from checkpointing.errors import IntegrityError
from checkpointing.pieces import piece_ranges
from checkpointing.records import FileEntry, TensorEntry
from checkpointing.storage.local import CHUNK_BYTES, LocalStorage


def write_small(storage: LocalStorage, path: Path, data: bytes) -> None:
    """Write a new file and make it durable. Raises OSError."""
    fd = storage.create(path, len(data))
    try:
        storage.write(fd, data)
        storage.sync(fd)
    finally:
        storage.close(fd)


def verify_file(
    storage: LocalStorage,
    folder: Path,
    file: FileEntry,
    tensors: Sequence[TensorEntry],
    piece_bytes: int,
    alive: Callable[[], None],
) -> None:
    """Read every byte of a file that a hash covers.

    Raises IntegrityError naming the file, and the first tensor and piece whose bytes differ.
    """
    where = f"{folder.name}/{file.path}"
    check_length(storage, folder, file)
    fd = storage.open(folder / file.path)
    try:
        for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
            ranges = piece_ranges(tensor.begin, tensor.end, piece_bytes)
            for (begin, end), said in zip(ranges, tensor.hashes, strict=True):
                if _hash_range(storage, fd, begin, end, where, alive) != said:
                    raise IntegrityError(_damaged(where, tensor, begin, end))
        # Last, since format 1 has one hash for head and tensors together, and a tensor is better named.
        if _hash_range(storage, fd, 0, file.head_bytes, where, alive) != file.xxh3_64:
            raise IntegrityError(f"{where}: the header or the padding is not what was saved, though every tensor is")
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


def read_tensor(
    storage: LocalStorage, fd: int, where: str, entry: TensorEntry, piece_bytes: int, into: memoryview
) -> None:
    """Fill `into` with the bytes of a tensor. Raises IntegrityError when they are not what was saved."""
    ranges = piece_ranges(entry.begin, entry.end, piece_bytes)
    for (begin, end), said in zip(ranges, entry.hashes, strict=True):
        own = xxhash.xxh3_64()
        for at in range(begin, end, CHUNK_BYTES):
            piece = into[at - entry.begin : min(at + CHUNK_BYTES, end) - entry.begin]
            storage.read_into(fd, piece, at)
            own.update(piece)
        if own.hexdigest() != said:
            raise IntegrityError(_damaged(where, entry, begin, end))


def _hash_range(storage: LocalStorage, fd: int, begin: int, end: int, where: str, alive: Callable[[], None]) -> str:
    own, buffer = xxhash.xxh3_64(), memoryview(bytearray(min(CHUNK_BYTES, end - begin)))
    for at in range(begin, end, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, end - at)]
        if storage.read_into(fd, piece, at) != len(piece):
            raise IntegrityError(f"{where}: ends before byte {at + len(piece)}, while it was read")
        own.update(piece)
        alive()
    return own.hexdigest()


def _damaged(where: str, tensor: TensorEntry, begin: int, end: int) -> str:
    return f"{where}: tensor {tensor.name!r} (bytes {begin}..{end}) is not what was saved"
