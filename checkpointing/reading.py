"""Verified bytes from data files into memory, by several threads: each piece is hashed while it is hot.

Neighbours in a file are read by one `preadv`. Nothing here decides what is read.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from checkpointing.errors import IntegrityError
from checkpointing.pieces import PIECE_BYTES, piece_ranges
from checkpointing.records import TensorEntry
from checkpointing.reshard import RUN_BYTES
from checkpointing.slabs import SlabRing
from checkpointing.storage.local import LocalStorage

THREADS = 32
"""Many, as one that hashes or copies does not read: with 8 a disk of 3 GB/s gave 0.7 of that."""
_MAX_VECTORS = 1000  # IOV_MAX is 1024
_PAGE = 4096
_PATIENCE_S = 600.0
_DIRECT_BYTES = 256 * 2**10
"""From here on a read past the page cache is worth a call of its own."""


class Fill(NamedTuple):
    """Memory to be filled with the bytes of an entry, or of neighbours that lie without gaps in one file."""

    entries: Sequence[TensorEntry]
    memory: memoryview
    live: bool = False
    """Whether the memory is in use: then only verified bytes go there, through a slab. Of one entry of any size, in
    pieces that `fit_slabs`."""


class _Part(NamedTuple):
    """What is read at once: neighbours, or one piece of a large entry."""

    entries: Sequence[TensorEntry]
    piece: int
    begin: int
    end: int
    memory: memoryview
    live: bool


def fit_slabs(piece_bytes: int) -> bool:
    """Return whether a piece fits a slab together with the rest of its first and last page.

    Pieces begin and end at multiples of `piece_bytes` of the file, or within. Of format 1 a piece is a whole tensor.
    """
    return piece_bytes <= PIECE_BYTES and piece_bytes % _PAGE == 0


def read_fills(
    storage: LocalStorage,
    folder: Path,
    piece_bytes: int,
    fills: Sequence[Fill],
    alive: Callable[[], None],
    ring: SlabRing | None = None,
) -> None:
    """Fill all memory and verify it. Raises IntegrityError naming file, tensor and piece; some memory is changed then,
    live one by verified pieces.

    `alive` is called now and then, from this thread only. Slabs come from `ring`, which nobody else may hold for long.
    """
    by_file: dict[str, list[Fill]] = {}
    for fill in fills:
        by_file.setdefault(fill.entries[0].file, []).append(fill)
    opened, slabs = list[_Files](), ring or SlabRing(THREADS * PIECE_BYTES)
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read")
    try:
        jobs = []
        for file, own in by_file.items():
            opened.append(_Files(storage, *_open(storage, folder, file)))
            own.sort(key=lambda fill: (fill.entries[0].begin, fill.entries[-1].end))
            for run in _runs(_parts(own, piece_bytes)):
                jobs.append(pool.submit(_read_run, opened[-1], f"{folder.name}/{file}", run, piece_bytes, slabs))
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
        if self._storage.is_cached(self._plain, begin, end - begin):
            return self._storage.read_into(self._plain, memory, at)
        middle = self._storage.read_aligned(self._direct, memory[begin - at : end - at], begin)
        if middle < end - begin:
            return self._storage.read_into(self._plain, memory, at)
        edges = self._storage.read_into(self._plain, memory[: begin - at], at)
        return middle + edges + self._storage.read_into(self._plain, memory[end - at :], end)

    def read_around(self, slab: memoryview, at: int, length: int) -> tuple[memoryview, int]:
        """Read into a slab, aligned as the file is. Returns where the bytes are in it, and how many there are."""
        skew = at % _PAGE
        memory = slab[skew : skew + length]
        is_large = length >= _DIRECT_BYTES
        if self._direct is not None and is_large and not self._storage.is_cached(self._plain, at, length):
            end = skew + length
            if self._storage.read_aligned(self._direct, slab[: end + -end % _PAGE], at - skew) >= end:
                return memory, length
        return memory, self._storage.read_into(self._plain, memory, at)

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


def _parts(fills: Iterable[Fill], piece_bytes: int) -> Iterator[_Part]:
    for entries, memory, live in fills:
        begin, end = entries[0].begin, entries[-1].end
        if len(entries) > 1 and begin < end:
            yield _Part(entries, 0, begin, end, memory, live)
        elif len(entries) == 1:
            for index, (at, to) in enumerate(piece_ranges(begin, end, piece_bytes)):
                yield _Part(entries, index, at, to, memory[at - begin : to - begin], live)


def _runs(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Yield neighbours that lie without gaps and are of the size of one read together."""
    run: list[_Part] = []
    for part in parts:
        # A large one alone: it can go past the page cache. One for live memory goes through a buffer.
        alone = part.live or not _is_small(part)
        joins = run and run[-1].end == part.begin and len(run) < _MAX_VECTORS and not alone
        if run and not (joins and part.end - run[0].begin <= RUN_BYTES):
            yield run
            run = []
        run.append(part)
        if alone:
            yield run
            run = []
    if run:
        yield run


def _is_small(part: _Part) -> bool:
    return part.end - part.begin < _DIRECT_BYTES


def _read_run(files: _Files, where: str, run: Sequence[_Part], piece_bytes: int, slabs: SlabRing) -> None:
    first, last = run[0], run[-1]
    try:
        if len(run) == 1 and len(first.entries) == 1:
            filled, found = _read_verified(files, first, slabs) if first.live else _read_one(files, first)
            wrong = () if found == first.entries[0].hashes[first.piece] else [(first.entries[0], first.piece)]
        else:
            memories = [part.memory for part in run]
            several = len(run) > 1
            filled = files.read_vectors(memories, first.begin) if several else files.read(first.memory, first.begin)
            wrong = (one for part in run for one in _wrong(part, piece_bytes))
    except OSError as error:
        raise IntegrityError(f"{where}: {error.strerror}") from error
    if filled != last.end - first.begin:
        raise IntegrityError(f"{where}: ends before byte {last.end}")
    for entry, index in wrong:
        begin, end = piece_ranges(entry.begin, entry.end, piece_bytes)[index]
        raise IntegrityError(
            f"{where}: tensor {entry.name!r}, piece {index} (bytes {begin}..{end}) is not what was saved"
        )


def _wrong(part: _Part, piece_bytes: int) -> Iterator[tuple[TensorEntry, int]]:
    """Yield entries and their pieces whose bytes are not what was saved."""
    hash_of, memory, start = xxhash.xxh3_64_hexdigest, part.memory, part.begin
    if len(part.entries) == 1:
        if hash_of(memory) != part.entries[0].hashes[part.piece]:
            yield part.entries[0], part.piece
        return
    for entry in part.entries:
        if len(entry.hashes) == 1:  # as most of them
            if hash_of(memory[entry.begin - start : entry.end - start]) != entry.hashes[0]:
                yield entry, 0
            continue
        for index, (begin, end) in enumerate(piece_ranges(entry.begin, entry.end, piece_bytes)):
            if hash_of(memory[begin - start : end - start]) != entry.hashes[index]:
                yield entry, index


def _read_one(files: _Files, part: _Part) -> tuple[int, str]:
    own, filled = xxhash.xxh3_64(), 0  # a piece of format 1 may be as large as its file
    for at in range(0, len(part.memory), RUN_BYTES):
        memory = part.memory[at : at + RUN_BYTES]
        filled += files.read(memory, part.begin + at)
        own.update(memory)
    return filled, own.hexdigest()


def _read_verified(files: _Files, part: _Part, slabs: SlabRing) -> tuple[int, str]:
    """Read into a slab, and from there into the memory if it is what was saved."""
    slab = slabs.acquire(_PATIENCE_S)  # other threads of this read give theirs back; a hung write never does
    if slab is None:
        raise OSError(errno.ETIMEDOUT, f"no buffer came free for {_PATIENCE_S:g} s: a write before has not ended")
    try:
        memory, filled = files.read_around(slab.view, part.begin, len(part.memory))
        found = xxhash.xxh3_64_hexdigest(memory)
        if filled == len(memory) and found == part.entries[0].hashes[part.piece]:
            np.copyto(np.frombuffer(part.memory, dtype=np.uint8), np.frombuffer(memory, dtype=np.uint8))
    finally:
        slabs.release(slab)
    return filled, found
