"""When a job saves, it goes on training; what went wrong with a checkpoint is raised at the next one, or at the end."""

from __future__ import annotations

from pathlib import Path

from checkpointing import Checkpointer, RestoreInfo, SaveHandle
from checkpointing.folder import Folder
from checkpointing.storage import open_storage
from launch.errors import FolderError
from launch.state import TrainState

_GRACE_S = 5.0
"""After a checkpoint's deadline: the save itself, which has the same one, then says which rank did not come."""


def check_mirror(mirror: str | None, *, fresh: bool) -> None:
    """Raise what makes a second tier unfit, before anything is built; of a `fresh` run also an earlier run in it."""
    if mirror is None:
        return
    second = Folder(*open_storage(mirror))
    try:
        there = second.candidates() if fresh else []
    except OSError as error:
        raise FolderError(f"checkpoint.mirror {mirror} cannot be looked at: {error}") from error
    if there:
        raise FolderError(
            f"checkpoint.mirror {mirror} holds step {max(there)}, from which a fresh run would go on; give another "
            "checkpoint.mirror, or move what is there away"
        )


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
        """Return whether someone asked this job to save now: `checkpoint request`. For rank 0."""
        return self._checkpoints.requested()

    def wait(self) -> None:
        """Return when what was saved is durable; raises what went wrong."""
        if self._pending is not None:
            handle, self._pending = self._pending, None
            self.path = handle.wait(timeout_s=self._timeout_s + _GRACE_S)

    def _note_durable(self) -> None:
        if self._pending is not None and self._pending.progress.done:
            self.path, self._pending = self._pending.wait(), None
