"""When a job saves, it goes on training; what went wrong with a checkpoint is raised at the next one, or at the end."""

from __future__ import annotations

from pathlib import Path

from checkpointing import Checkpointer, RestoreInfo, SaveHandle
from launch.state import TrainState


class Saver:
    """Saves a state, at most once a step. Every rank makes the same calls."""

    def __init__(self, checkpoints: Checkpointer, state: TrainState, *, timeout_s: float) -> None:
        self.state = state
        self.path: Path | None = None
        """The newest checkpoint known to be durable."""
        self._checkpoints, self._timeout_s = checkpoints, timeout_s
        self._pending: SaveHandle | None = None
        self._saved: int | None = None

    def restore(self) -> RestoreInfo | None:
        """Restore the newest checkpoint that verifies; None when there is none."""
        info = self._checkpoints.restore(self.state)
        if info is not None:
            self.path, self._saved = info.path, info.step
        return info

    @property
    def under_way(self) -> bool:
        """Whether a save of this rank is being written. What went wrong with it is not raised here."""
        return self._pending is not None and not self._pending.progress.done

    def save(self) -> None:
        """Begin to save the state as it is now, unless this step is saved. Returns in milliseconds."""
        if self._saved == self.state.step:
            return
        self._note_durable()
        self._pending = self._checkpoints.save(self.state.step, self.state)
        self._saved = self.state.step

    def requested(self) -> bool:
        """Return whether someone asked this job to save now: `checkpoint request`. A look by this rank alone.

        Not while a save is under way: it may be the very answer.
        """
        self._note_durable()
        return self._pending is None and self._checkpoints.requested()

    def wait(self) -> None:
        """Return when what was saved is durable; raises what went wrong."""
        if self._pending is not None:
            handle, self._pending = self._pending, None
            self.path = handle.wait(timeout_s=self._timeout_s)

    def _note_durable(self) -> None:
        if self._pending is not None and self._pending.progress.done:
            self.path, self._pending = self._pending.wait(), None
