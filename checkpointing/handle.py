"""What `save` returns, and what the engine tells it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from checkpointing.errors import CheckpointError, SaveError
from checkpointing.records import SaveProgress


class Meter:
    """Counts the bytes of one save on this rank; told from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written = 0
        self.total_bytes = 0
        self.done = False

    def wrote(self, num_bytes: int) -> None:
        """Count what has reached the file."""
        with self._lock:
            self._written += num_bytes

    def read(self) -> SaveProgress:
        """Return the count as a value."""
        return SaveProgress(self._written, self.total_bytes, self.done)


class SaveHandle:
    """A save under way."""

    def __init__(
        self, what: str, hurry: Callable[[bool], None], stalled: Callable[[], str | None] = lambda: None
    ) -> None:
        self._what, self._hurry, self._stalled, self._meter = what, hurry, stalled, Meter()
        self._staged, self._over, self._pid = threading.Event(), threading.Event(), os.getpid()
        self._path: Path | None = None
        self._error: CheckpointError | None = None
        self._owed = False
        self._passed_over: str | None = None

    @property
    def progress(self) -> SaveProgress:
        """How far this rank is."""
        return self._meter.read()

    @property
    def skipped(self) -> str | None:
        """Why this save was passed over, by the policy of the checkpointer; None when it was not."""
        return self._passed_over

    def staged(self, timeout_s: float | None = None) -> None:
        """Return when the state may change without changing what is saved. Raises CheckpointError if the save failed.

        Called by the fence before every optimizer step; a loop that steps by hand calls `Checkpointer.fence`.
        """
        self._await(self._staged, timeout_s, "staged")
        if self._error is not None:
            self._owed = False
            raise self._error

    def wait(self, timeout_s: float | None = None) -> Path:
        """Return the folder once a power cut cannot lose it. Raises CheckpointError if the save failed.

        `timeout_s` bounds the wait in seconds, and raises SaveError when it is over, while the save goes on; without it
        the checkpointer's own deadlines bound it: SaveError when the disk or the ranks give no sign of life for long.
        """
        self._await(self._over, timeout_s, "durable")
        self._owed = False
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path

    def _await(self, event: threading.Event, timeout_s: float | None, goal: str) -> None:
        if event.is_set():
            return
        if os.getpid() != self._pid:
            raise CheckpointError(f"{self._what} is not {goal} yet: this process was forked from the one that saves")
        self._hurry(True)
        begun = time.monotonic()
        try:
            while timeout_s is None and not event.wait(1.0):
                if (reason := self._stalled()) is not None:
                    raise SaveError(f"{self._what} is not {goal}: {reason}")
            if not event.wait(timeout_s):
                done = self.progress
                raise SaveError(
                    f"{self._what} is not {goal} after {time.monotonic() - begun:.1f} s; {done.written_bytes} of "
                    f"{done.total_bytes} bytes are written, and it goes on: wait again, or wait longer"
                )
        finally:
            self._hurry(False)

    # What follows is the engine's.

    @property
    def meter(self) -> Meter:
        """The counter."""
        return self._meter

    @property
    def is_staged(self) -> bool:
        """Whether live memory is not read any more."""
        return self._staged.is_set()

    @property
    def is_over(self) -> bool:
        """Whether it ended, well or badly."""
        return self._over.is_set()

    def await_staged(self, timeout_s: float) -> bool:
        """Return whether live memory is not read any more, after waiting for it."""
        return self._staged.wait(timeout_s)

    def set_staged(self) -> None:
        """Live memory is not read any more."""
        self._staged.set()

    def finish(self, path: Path) -> None:
        """It is durable."""
        self._path, self._meter.done = path, True
        self._staged.set()
        self._over.set()

    def fail(self, error: CheckpointError, *, owed: bool = True, passed_over: str | None = None) -> None:
        """It failed. `owed`: whether the next call is to raise it, should nobody wait."""
        self._error, self._owed, self._passed_over = error, owed, passed_over
        self._staged.set()
        self._over.set()

    def take_unheard(self) -> CheckpointError | None:
        """Return the error nobody has been told of, once."""
        owed, self._owed = self._owed, False
        return self._error if owed else None
