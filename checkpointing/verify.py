"""Read every byte that a checkpoint refers to and say what differs from what was saved. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from checkpointing.errors import IntegrityError
from checkpointing.pieces import piece_ranges
from checkpointing.records import FileEntry, Manifest
from checkpointing.storage.local import LocalStorage

READ_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not what was saved."""

    file: str
    """`step-20/rank-00000.safetensors`"""
    reason: str
    tensor: str | None = None
    piece: int | None = None
    """Which piece of the tensor (of the slice in this file), from 0."""
    begin: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        if self.tensor is None:
            return f"{self.file}: {self.reason}"
        return f"{self.file}: tensor {self.tensor!r}, piece {self.piece} (bytes {self.begin}..{self.end}) {self.reason}"


def damages(
    storage: LocalStorage, folder: Path, manifest: Manifest, file: FileEntry, read: Callable[[int], None]
) -> Iterator[Damage]:
    """Yield every damage of one file of a checkpoint, in the order of its bytes; `read` is told of bytes read."""
    where = f"{folder.name}/{file.path}"
    try:
        length = storage.length(folder / file.path)
        if length != file.length:
            change = "cut" if length < file.length else "grown"
            yield Damage(where, f"{length} bytes long and saved with {file.length}: it was {change}")
            return
        fd = storage.open(folder / file.path)
        try:
            yield from _in_file(_Bytes(storage, fd, read), where, manifest, file)
        finally:
            storage.close(fd)
    except OSError as error:
        yield Damage(where, error.strerror or str(error))


def check_head(storage: LocalStorage, folder: Path, file: FileEntry) -> None:
    """Raise IntegrityError unless the header is what was saved; cheap, but for format 1: one hash covers its files."""
    where = f"{folder.name}/{file.path}"
    try:
        fd = storage.open(folder / file.path)
        try:
            right = _Bytes(storage, fd, lambda _: None).hash_of(0, file.head_bytes) == file.xxh3_64
        finally:
            storage.close(fd)
    except OSError as error:
        raise IntegrityError(f"{where}: {error.strerror}") from error
    if not right:
        raise IntegrityError(f"{where}: {_HEAD}")


def raise_first(found: Iterator[Damage]) -> None:
    """Raise IntegrityError of the first damage, if there is one."""
    for damage in found:
        raise IntegrityError(str(damage))


_HEAD = "the header or the padding is not what was saved, though every tensor is"


class _Bytes:
    """A file, read through one buffer that is used again and again."""

    def __init__(self, storage: LocalStorage, fd: int, read: Callable[[int], None]) -> None:
        self._storage, self._fd, self._read = storage, fd, read
        self._buffer = memoryview(bytearray(READ_BYTES))

    def parts(self, begin: int, end: int) -> Iterator[memoryview]:
        for at in range(begin, end, READ_BYTES):
            part = self._buffer[: min(READ_BYTES, end - at)]
            if self._storage.read_into(self._fd, part, at) != len(part):
                raise OSError(5, f"ends before byte {at + len(part)}, while it was read")
            self._read(len(part))
            yield part

    def hash_of(self, begin: int, end: int) -> str:
        own = xxhash.xxh3_64()
        for part in self.parts(begin, end):
            own.update(part)
        return own.hexdigest()


def _in_file(data: _Bytes, where: str, manifest: Manifest, file: FileEntry) -> Iterator[Damage]:
    # Bytes that no tensor refers to are not looked at: a file that an older checkpoint shares holds its tensors, too.
    found = False
    for tensor in sorted(
        (tensor for tensor in manifest.tensors if tensor.file == file.path), key=lambda one: (one.begin, one.end)
    ):
        ranges = piece_ranges(tensor.begin, tensor.end, manifest.piece_bytes)
        for piece, ((begin, end), said) in enumerate(zip(ranges, tensor.hashes, strict=True)):
            if data.hash_of(begin, end) != said:
                found = True
                yield Damage(where, "is not what was saved", tensor.name, piece, begin, end)
    # Last: format 1 has one hash for header and tensors together, and then a tensor is the better name.
    whole = file.head_bytes == file.length
    if not (whole and found) and data.hash_of(0, file.head_bytes) != file.xxh3_64:
        yield Damage(where, _HEAD)
