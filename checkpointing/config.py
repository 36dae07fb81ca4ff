"""What a checkpointer depends on, beside its folder and its group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict, get_args

from checkpointing.errors import CheckpointError
from checkpointing.pieces import PIECE_BYTES
from checkpointing.retention import Keep, KeepLast, check_keep

Busy = Literal["wait", "skip", "replace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """How many checkpoints stay, what a save may cost, and how long a rank may be silent."""

    keep: Keep = field(default_factory=lambda: KeepLast(3))
    """What stays on disk after a save."""
    timeout_s: float = 600.0
    """Seconds a rank may show no sign of life while others wait for it; writing and reading are signs of life."""
    busy: Busy = "wait"
    """What a save does while the one before is not durable: `wait` for it before the next optimizer step, `skip`
    itself, or `replace` the one before, which is given up."""
    staging_bytes: int = 256 * 2**20
    """Host memory of the engine: buffers for bytes on their way to the disk or from it, a quarter for small tensors."""
    flush_threads: int = 2
    """Writing threads while training; up to `hurried_threads` when someone waits for them."""
    hurried_threads: int = 8
    max_bytes_per_s: float | None = None
    """Most bytes a rank writes in a second; None for as many as the disk takes."""
    incremental: bool = False
    """Whether large tensors that did not change are hard links to the file of an older checkpoint."""
    check: bool = False
    """Whether every lazily copied tensor is hashed inside of `save` and again at the fence, and the save fails, naming
    the tensor, when it changed between. For finding out who changes state outside of an optimizer's step."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 < self.timeout_s <= 1e8:
            raise CheckpointError(f"timeout_s is {self.timeout_s}; it must be more than 0, and at most 1e8")
        if self.busy not in get_args(Busy):
            raise CheckpointError(f"busy is {self.busy!r}; choose one of {', '.join(get_args(Busy))}")
        if type(self.staging_bytes) is not int or self.staging_bytes < 4 * PIECE_BYTES:
            raise CheckpointError(
                f"staging_bytes is {self.staging_bytes}; it must be at least {4 * PIECE_BYTES}, an int"
            )
        if not 1 <= self.flush_threads <= self.hurried_threads:
            raise CheckpointError(
                f"flush_threads is {self.flush_threads} and hurried_threads {self.hurried_threads}; at least 1 thread "
                "writes while training, and at least as many in a hurry"
            )
        if self.max_bytes_per_s is not None and not self.max_bytes_per_s > 0:
            raise CheckpointError(f"max_bytes_per_s is {self.max_bytes_per_s}; it must be more than 0, or None")


class Settings(TypedDict, total=False):
    """The settings of CheckpointConfig that a Checkpointer takes by keyword."""

    busy: Busy
    staging_bytes: int
    flush_threads: int
    hurried_threads: int
    max_bytes_per_s: float | None
    incremental: bool
    check: bool
