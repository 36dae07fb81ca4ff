"""A restore, as every rank runs it: rank 0 picks a checkpoint and plans, each rank reads and verifies its part of the
bytes, and only when all are right do ranks hand each other what they read, and states are given what is theirs.

Large tensors that one rank alone needs, and has in host memory, are filled as they are read, by verified pieces: a
second copy of the state would cost its size in memory. `Torn` tells when a restore that failed may have begun to.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from checkpointing.choose import Chooser, identity_of
from checkpointing.commit import Committer
from checkpointing.control import Control, run_round, told_as
from checkpointing.errors import CheckpointError, IntegrityError, is_damage
from checkpointing.exchange import Exchange
from checkpointing.folder import Folder, check_step
from checkpointing.load import Buffers, assemble, buffers_for, hand_over, live_tensors, read_part
from checkpointing.memory import no_collection
from checkpointing.records import Manifest, RestoreInfo, Stateful
from checkpointing.reshard import LoadPlan, entries_by_name, plan_load
from checkpointing.slabs import SlabRing
from checkpointing.state import State, parts_of, under
from checkpointing.storage import as_path
from checkpointing.targets import targets_of
from checkpointing.wants import Live, Need, given, live_of, live_state, need_of, shards_of

_log = logging.getLogger("checkpointing")


@dataclass(slots=True)
class Torn:
    """What a restore has put into a live state so far; of use when it fails."""

    names: set[str] = field(default_factory=set)


@no_collection()
def restore(
    control: Control,
    exchange: Exchange,
    folder: Folder,
    committer: Committer,
    what: str,
    state: State,
    step: int | None,
    torn: Torn,
    ring: SlabRing,
) -> RestoreInfo | None:
    """Restore `state`; every rank must call. `committer` learns on rank 0 what did not verify, or was gone back to.

    Slabs come from `ring`, which no save may be using.
    """
    chooser = Chooser(control, folder, committer, step)
    parts: dict[str, Stateful] = {}
    shards: dict[str, DTensor] = {}
    targets: dict[str, torch.Tensor] = {}

    def ready() -> dict[str, Any]:
        if step is not None:
            check_step(step)
        parts.update(parts_of(state))
        chooser.look()
        live = live_state(parts)
        shards.update(shards_of(live))
        targets.update(targets_of(live))
        return live_of(parts, live, shards).to_json()

    answer = run_round(control, what, "choose", ready, chooser.first)
    if answer["step"] is None:
        return None
    different = [Live.from_json(body) for body in answer["lives"]]
    lives = [different[index] for index in answer["ranks"]]
    while True:
        attempt = _Attempt(folder, answer["step"], answer["identity"], lives, control.rank, chooser.seen, targets, torn)
        read = partial(attempt.read, control, ring)
        answer = run_round(control, what, f"read {answer['step']}", read, chooser.judge)
        if answer["right"]:
            break
    named: dict[str, Any] = {}
    run_round(control, what, "hand over", lambda: named.update(attempt.named(exchange, shards)) or {}, _agreed)

    def apply() -> dict[str, Any]:
        for prefix, part in parts.items():
            part.load_state_dict(under(prefix, named))
        return {}

    def agreed(bodies: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        assert attempt.found is not None
        committer.goes_on_from(attempt.found, back=step is not None)
        return bodies

    # A part may refuse what it is given; its own error is the cause on that rank, and the other ranks are told.
    run_round(control, what, "apply", apply, agreed)
    skipped = tuple((as_path(path), reason) for path, reason in answer["skipped"])
    return RestoreInfo(answer["step"], folder.at(answer["step"]), skipped)


class _Attempt:
    """One checkpoint, tried on one rank."""

    def __init__(
        self,
        folder: Folder,
        step: int,
        identity: str,
        lives: Sequence[Live],
        rank: int,
        seen: Manifest | None,
        targets: Mapping[str, torch.Tensor],
        torn: Torn,
    ) -> None:
        self._folder, self._step, self._identity, self._lives, self._rank = folder, step, identity, lives, rank
        self.found = seen
        """The manifest of some step, as this rank saw it before rank 0 chose one."""
        self._targets, self._torn = targets, torn
        self._plan, self._buffers, self._needs = LoadPlan(()), Buffers(()), ()

    def read(self, control: Control, ring: SlabRing) -> dict[str, Any]:
        """Read and verify this rank's part. Returns {} or what is wrong with the bytes."""
        found = self.found
        if found is None or (found.step, identity_of(found)) != (self._step, self._identity):
            found = self._folder.inspect(self._step)  # rank 0 has just done so: what it raises here is no damage
        if identity_of(found) != self._identity:
            place = self._folder.at(self._step)
            raise IntegrityError(f"{place} is another checkpoint on rank 0; is this a shared folder?")
        self.found = found
        try:
            somewhere = frozenset[str]().union(*(live.names for live in self._lives))
            different = {id(live): live for live in self._lives}  # mostly one: then planned once
            needs = {key: need_of(found, live, somewhere) for key, live in different.items()}
            self._needs = tuple(needs[id(live)] for live in self._lives)
            if self._rank == 0:
                _warn_of_nothing(found, self._lives, self._needs)
            self._plan = plan_load(found, [need.boxes for need in self._needs])
            live = live_tensors(found, self._needs[self._rank].boxes, self._targets)
            self._buffers = buffers_for(self._plan, self._rank, live)
            self._torn.names |= self._buffers.live_names
            read_part(self._folder, found, self._plan, self._rank, self._buffers, control.alive, ring)
        except IntegrityError as error:
            return {"bad": str(error), "damaged": is_damage(error)}
        return {}

    @told_as(CheckpointError)
    def named(self, exchange: Exchange, shards: Mapping[str, DTensor]) -> dict[str, Any]:
        """Exchange what was read, and return every name this rank's state is given."""
        assert self.found is not None
        need = self._needs[self._rank]
        if lost := self._torn.names - need.boxes.keys():
            raise IntegrityError(
                f"a newer checkpoint had {min(lost)!r} and did not verify, and step {self._step} does not have it: the "
                "state is neither; restore into one that is made anew"
            )
        hand_over(exchange, self._plan, self._buffers, [one.boxes for one in self._needs])
        by_name = entries_by_name(self.found)
        loaded = {name: assemble(name, box, by_name[name], self._buffers) for name, box in need.boxes.items()}
        return given(self.found, need, loaded, shards)


def _warn_of_nothing(found: Manifest, lives: Sequence[Live], needs: Sequence[Need]) -> None:
    """Say so when no rank asks for anything that was saved: a prefix was changed, perhaps."""
    there = [*(entry.name for entry in found.tensors), *found.values]
    if there and not any(need.names for need in needs):
        asked = ", ".join(sorted({repr(prefix) for live in lives for prefix in live.prefixes}))
        _log.warning("nothing was saved under %s; step %d has names like %r", asked, found.step, min(there))


def _agreed(bodies: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return bodies
