"""Which checkpoints may go. Pure: integers in, integers out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from checkpointing.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest `count` checkpoints."""

    count: int

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise CheckpointError(f"KeepLast({self.count!r}): keep at least 1 checkpoint")

    def kept(self, steps: Collection[int]) -> set[int]:
        """Return those of `steps` that stay."""
        return set(sorted(steps)[-self.count :])


def plan_pruning(keep: KeepLast, intact: Collection[int], known_bad: Collection[int], *, saved: int) -> tuple[int, ...]:
    """Return the steps to delete, oldest first.

    `intact` are the steps of this run whose manifest reads and whose files have their lengths; `known_bad` those of
    them in which a full read found other bytes. Bad ones do not count towards `keep`, so that they never push a good
    one out, and are deleted only when they are older than everything kept. The newest good one always stays, and so
    does the one just `saved`: a run that went back to an earlier step saves below what it left behind.
    """
    good = set(intact) - set(known_bad)
    if not good:
        return ()
    kept = keep.kept(good) | {max(good), saved}
    return tuple(sorted(step for step in intact if step not in kept and (step in good or step < min(kept))))
