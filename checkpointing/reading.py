"""Verified bytes from data files into memory, by several threads: each piece is hashed while it is hot.

Neighbours in a file are read by one `preadv`. Nothing here decides what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from checkpointing.errors import IntegrityError
from checkpointing.pieces import piece_ranges
from checkpointing.records import TensorEntry
from checkpointing.storage.local import LocalStorage

THREADS = 8
RUN_BYTES = 8 * 2**20
_MAX_VECTORS = 1000  # IOV_MAX is 1024
_PAGE = 4096
_DIRECT_BYTES = 256 * 2**10
"""From here on a read past the page cache is worth a call of its own."""


@dataclass(frozen=True, slots=True)
class Fill:
    """Memory to be filled with the bytes of an entry."""

    entry: TensorEntry
    memory: memoryview


@dataclass(frozen=True, slots=True)
class _Piece:
    entry: TensorEntry
    index: int
    begin: int
    end: int
    memory: memoryview


def read_fills(
    storage: LocalStorage, folder: Path, piece_bytes: int, fills: Sequence[Fill], alive: Callable[[], None]
) -> None:
    """Fill all memory and verify it. Raises IntegrityError naming file, tensor and piece; some memory is changed then.

    `alive` is called now and then, from this thread only.
    """
    by_file: dict[str, list[Fill]] = {}
    for fill in fills:
        by_file.setdefault(fill.entry.file, []).append(fill)
    opened: list[_Files] = []
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read")
    try:
        jobs = []
        for file, own in by_file.items():
            opened.append(_Files(storage, *_open(storage, folder, file)))
            own.sort(key=lambda fill: (fill.entry.begin, fill.entry.end))
            for run in _runs(_pieces(own, piece_bytes)):
                jobs.append(pool.submit(_read_run, opened[-1], f"{folder.name}/{file}", run))
        for job in as_completed(jobs):
            job.result()
            alive()
    finally:
        pool.shutdown(cancel_futures=True)
        for files in opened:
            files.close()


class _Files:
    """A file, opened to be read through the page cache, and past it where that can be."""

    def __init__(self, storage: LocalStorage, plain: int, direct: int | None) -> None:
        self._storage, self._plain, self._direct = storage, plain, direct

    def read(self, memory: memoryview, at: int) -> int:
        """Fill memory. What is cold is read past the cache: there is no use in another copy of a checkpoint."""
        begin, end = at + -at % _PAGE, (at + len(memory)) // _PAGE * _PAGE
        if self._direct is None or end - begin < _DIRECT_BYTES or (_address(memory) - at) % _PAGE:
            return self._storage.read_into(self._plain, memory, at)
        # In the middle: reading what lies before it may have brought its beginning along.
        if self._storage.is_cached(self._plain, (begin + end) // 2):
            return self._storage.read_into(self._plain, memory, at)
        middle = self._storage.read_aligned(self._direct, memory[begin - at : end - at], begin)
        if middle < end - begin:
            return self._storage.read_into(self._plain, memory, at)
        edges = self._storage.read_into(self._plain, memory[: begin - at], at)
        return middle + edges + self._storage.read_into(self._plain, memory[end - at :], end)

    def read_vectors(self, parts: Sequence[memoryview], at: int) -> int:
        """Fill neighbouring parts."""
        return self._storage.read_vectors(self._plain, parts, at)

    def close(self) -> None:
        """Close."""
        self._storage.close(self._plain)
        if self._direct is not None:
            self._storage.close(self._direct)


def _address(memory: memoryview) -> int:
    return np.frombuffer(memory, dtype=np.uint8).ctypes.data


def _open(storage: LocalStorage, folder: Path, file: str) -> tuple[int, int | None]:
    try:
        return storage.open(folder / file), storage.open_direct(folder / file)
    except OSError as error:
        raise IntegrityError(f"{folder.name}/{file}: {error.strerror}") from error


def _pieces(fills: Iterable[Fill], piece_bytes: int) -> Iterator[_Piece]:
    for fill in fills:
        entry = fill.entry
        for index, (begin, end) in enumerate(piece_ranges(entry.begin, entry.end, piece_bytes)):
            yield _Piece(entry, index, begin, end, fill.memory[begin - entry.begin : end - entry.begin])


def _runs(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Yield neighbours that lie without gaps and are of the size of one read together."""
    run: list[_Piece] = []
    for piece in pieces:
        # A large one alone: it can go past the page cache.
        joins = run and run[-1].end == piece.begin and len(run) < _MAX_VECTORS and _is_small(piece, run[0])
        if run and not (joins and piece.end - run[0].begin <= RUN_BYTES):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _is_small(*pieces: _Piece) -> bool:
    return all(piece.end - piece.begin < _DIRECT_BYTES for piece in pieces)


def _read_run(files: _Files, where: str, run: Sequence[_Piece]) -> None:
    try:
        if len(run) > 1:
            filled = files.read_vectors([piece.memory for piece in run], run[0].begin)
            hashes = [xxhash.xxh3_64_hexdigest(piece.memory) for piece in run]
        else:
            filled, hashes = _read_one(files, run[0])
    except OSError as error:
        raise IntegrityError(f"{where}: {error.strerror}") from error
    if filled != run[-1].end - run[0].begin:
        raise IntegrityError(f"{where}: ends before byte {run[-1].end}")
    for piece, found in zip(run, hashes, strict=True):
        if found != piece.entry.hashes[piece.index]:
            raise IntegrityError(
                f"{where}: tensor {piece.entry.name!r}, piece {piece.index} (bytes {piece.begin}..{piece.end}) is not "
                "what was saved"
            )


def _read_one(files: _Files, piece: _Piece) -> tuple[int, list[str]]:
    own, filled = xxhash.xxh3_64(), 0  # a piece of format 1 may be as large as its file
    for at in range(0, len(piece.memory), RUN_BYTES):
        part = piece.memory[at : at + RUN_BYTES]
        filled += files.read(part, piece.begin + at)
        own.update(part)
    return filled, [own.hexdigest()]
