"""Rank 0's side of a restore: which checkpoint to try, which next, and what becomes of damaged ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from checkpointing import manifest as manifests
from checkpointing.commit import Committer
from checkpointing.control import Control, told_as
from checkpointing.errors import CheckpointError, IntegrityError, VersionError, is_damage
from checkpointing.folder import Folder
from checkpointing.records import Manifest
from checkpointing.tiers import copy_step

_log = logging.getLogger("checkpointing")


class Chooser:
    """Decides what is tried, newest first: the first tier, and what only the second one has, or has undamaged."""

    def __init__(self, control: Control, folder: Folder, committer: Committer, step: int | None) -> None:
        self._control, self._folder, self._committer, self._step = control, folder, committer, step
        self._known_bad = committer.known_bad
        self._second = committer.mirror.second if committer.mirror is not None else None
        self._left: list[int] = []
        self._skipped: list[tuple[int, str, bool, Folder]] = []
        self._healed: set[int] = set()
        self._trying = -1
        self._looked: Manifest | None = None
        self.seen: Manifest | None = None
        """The manifest that this rank read last: on rank 0 of the step that is tried, on others of what may be it."""

    def look(self) -> None:
        """Read the manifest that is likely to be chosen, on every rank at the same time; whatever is wrong is left."""
        with suppress(OSError, IntegrityError):
            there = (step for step in reversed(self._folder.candidates()) if self._folder.has_manifest(step))
            likely = next(there, None) if self._step is None else self._step
            self.seen = self._looked = self._folder.inspect(likely) if likely is not None else None

    @told_as(CheckpointError, "rank 0: ")
    def first(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer with the checkpoint to try, or that there is none."""
        second = self._second_candidates()
        candidates = sorted({*self._folder.candidates(), *(self._not_left(second) if self._step is None else second)})
        if self._step is not None and self._step not in candidates:
            there = candidates or "none"
            raise CheckpointError(f"there is no step {self._step} in {self._folder.root}; there are: {there}")
        self._left = candidates if self._step is None else [self._step]
        tiers = [self._folder, *([self._second] if self._second else [])]
        empty = self._step is None and not any(tier.has_manifest(one) for tier in tiers for one in candidates)
        answer = {"step": None} if empty else self._next() | _lives(bodies)
        return [answer] * len(bodies)

    @told_as(CheckpointError, "rank 0: ")
    def judge(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer that every rank read what was saved, or with the next checkpoint."""
        bad = {rank: body for rank, body in enumerate(bodies) if body}
        if bad:
            rank, body = next(iter(bad.items()))
            reason = body["bad"] if len(bodies) == 1 else f"{body['bad']} (read by rank {rank})"
            self._failed(self._trying, reason, any(one["damaged"] for one in bad.values()), self._folder)
            return [self._next() | {"right": False}] * len(bodies)
        self._known_bad.discard(self._trying)
        skipped = [(str(one[3].at(one[0])), self._set_aside(*one)) for one in self._skipped]
        return [{"step": self._trying, "right": True, "skipped": skipped}] * len(bodies)

    def _not_left(self, steps: Sequence[int]) -> list[int]:
        """Return the steps of the second tier without those that the run went back behind.

        They are newer than all that is here, and no newer than what was set aside here and still stands there.
        """
        here = [step for step in self._folder.candidates() if self._folder.has_manifest(step)]
        aside = [step for step, place in self._folder.aside() if step in steps and here and self._is_there(step, place)]
        left = range(max(here) + 1, max(aside) + 1) if aside else ()
        return [step for step in steps if step not in left]

    def _is_there(self, step: int, place: Path) -> bool:
        """Return whether the second tier has, as a step, what was set aside here."""
        if self._second is None:
            return True
        own, there = place / manifests.FILE_NAME, self._second.at(step) / manifests.FILE_NAME
        try:
            self._control.alive()
            return self._folder.storage.read(own) == self._second.storage.read(there)
        except FileNotFoundError:
            return False
        except OSError as error:  # then it cannot be copied either
            self._go_without(error)
            return True

    def _second_candidates(self) -> list[int]:
        """Return the steps of the second tier; none when it cannot be reached and the first one has checkpoints."""
        if self._second is None:
            return []
        try:
            return self._second.candidates()
        except OSError as error:
            if not any(self._folder.has_manifest(step) for step in self._folder.candidates()):
                raise
            self._go_without(error)
            return []
        finally:
            self._control.alive()

    def _second_has(self, step: int) -> bool:
        """Return whether the second tier has a step; not, and it is said, where it cannot be reached any more."""
        try:
            self._control.alive()
            return self._second is not None and self._second.has_manifest(step)
        except OSError as error:
            self._go_without(error)
            return False

    def _go_without(self, error: OSError) -> None:
        """Ask the second tier no more, and say so: it may take long to give no answer, and the others wait."""
        if self._second is not None:
            _log.warning("restoring without the second tier, %s: %s", self._second.root, error)
        self._second = None

    def _next(self) -> dict[str, Any]:
        while self._left:
            self._trying, tier = self._left.pop(), self._folder
            try:
                if not self._folder.has_manifest(self._trying) and self._second_has(self._trying):
                    tier = self._second or tier
                    self._fetch(self._trying, tier)
                    tier = self._folder
                looked, self._looked = self._looked, None  # once: a step may be set aside, and its copy come
                if looked is None or looked.step != self._trying:
                    looked = self._folder.inspect(self._trying)
                self.seen = looked
                return {"step": self._trying, "identity": identity_of(looked)}
            except VersionError:
                raise
            except IntegrityError as error:
                self._failed(self._trying, str(error), is_damage(error), tier)
        # Starting over in silence would throw a run away; someone has to look.
        reasons = "; ".join(reason for _, reason, _, _ in self._skipped)
        raise IntegrityError(
            f"nothing to restore in {self._folder.root}: {reasons}. To start over, move these folders away"
        )

    def _failed(self, step: int, reason: str, damaged: bool, tier: Folder) -> None:
        """Try the copy in the second tier, if there is one, once; else pass the step over."""
        self._committer.found_damage = True
        may_heal = damaged and tier is self._folder and tier.has_manifest(step) and step not in self._healed
        if may_heal and self._second_has(step):
            self._healed.add(step)
            _log.warning("%s; taking the copy in %s", reason, self._second and self._second.root)
            try:
                self._folder.set_aside(step, "bad")
            except OSError as error:
                reason = f"{reason}; it cannot be set aside for its copy: {error.strerror}"
            else:
                self._left.append(step)
                return
        self._known_bad.add(step)
        self._skipped.append((step, reason, damaged, tier))
        _log.warning("passing over %s: %s", tier.at(step), reason)

    def _fetch(self, step: int, second: Folder) -> None:
        """Bring a step from the second tier, verified. Raises IntegrityError."""
        try:
            if step in self._folder.candidates() and not self._folder.has_manifest(step):
                self._folder.set_aside(step, "bad")  # no checkpoint, and in the way of one
            copy_step(second, self._folder, step, self._control.alive)
        except (OSError, IntegrityError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, TimeoutError):
                self._go_without(cause)
            if isinstance(error, IntegrityError):
                raise
            raise IntegrityError(f"{second.at(step)} cannot be copied: {error.strerror}") from error

    def _set_aside(self, step: int, reason: str, damaged: bool, tier: Folder) -> str:
        """Move a damaged checkpoint out of the way, now that an older one is good. Returns the reason, with the place.

        One that could not be read (no permission, a device error) may be good tomorrow, and one without a manifest is
        not ours: both stay. In the second tier it is done behind the restore, before the next copy.
        """
        if damaged and tier is not self._folder and self._committer.mirror is not None:
            self._committer.mirror.leave_bad(step)
            return f"{reason}; it is set aside there"
        if not damaged or not self._folder.has_manifest(step):
            return reason
        try:
            place = self._folder.set_aside(step, "bad")
        except OSError as error:
            _log.warning("%s is damaged and cannot be set aside: %s", self._folder.at(step), error)
            return reason
        self._known_bad.discard(step)
        return f"{reason}; set aside as {place.name}"


def _lives(bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the ranks hold, each once, and which of them each rank has: with replicas they hold the same."""
    different: list[Mapping[str, Any]] = []
    for body in bodies:
        if body not in different:
            different.append(body)
    return {"lives": different, "ranks": [different.index(body) for body in bodies]}


def identity_of(found: Manifest) -> str:
    """Return what tells two checkpoints apart: a hash over their run, files and hashes."""
    hashes = chain.from_iterable(entry.hashes for entry in found.tensors)
    files = (f"{file.path} {file.length} {file.xxh3_64}" for file in found.files)
    return xxhash.xxh3_64_hexdigest("\n".join([found.run_id, *files, *hashes]).encode())
