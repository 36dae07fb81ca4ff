"""What a way to save and load is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from benchmarks.checkpoint_state import Work


class Way(Protocol):
    """One way to save a rank's part of a state."""

    def save(self, folder: Path, step: int) -> None:
        """Begin to save, or save, into a folder that is not there yet."""
        ...

    def fence(self) -> None:
        """Return when the state may change."""
        ...

    def finish(self) -> None:
        """Return when everything is written."""
        ...

    def load(self, folder: Path, step: int) -> None:
        """Load into the live state."""
        ...

    def close(self) -> None:
        """End."""
        ...


class Blocking:
    """What has written everything when `save` returns."""

    def __init__(self, work: Work) -> None:
        self.work, self.rank = work, dist.get_rank()

    def fence(self) -> None:
        """Nothing is read any more."""

    def finish(self) -> None:
        """Nothing is left."""

    def close(self) -> None:
        """Nothing to end."""

    def copy(self, loaded: dict[str, torch.Tensor]) -> None:
        """Take what was loaded into the live state."""
        self.work.load_state_dict(loaded)
