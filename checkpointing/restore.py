"""A restore, as every rank runs it: rank 0 picks a checkpoint and plans, each rank reads and verifies its part of the
bytes, and only when all are right do ranks hand each other what they read. Nothing is given to a state before that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from torch.distributed.tensor import DTensor

from checkpointing.control import Control, run_round, told_as
from checkpointing.errors import CheckpointError, IntegrityError, VersionError
from checkpointing.folder import Folder, check_step
from checkpointing.load import Buffers, Exchange, assemble, hand_over, read_part
from checkpointing.records import Manifest, RestoreInfo, Stateful
from checkpointing.reshard import LoadPlan, entries_by_name, plan_load
from checkpointing.state import State, parts_of, under
from checkpointing.wants import Live, given, live_of, live_shards, need_of

_log = logging.getLogger("checkpointing")


def restore(
    control: Control,
    exchange: Exchange,
    folder: Folder,
    known_bad: set[int],
    what: str,
    state: State,
    step: int | None,
) -> RestoreInfo | None:
    """Restore `state`; every rank must call. `known_bad` learns on rank 0 what did not verify."""
    chooser = _Chooser(folder, known_bad, step)
    parts: dict[str, Stateful] = {}
    shards: dict[str, DTensor] = {}

    def ready() -> dict[str, Any]:
        if step is not None:
            check_step(step)
        parts.update(parts_of(state))
        shards.update(live_shards(parts))
        return live_of(parts, shards).to_json()

    answer = run_round(control, what, "choose", ready, chooser.first)
    if answer["step"] is None:
        return None
    lives = [Live.from_json(one) for one in answer["lives"]]
    while True:
        attempt = _Attempt(folder, answer["step"], answer["identity"], lives, control.rank)
        answer = run_round(control, what, f"read {answer['step']}", partial(attempt.read, control), chooser.judge)
        if answer["right"]:
            break
    named: dict[str, Any] = {}
    run_round(control, what, "hand over", lambda: named.update(attempt.named(exchange, shards)) or {}, _agreed)

    def apply() -> dict[str, Any]:
        for prefix, part in parts.items():
            part.load_state_dict(under(prefix, named))
        return {}

    # A part may refuse what it is given; its own error is the cause on that rank, and the other ranks are told.
    run_round(control, what, "apply", apply, _agreed)
    skipped = tuple((Path(path), reason) for path, reason in answer["skipped"])
    return RestoreInfo(answer["step"], folder.at(answer["step"]), skipped)


class _Attempt:
    """One checkpoint, tried on one rank."""

    def __init__(self, folder: Folder, step: int, identity: str, lives: Sequence[Live], rank: int) -> None:
        self._folder, self._step, self._identity, self._lives, self._rank = folder, step, identity, lives, rank
        self._found: Manifest | None = None
        self._plan, self._buffers, self._needs = LoadPlan(()), Buffers((), ()), ()

    def read(self, control: Control) -> dict[str, Any]:
        """Read and verify this rank's part. Returns {} or what is wrong with the bytes."""
        self._found = self._folder.inspect(self._step)  # rank 0 has just done so: what it raises here is no damage
        if identity_of(self._found) != self._identity:
            place = self._folder.at(self._step)
            raise IntegrityError(f"{place} is another checkpoint on rank 0; is this a shared folder?")
        try:
            self._needs = tuple(need_of(self._found, live) for live in self._lives)
            self._plan = plan_load(self._found, [need.boxes for need in self._needs])
            self._buffers = read_part(self._folder, self._found, self._plan, self._rank, control.alive)
        except IntegrityError as error:
            return {"bad": str(error), "damaged": is_damage(error)}
        return {}

    @told_as(CheckpointError)
    def named(self, exchange: Exchange, shards: Mapping[str, DTensor]) -> dict[str, Any]:
        """Exchange what was read, and return every name this rank's state is given."""
        assert self._found is not None
        need = self._needs[self._rank]
        hand_over(exchange, self._plan, self._buffers, [one.boxes for one in self._needs])
        by_name = entries_by_name(self._found)
        loaded = {name: assemble(name, box, by_name[name], self._buffers) for name, box in need.boxes.items()}
        return given(self._found, need, loaded, shards)


class _Chooser:
    """Rank 0's side: which checkpoint to try, and which next."""

    def __init__(self, folder: Folder, known_bad: set[int], step: int | None) -> None:
        self._folder, self._known_bad, self._step = folder, known_bad, step
        self._left: list[int] = []
        self._skipped: list[tuple[int, str, bool]] = []
        self._trying = -1

    @told_as(CheckpointError, "rank 0: ")
    def first(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer with the checkpoint to try, or that there is none."""
        candidates = self._folder.candidates()
        if self._step is not None and self._step not in candidates:
            there = candidates or "none"
            raise CheckpointError(f"there is no step {self._step} in {self._folder.root}; there are: {there}")
        self._left = candidates if self._step is None else [self._step]
        empty = self._step is None and not any(self._folder.has_manifest(one) for one in candidates)
        answer = {"step": None} if empty else self._next() | {"lives": list(bodies)}
        return [answer] * len(bodies)

    @told_as(CheckpointError, "rank 0: ")
    def judge(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer that every rank read what was saved, or with the next checkpoint."""
        bad = {rank: body for rank, body in enumerate(bodies) if body}
        if bad:
            rank, body = next(iter(bad.items()))
            reason = body["bad"] if len(bodies) == 1 else f"{body['bad']} (read by rank {rank})"
            self._skip(self._trying, reason, any(one["damaged"] for one in bad.values()))
            return [self._next() | {"right": False}] * len(bodies)
        self._known_bad.discard(self._trying)
        skipped = [(str(self._folder.at(step)), self._set_aside(*one)) for one in self._skipped for step in one[:1]]
        return [{"step": self._trying, "right": True, "skipped": skipped}] * len(bodies)

    def _next(self) -> dict[str, Any]:
        while self._left:
            self._trying = self._left.pop()
            try:
                return {"step": self._trying, "identity": identity_of(self._folder.inspect(self._trying))}
            except VersionError:
                raise
            except IntegrityError as error:
                self._skip(self._trying, str(error), is_damage(error))
        # Starting over in silence would throw a run away; someone has to look.
        reasons = "; ".join(reason for _, reason, _ in self._skipped)
        raise IntegrityError(
            f"nothing to restore in {self._folder.root}: {reasons}. To start over, move these folders away"
        )

    def _skip(self, step: int, reason: str, damaged: bool) -> None:
        self._known_bad.add(step)
        self._skipped.append((step, reason, damaged))

    def _set_aside(self, step: int, reason: str, damaged: bool) -> str:
        """Move a damaged checkpoint out of the way, now that an older one is good. Returns the reason, with the place.

        One that could not be read (no permission, a device error) may be good tomorrow, and one without a manifest is
        not ours: both stay.
        """
        if not damaged or not self._folder.has_manifest(step):
            return reason
        try:
            place = self._folder.set_aside(step, "bad")
        except OSError as error:
            _log.warning("%s is damaged and cannot be set aside: %s", self._folder.at(step), error)
            return reason
        self._known_bad.discard(step)
        return f"{reason}; set aside as {place.name}"


def identity_of(found: Manifest) -> str:
    """Return what tells two checkpoints apart: a hash over their run, files and hashes."""
    hashes = (one for entry in found.tensors for one in entry.hashes)
    files = (f"{file.path} {file.length} {file.xxh3_64}" for file in found.files)
    return xxhash.xxh3_64_hexdigest("\n".join([found.run_id, *files, *hashes]).encode())


def is_damage(error: IntegrityError) -> bool:
    """Return whether the bytes were read and are wrong, or are gone; not that they could not be read just now."""
    cause = error.__cause__
    while isinstance(cause, CheckpointError):
        cause = cause.__cause__
    return not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)


def _agreed(bodies: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return bodies
