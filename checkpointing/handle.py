"""What `save` returns."""

from __future__ import annotations

from pathlib import Path

from checkpointing.errors import CheckpointError
from checkpointing.records import SaveProgress
from checkpointing.save import Meter


class SaveHandle:
    """A save under way. In this form everything is over when the caller gets it, well or badly."""

    def __init__(self, meter: Meter, *, path: Path | None = None, error: CheckpointError | None = None) -> None:
        self._meter, self._path, self._error = meter, path, error
        self._heard = error is None

    @property
    def progress(self) -> SaveProgress:
        """How far this rank is."""
        return self._meter.read()

    def staged(self, timeout_s: float | None = None) -> None:
        """Return when the state may change without changing what is saved: at once. Raises if the save failed."""
        self.wait(timeout_s)

    def wait(self, timeout_s: float | None = None) -> Path:
        """Return the folder once a power cut cannot lose it. Raises CheckpointError if the save failed.

        `timeout_s` bounds the wait in seconds; here there is nothing left to wait for.
        """
        self._heard = True
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path

    def take_unheard(self) -> CheckpointError | None:
        """Return the error nobody has been told of, once."""
        heard, self._heard = self._heard, True
        return None if heard else self._error
