"""Is this folder fit for checkpoints, and is anything wrong in it? Needs no torch, and reads no tensor."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from checkpointing.errors import IntegrityError
from checkpointing.folder import REQUEST, Folder
from checkpointing.records import Manifest
from checkpointing.storage.local import LocalStorage


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: str
    """`ok`, `note` or `problem`."""
    what: str


def examine(folder: Folder) -> Iterator[Finding]:
    """Yield findings on the file system and on what is in the folder. Leaves nothing behind."""
    on_disk = isinstance(folder.storage, LocalStorage)
    yield from _file_system(folder) if on_disk else _object_store(folder)
    found = yield from _checkpoints(folder)
    if found and on_disk:
        size = sum(file.length for file in found[max(found)].files)
        space = os.statvfs(folder.root)
        free = space.f_bavail * space.f_frsize
        level = "problem" if free < size else "note" if free < 3 * size else "ok"
        yield Finding(level, f"{free / 1e9:,.1f} GB are free; the newest checkpoint has {size / 1e6:,.1f} MB")


def _file_system(folder: Folder) -> Iterator[Finding]:
    """Try on a folder of our own what a save does: create, write, fsync, lock, rename, fsync the parent."""
    storage = folder.storage
    name = f"doctor-{uuid.uuid4().hex[:8]}"
    first, second = folder.root / name, folder.root / f"{name}-renamed"
    try:
        storage.make_folder(first)
    except OSError as error:
        yield Finding("problem", f"{folder.root} cannot be written: {error.strerror}")
        return
    try:
        storage.write_new(first / "file", b"x" * 4096)
        lock = storage.lock(first)
        if lock is None:
            yield Finding("note", "no locks on this file system: what a crash leaves stays until `checkpoint prune`")
        else:
            storage.close(lock)
        storage.sync_folder(first)
        storage.rename(first, second)
        storage.sync_folder(folder.root)
        yield Finding("ok", "files and folders can be written, synced and renamed")
    except OSError as error:
        yield Finding("problem", f"{folder.root}: {error.strerror} (while a save was tried)")
    finally:
        storage.discard(first)
        storage.discard(second)


def _object_store(folder: Folder) -> Iterator[Finding]:
    """Try what a copy does: put an object that is not there yet, and read it; and remove it."""
    storage: Any = folder.storage
    path = folder.root / f"doctor-{uuid.uuid4().hex[:8]}"
    try:
        storage.write_new(path, b"x")
        try:
            storage.read(path)
        finally:
            storage.remove_file(path)
        yield Finding("ok", "objects can be written, read and removed")
    except OSError as error:
        yield Finding("problem", f"{folder.root}: {error.strerror}")


def _checkpoints(folder: Folder) -> Iterator[Finding]:  # returns {step: Manifest}
    found: dict[int, Manifest] = {}
    for step in folder.candidates():
        try:
            found[step] = folder.inspect(step)
        except IntegrityError as error:
            yield Finding("problem", str(error))  # without a manifest, too, as for `ls` and `verify`
    told = f"committed steps: {', '.join(map(str, found))}" if found else "no committed checkpoints"
    yield Finding("ok" if found else "note", told)
    runs = {manifest.run_id for manifest in found.values()}
    if len(runs) > 1:
        yield Finding("problem", f"checkpoints of {len(runs)} runs share the folder; a restore takes the newest")
    names = folder.storage.names(folder.root)
    for kind, why in (("tmp", "under way, or left by a crash"), ("bad", "set aside as damaged")):
        some = sorted(name for name in names if f".{kind}-" in name)
        if some:
            yield Finding("note", f"{len(some)} folders {why}: {', '.join(some[:3])}")
    if REQUEST in names:
        yield Finding("note", "a save is asked for (`request`) and not made yet; the next job that runs there makes it")
    if found and "latest" in names:
        yield _latest(folder, max(found))
    return found


def _latest(folder: Folder, newest: int) -> Finding:
    try:
        said = folder.storage.read(folder.root / "latest", 200).decode(errors="replace").strip()
    except OSError as error:
        return Finding("problem", f"latest: {error.strerror}")
    right = said == folder.at(newest).name
    return Finding("ok" if right else "note", f"latest says {said}; the newest is step {newest}")
