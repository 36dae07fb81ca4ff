"""One job a run folder: the folder is claimed before anything is written there, and given up with the process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launch.env import World
from launch.errors import FolderError, FolderInUseError
from launch.files import RunFolder

STARTED_OVER = "started over"
"""What is noted once an earlier run is out of the way: a start of the ranks behind that resumes."""


@contextmanager
def claimed(folder: RunFolder, world: World, *, fresh: bool) -> Iterator[Path | None]:
    """Hold the folder of a run; move an earlier run aside if `fresh`, and yield where to. Every rank calls.

    Raises FolderInUseError on every rank when another job holds it, and FolderError for what the system refuses, then
    or inside `with`.
    """
    with ExitStack() as held, _writing(folder):

        def claim() -> Path | None:
            if world.rank != 0:
                return None
            if folder.path.exists() and not folder.path.is_dir():
                raise FolderError(f"run.folder {folder.path} is a file; give a folder")
            with _writing(folder):
                held.enter_context(_locked(folder))
                if not fresh:
                    return None
                aside = folder.move_aside()
                world.board.note(STARTED_OVER)
                return aside

        yield world.board.together("claim", claim)


@contextmanager
def _writing(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"run.folder {folder.path} cannot be written: {error}; make room there, or use another run.folder"
        ) from error


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    folder.lock.parent.mkdir(parents=True, exist_ok=True)
    with folder.lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise FolderInUseError(
                f"another job ({file.read().strip() or 'unknown'}) is writing to {folder.path}; wait for it, end it, "
                "or use another run.folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield  # the kernel lets go with the file, whatever becomes of the process
