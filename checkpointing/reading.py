"""Verified bytes from data files into memory, by several threads: each piece is hashed while it is hot.

Neighbours in a file are read by one `preadv`. Nothing here decides what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import xxhash

from checkpointing.errors import IntegrityError
from checkpointing.pieces import piece_ranges
from checkpointing.records import TensorEntry
from checkpointing.storage.local import LocalStorage

THREADS = 8
RUN_BYTES = 8 * 2**20
_MAX_VECTORS = 1000  # IOV_MAX is 1024


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
    opened: list[int] = []
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read")
    try:
        jobs = []
        for file, own in by_file.items():
            opened.append(_open(storage, folder, file))
            own.sort(key=lambda fill: (fill.entry.begin, fill.entry.end))
            for run in _runs(_pieces(own, piece_bytes)):
                jobs.append(pool.submit(_read_run, storage, opened[-1], f"{folder.name}/{file}", run))
        for job in as_completed(jobs):
            job.result()
            alive()
    finally:
        pool.shutdown(cancel_futures=True)
        for fd in opened:
            storage.close(fd)


def _open(storage: LocalStorage, folder: Path, file: str) -> int:
    try:
        return storage.open(folder / file)
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
        joins = run and run[-1].end == piece.begin and len(run) < _MAX_VECTORS
        if run and not (joins and piece.end - run[0].begin <= RUN_BYTES):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _read_run(storage: LocalStorage, fd: int, where: str, run: Sequence[_Piece]) -> None:
    try:
        if len(run) > 1:
            filled = storage.read_vectors(fd, [piece.memory for piece in run], run[0].begin)
            hashes = [xxhash.xxh3_64_hexdigest(piece.memory) for piece in run]
        else:
            filled, hashes = _read_one(storage, fd, run[0])
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


def _read_one(storage: LocalStorage, fd: int, piece: _Piece) -> tuple[int, list[str]]:
    own, filled = xxhash.xxh3_64(), 0  # a piece of format 1 may be as large as its file
    for at in range(0, len(piece.memory), RUN_BYTES):
        part = piece.memory[at : at + RUN_BYTES]
        filled += storage.read_into(fd, part, piece.begin + at)
        own.update(part)
    return filled, [own.hexdigest()]
