"""Where token stores live: one folder a manifest, whole or absent.

A store is written into a folder of its own and renamed, so a killed build leaves nothing that looks like one. Builders
of the same store, on one machine or on several, wait for the first by a file lock, which the kernel releases when its
holder dies; where a file system has no locks each builds, the first rename wins, and all use the winner's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from chunkflow.errors import SourceError
from chunkflow.index import Row, is_whole, write_store
from chunkflow.sources import manifest_of

_MOST_WAIT_S, _POLL_S = 4 * 3600.0, 0.2


def open_or_build(cache_dir: Path, description: Mapping[str, Any], make_rows: Callable[[], Iterable[Row]]) -> Path:
    """Return the folder of this description's store, building it when there is none that is whole.

    Waits for another process that builds the same store, for hours if need be. Raises SourceError when it takes longer,
    or the store cannot be written.
    """
    manifest = manifest_of(description)
    folder = cache_dir / manifest
    if is_whole(folder, manifest=manifest):
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _alone(cache_dir / f"{manifest}.lock") as alone:
            if is_whole(folder, manifest=manifest):  # built while this process waited
                return folder
            if alone:
                _remove_leftovers(cache_dir, manifest)
            _build(folder, cache_dir / f".{manifest}.{uuid.uuid4().hex}", description, manifest, make_rows)
    except OSError as error:
        raise SourceError(
            f"the token store cannot be written under {cache_dir}: {error}; make it a folder with room that this "
            "process may write to, or give another cache_dir"
        ) from error
    if not is_whole(folder, manifest=manifest):
        raise SourceError(f"{folder} was just built and does not read back; check the disk and its free space")
    return folder


def _build(
    folder: Path,
    temporary: Path,
    description: Mapping[str, Any],
    manifest: str,
    make_rows: Callable[[], Iterable[Row]],
) -> None:
    temporary.mkdir()
    try:
        write_store(temporary, _read(make_rows), description=description, manifest=manifest)
        _install(temporary, folder, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(make_rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows; what fails in reading them is the data's fault, not the store's."""
    try:
        yield from make_rows()
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"the data cannot be read to its end: {error}; did it change or go away?") from error


def _install(temporary: Path, folder: Path, manifest: str) -> None:
    """Rename into place; a whole store that came first stays, a broken one goes."""
    if folder.exists() and not is_whole(folder, manifest=manifest):
        aside = temporary.with_name(f"{temporary.name}.broken")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not is_whole(folder, manifest=manifest):
            raise


def _remove_leftovers(cache_dir: Path, manifest: str) -> None:
    for leftover in cache_dir.glob(f".{manifest}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Hold a file's lock; yields False where the file system has none."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _locked(descriptor, lock)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, lock: Path) -> bool:
    deadline = time.monotonic() + _MOST_WAIT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_POLL_S)
        except OSError:
            return False
    raise SourceError(
        f"another process has held {lock} for {_MOST_WAIT_S:g} s; see whether it still builds, end it if it does not"
    )
