"""What a checkpointer depends on, beside its folder and its group."""

from __future__ import annotations

from dataclasses import dataclass, field

from checkpointing.errors import CheckpointError
from checkpointing.retention import KeepLast


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """How many checkpoints stay, and how long a rank may be silent."""

    keep: KeepLast = field(default_factory=lambda: KeepLast(3))
    """What stays on disk after a save."""
    timeout_s: float = 600.0
    """Seconds a rank may show no sign of life while others wait for it; writing and reading are signs of life."""

    def __post_init__(self) -> None:
        if not isinstance(self.keep, KeepLast):
            raise CheckpointError(f"keep is {self.keep!r}; give a retention rule, for example KeepLast(3)")
        if not self.timeout_s > 0:
            raise CheckpointError(f"timeout_s is {self.timeout_s}; it must be more than 0")
