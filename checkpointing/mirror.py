"""The thread that copies committed checkpoints to the second tier, and tries again what failed there."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from checkpointing import manifest as manifests
from checkpointing.errors import CheckpointError, IntegrityError, SaveError, VersionError, is_damage
from checkpointing.folder import Folder
from checkpointing.storage import open_storage
from checkpointing.storage.local import LocalStorage
from checkpointing.tiers import copy_step

_RETRY_S = 30.0
_SAY_FIRST_S, _SAY_EVERY_S = 1.0, 30.0
_log = logging.getLogger("checkpointing")


@dataclass(eq=False, slots=True)
class _Leave:
    """What is to be set aside in the second tier; tried again until it is."""

    what: str
    work: Callable[[set[int]], None]
    made: set[int] = field(default_factory=set)
    """Steps that were copied since it was asked for: they are not meant."""
    error: CheckpointError | None = None


class Mirror:
    """Copies what it is told of to the second tier, one at a time, on a thread of its own.

    A copy that fails is tried again after the next one that does not, every half minute, and at the close, for as long
    as the first tier has the checkpoint. `patience_s`: for so long others wait for a restore that looks in there.
    """

    def __init__(self, first: Folder, second: str, patience_s: float = 600.0) -> None:
        self.first, self.second, self.patience_s = first, Folder(*open_storage(second, patience_s)), patience_s
        if isinstance(self.second.storage, LocalStorage) and self.second.root.resolve() == first.root.resolve():
            raise CheckpointError(f"the mirror {second} is the folder of the run itself; give another one")
        self._jobs: queue.Queue[Callable[[], bool] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._pending: list[int] = []
        self._failed: dict[int, CheckpointError] = {}
        self._never: list[int] = []
        self._leaving: list[_Leave] = []
        self.found_damage = False
        """Whether a checkpoint of the first tier could not be copied, as it is damaged."""
        self._thread = threading.Thread(target=self._serve, name="checkpoint-mirror", daemon=True)
        self._thread.start()

    def copy(self, step: int) -> None:
        """Copy a committed step, some time soon."""
        self._pending.append(step)
        behind = len(self._pending)
        if behind >= 4 and not behind & (behind - 1):  # at 4, 8, 16, ...
            _log.warning("%s is %d checkpoints behind; they stay in the first tier meanwhile", self.second.root, behind)
        self._jobs.put(lambda: self._copy(step))

    def leave_newer(self, step: int, run_id: str) -> None:
        """Set aside what is newer than a step that its run went back to, or a restart would go on from it."""

        def work(made: set[int]) -> None:
            for other in self.second.candidates():
                if other > step and other not in made and self.second.has_manifest(other):
                    whose = self._run_of(other)
                    if whose in ("", run_id):
                        self.second.set_aside(other, "aside" if whose else "bad")

        self._leave(_Leave(f"going back to step {step}", work))

    def leave_bad(self, step: int) -> None:
        """Set aside a step that a restore read there and found damaged."""

        def work(made: set[int]) -> None:
            if step not in made and self.second.has_manifest(step):
                self.second.set_aside(step, "bad")

        self._leave(_Leave(f"setting aside step {step}", work))

    def pending(self) -> frozenset[int]:
        """Return the steps that are not copied yet: they must stay."""
        return frozenset(self._pending)

    def let_go(self, step: int) -> bool:
        """Return whether a step may be removed from the first tier: not while it waits for its copy.

        One whose copy failed may; it is not tried again then.
        """
        with self._lock:
            if step in self._pending:
                return False
            if self._failed.pop(step, None) is not None:
                self._never.append(step)
            return True

    def close(self, timeout_s: float) -> None:
        """Wait for what was asked for, and say so. Raises SaveError when that is not done in time, or when the second
        tier lacks a checkpoint that the first one still has; what it missed of those that are gone is logged."""
        self._jobs.put(None)
        give_up, pause = time.monotonic() + timeout_s, _SAY_FIRST_S
        while self._thread.is_alive() and (left := give_up - time.monotonic()) > 0:
            self._thread.join(min(pause, left))
            if self._thread.is_alive():
                count = len({*self._pending, *self._failed})
                told = (count, self.second.root, max(0.0, give_up - time.monotonic()))
                _log.warning("waiting for %d copies to %s, for %.0f s at most", *told)
                pause = _SAY_EVERY_S
        if self._pending and not self._thread.is_alive():
            at = self._pending[0]
            raise SaveError(f"copying to {self.second.root} broke off at step {at}; the first tier is whole")
        for step in filter(self._is_gone, list(self._failed)):
            self.let_go(step)
        if self._never:
            steps = ", ".join(map(str, sorted(self._never)))
            _log.warning("%s never got steps that are gone from the first tier since: %s", self.second.root, steps)
        if self._thread.is_alive():
            raise SaveError(f"copying to {self.second.root} is not done after {timeout_s:g} s; the first tier is whole")
        errors = [one.error for one in self._leaving if one.error] + [
            self._failed[step] for step in sorted(self._failed)
        ]
        if errors:
            told = "; ".join(map(str, errors[:3])) + (f"; and {len(errors) - 3} more" if len(errors) > 3 else "")
            raise SaveError(f"the second tier lacks a checkpoint: {told}") from errors[0]

    def _serve(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_RETRY_S if self._leaving or self._worth_a_try() else None)
            except queue.Empty:
                self._retry()
                continue
            if job is None:
                self._retry()
                return
            if job():  # it can be reached, again perhaps
                self._retry()

    def _retry(self) -> None:
        """Do what failed once more, until one fails again in a way that the next one would, too."""
        self._set_aside()
        for step in self._worth_a_try():
            with self._lock:
                if step not in self._failed:  # gone from the first tier
                    continue
                self._pending.append(step)
            if not self._copy(step) and step in self._worth_a_try():
                return

    def _worth_a_try(self) -> list[int]:
        with self._lock:
            hopeless = {step for step, error in self._failed.items() if _is_final(error)}
            return sorted(self._failed.keys() - hopeless)

    def _copy(self, step: int) -> bool:
        error = None
        try:
            self._set_aside()
            self._make_room(step)
            copy_step(self.first, self.second, step)
        except Exception as raised:  # noqa: BLE001 - whatever it is: later steps are copied, and it is told
            error = self._told(f"step {step}", raised)
            self.found_damage |= _is_final(error) and not self._is_gone(step)
        with self._lock:
            again = step in self._failed
            if error is not None:
                self._failed[step] = error
            else:
                self._failed.pop(step, None)
            self._pending.remove(step)
        if error is None:
            for one in self._leaving:
                one.made.add(step)
        if error is not None and not again:
            _log.error("the second tier: %s", error)  # the close that raises it may be weeks away
        elif error is None and again:
            _log.warning("the second tier: step %d is in %s now", step, self.second.root)
        return error is None

    def _leave(self, one: _Leave) -> None:
        def job() -> bool:
            self._leaving.append(one)
            self._set_aside()
            return False

        self._jobs.put(job)

    def _set_aside(self) -> None:
        for one in list(self._leaving):
            try:
                one.work(one.made)
            except Exception as raised:  # noqa: BLE001 - as of a copy
                error = self._told(one.what, raised)
                if one.error is None:
                    _log.error("the second tier: %s", error)
                one.error = error
            else:
                self._leaving.remove(one)

    def _is_gone(self, step: int) -> bool:
        """Return whether the first tier has a step no more: its run went back behind it, say."""
        with suppress(OSError):
            return not self.first.has_manifest(step)
        return False

    def _make_room(self, step: int) -> None:
        """Set aside what has the place of a step and is damaged, or was left by this run; nothing else is touched."""
        if not self.second.has_manifest(step):
            # Garbage by definition. In an object store it is written over; a folder could not be renamed to it.
            local = isinstance(self.second.storage, LocalStorage)
            # Again, as another job's copy may have come meanwhile, whole.
            if local and step in self.second.candidates() and not self.second.has_manifest(step):
                self.second.set_aside(step, "bad")
            return
        whose, own = self._run_of(step), self.first.at(step) / manifests.FILE_NAME
        there = self.second.at(step) / manifests.FILE_NAME
        if whose and self.second.storage.read(there) == self.first.storage.read(own):
            return
        if whose in ("", self.first.summary(step).run_id):
            place = self.second.set_aside(step, "aside" if whose else "bad")
            _log.warning("%s stood in the way of a copy; it is %s now", self.second.at(step), place.name)

    def _run_of(self, step: int) -> str | None:
        """Return the run of a checkpoint in the second tier; "" when it is damaged, None of one of a newer version."""
        try:
            return self.second.summary(step).run_id
        except VersionError:
            return None
        except IntegrityError as error:
            if not is_damage(error):
                raise
            return ""

    def _told(self, what: str, error: Exception) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        told = SaveError(f"{what} to {self.second.root}: {error}")
        told.__cause__ = error
        return told


def _is_final(error: CheckpointError) -> bool:
    """Return whether a copy would fail again: its source is damaged, or another run's checkpoint has its place."""
    return isinstance(error, IntegrityError) and is_damage(error)
