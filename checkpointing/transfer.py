"""Bytes to and from a data file, hashed on the way. The only two loops over tensor bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import xxhash

from checkpointing.errors import IntegrityError
from checkpointing.records import FileEntry, TensorEntry
from checkpointing.storage.local import CHUNK_BYTES, LocalStorage


def write_file(
    storage: LocalStorage,
    path: Path,
    length: int,
    blocks: Iterable[Callable[[], memoryview | bytes]],
    wrote: Callable[[int], None],
) -> tuple[str, list[str]]:
    """Write the blocks one behind the other into a new file and make it durable.

    `blocks` are made one at a time, so that at most one copy of a tensor is alive. `wrote` is told of every piece in
    bytes. Returns the hash of the file and the hash of each block. Raises OSError.
    """
    whole, hashes = xxhash.xxh3_64(), []
    fd = storage.create(path, length)
    try:
        for block in blocks:
            data, own = memoryview(block()), xxhash.xxh3_64()
            for at in range(0, len(data), CHUNK_BYTES):
                piece = data[at : at + CHUNK_BYTES]
                own.update(piece)
                whole.update(piece)
                storage.write(fd, piece)
                wrote(len(piece))
            hashes.append(own.hexdigest())
        storage.sync(fd)
    finally:
        storage.close(fd)
    return whole.hexdigest(), hashes


def verify_file(
    storage: LocalStorage, folder: Path, file: FileEntry, tensors: Sequence[TensorEntry], alive: Callable[[], None]
) -> None:
    """Read every byte of a file. Raises IntegrityError naming the file, and the first tensor whose bytes differ."""
    where = f"{folder.name}/{file.path}"
    check_length(storage, folder, file)
    whole, at = xxhash.xxh3_64(), 0
    fd = storage.open(folder / file.path)
    try:
        for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
            _hash_range(storage, fd, at, tensor.begin, [whole], where, alive)
            own = xxhash.xxh3_64()
            _hash_range(storage, fd, tensor.begin, tensor.end, [whole, own], where, alive)
            if own.hexdigest() != tensor.xxh3_64:
                raise IntegrityError(_damaged(where, tensor))
            at = tensor.end
        _hash_range(storage, fd, at, file.length, [whole], where, alive)
    finally:
        storage.close(fd)
    if whole.hexdigest() != file.xxh3_64:
        raise IntegrityError(f"{where}: the header or the padding is not what was saved, though every tensor is")


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


def read_tensor(storage: LocalStorage, fd: int, where: str, entry: TensorEntry, into: memoryview) -> None:
    """Fill `into` with the bytes of a tensor. Raises IntegrityError when they are not what was saved."""
    own = xxhash.xxh3_64()
    for at in range(0, len(into), CHUNK_BYTES):
        piece = into[at : at + CHUNK_BYTES]
        storage.read_into(fd, piece, entry.begin + at)
        own.update(piece)
    if own.hexdigest() != entry.xxh3_64:
        raise IntegrityError(_damaged(where, entry))


def _hash_range(
    storage: LocalStorage,
    fd: int,
    begin: int,
    end: int,
    hashes: Sequence[xxhash.xxh3_64],
    where: str,
    alive: Callable[[], None],
) -> None:
    buffer = memoryview(bytearray(min(CHUNK_BYTES, end - begin)))
    for at in range(begin, end, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, end - at)]
        if storage.read_into(fd, piece, at) != len(piece):
            raise IntegrityError(f"{where}: ends before byte {at + len(piece)}, while it was read")
        for one in hashes:
            one.update(piece)
        alive()


def _damaged(where: str, tensor: TensorEntry) -> str:
    return f"{where}: tensor {tensor.name!r} (bytes {tensor.begin}..{tensor.end}) is not what was saved"
