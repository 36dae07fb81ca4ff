"""A second tier: committed checkpoints are copied, in the background, to another folder or to an object store.

The first tier is quick (NVMe), the second is safe (a shared file system, `s3://`). A copy is verified on its way, piece
by piece, and becomes visible only when it is whole: by a rename, or by its manifest, written last.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from checkpointing import manifest as manifests
from checkpointing.errors import IntegrityError, SaveError
from checkpointing.folder import Folder
from checkpointing.pieces import piece_ranges
from checkpointing.records import FileEntry, Manifest
from checkpointing.storage.local import LocalStorage

_READ_BYTES = 4 * 2**20


def copy_step(source: Folder, dest: Folder, step: int, alive: Callable[[], None] = lambda: None) -> Path:
    """Copy a committed checkpoint, verifying every byte. Returns its new place; does nothing when it is there already.

    `alive` is called on the way. Raises IntegrityError when the source is damaged or another checkpoint of this step
    stands at the destination.
    """
    manifest = source.inspect(step)
    place = dest.at(step)
    if dest.has_manifest(step):
        if _manifest_of(source, step) != _manifest_of(dest, step):
            raise IntegrityError(f"{place} is another checkpoint; nothing is overwritten: move it away")
        return place
    dest.storage.make_folders(dest.root)
    if isinstance(dest.storage, LocalStorage):
        _copy_by_rename(source, dest, manifest, alive)
    else:
        _copy_files(source, dest.storage, place, manifest, alive)
    return place


def _copy_by_rename(source: Folder, dest: Folder, manifest: Manifest, alive: Callable[[], None]) -> None:
    place = dest.at(manifest.step)
    tmp = place.with_name(f"{place.name}.tmp-{manifest.run_id[:8]}-{uuid.uuid4().hex[:8]}")
    dest.storage.make_folder(tmp)
    lock = dest.storage.lock(tmp)  # or pruning would take it for what a crash has left
    try:
        _copy_files(source, dest.storage, tmp, manifest, alive)
        dest.storage.sync_folder(tmp)
        dest.storage.rename(tmp, place)
    except BaseException:
        dest.storage.discard(tmp)
        raise
    finally:
        if lock is not None:
            dest.storage.close(lock)
    dest.storage.sync_folder(dest.root)


def _copy_files(source: Folder, storage: Any, place: Path, manifest: Manifest, alive: Callable[[], None]) -> None:
    """Copy a checkpoint to a place that another job may be writing to, too, where that is no folder of our own."""
    origin, data = source.at(manifest.step), _manifest_of(source, manifest.step)
    stamps: dict[Path, Any] = {}

    def parts(fd: int, file: FileEntry) -> Iterator[memoryview]:
        yield from _verified(source, fd, manifest, file, alive)
        if manifests.FILE_NAME in storage.names(place):  # an object is replaced once all of its parts are there
            raise IntegrityError(f"{place} is another checkpoint by now; nothing is overwritten")

    for file in manifest.files:
        fd = source.storage.open(origin / file.path)
        try:
            storage.write_stream(place / file.path, file.length, parts(fd, file))
        finally:
            source.storage.close(fd)
        stamps[place / file.path] = storage.stamp(place / file.path)
    if _manifest_of(source, manifest.step) != data:
        raise IntegrityError(f"{origin} was replaced by another checkpoint while it was copied")
    storage.write_new(place / manifests.FILE_NAME, data)
    if any(storage.stamp(path) != stamp for path, stamp in stamps.items()):
        storage.remove_file(place / manifests.FILE_NAME)
        raise SaveError(f"another job has written to {place} at the same time; the copy is taken back")


def _verified(
    source: Folder, fd: int, manifest: Manifest, file: FileEntry, alive: Callable[[], None]
) -> Iterator[memoryview]:
    """Yield a file from its beginning to its end; raises IntegrityError before it ends when a piece is not right."""
    where = f"step-{manifest.step}/{file.path}"
    for begin, end, said, what in _spans(manifest, file):
        own = xxhash.xxh3_64()
        for at in range(begin, end, _READ_BYTES):
            part = memoryview(bytearray(min(_READ_BYTES, end - at)))
            if source.storage.read_into(fd, part, at) != len(part):
                raise IntegrityError(f"{where}: ends before byte {at + len(part)}")
            own.update(part)
            alive()
            yield part
        if said is not None and own.hexdigest() != said:
            raise IntegrityError(f"{where}: {what} (bytes {begin}..{end}) is not what was saved")


def _spans(manifest: Manifest, file: FileEntry) -> Iterator[tuple[int, int, str | None, str]]:
    """Yield (begin, end, hash, what it is) of each run of bytes of a file, in order and without gaps."""
    whole = file.head_bytes == file.length  # format 1, or a file without tensors
    at = file.length if whole else file.head_bytes
    yield 0, at, file.xxh3_64, "the file" if whole else "the header"
    mine = (tensor for tensor in manifest.tensors if tensor.file == file.path and not whole)
    for tensor in sorted(mine, key=lambda one: (one.begin, one.end)):
        if at < tensor.begin:
            yield at, tensor.begin, None, "a gap"
        ranges = piece_ranges(tensor.begin, tensor.end, manifest.piece_bytes)
        for piece, ((begin, end), said) in enumerate(zip(ranges, tensor.hashes, strict=True)):
            yield begin, end, said, f"tensor {tensor.name!r}, piece {piece}"
        at = max(at, tensor.end)
    if at < file.length:
        yield at, file.length, None, "a gap"


def _manifest_of(folder: Folder, step: int) -> bytes:
    return folder.storage.read(folder.at(step) / manifests.FILE_NAME)
