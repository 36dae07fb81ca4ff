"""A save that someone asks a running job for: the file `request` in the folder of its checkpoints.

A job that listens (`Checkpointer.requested`) saves at its next step, and the durable save takes the file away; so does
the end of the job, when nothing is left to save.
"""

from __future__ import annotations

import time
from contextlib import suppress

from checkpointing import manifest as manifests
from checkpointing.folder import REQUEST, Folder

_LOOK_S = 0.1
"""Seconds between two looks at the folder."""

Stamps = dict[int, tuple[int | str, ...]]


def is_asked(folder: Folder) -> bool:
    """Return whether a request lies there."""
    return REQUEST in folder.storage.names(folder.root)


def ask(folder: Folder) -> bool:
    """Leave a request; return whether one lay there already."""
    try:
        folder.storage.write_new(folder.root / REQUEST, b"")
    except FileExistsError:
        return True
    return False


def withdraw(folder: Folder) -> bool:
    """Take a request away; return whether there was one."""
    try:
        folder.storage.remove_file(folder.root / REQUEST)
    except FileNotFoundError:
        return False
    return True


def stamps(folder: Folder) -> Stamps:
    """Return what tells a later checkpoint of a step from the one that is there now."""
    found: Stamps = {}
    for step in folder.candidates():
        with suppress(OSError):
            found[step] = folder.storage.stamp(folder.at(step) / manifests.FILE_NAME)
    return found


def await_answer(folder: Folder, before: Stamps, timeout_s: float) -> int | None:
    """Return the step that was saved since `before`, once the request is gone; None when there is none.

    So it is when the job ended without another save. Raises TimeoutError when the request lies there after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while is_asked(folder):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        time.sleep(min(_LOOK_S, left))
    now, whole = stamps(folder), folder.committed()
    return max((step for step in whole if now.get(step) != before.get(step)), default=None)
