"""Rank 0's side of a save: the plan, the commit, and what is cleared away after it.

The order is the contract: files durable, manifest durable, folder durable, rename, parent durable. Only then does
`latest` move, and only then is anything deleted.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from checkpointing import manifest as manifests
from checkpointing.control import told_as
from checkpointing.datafile import file_name
from checkpointing.errors import IntegrityError, SaveError, StateError, VersionError
from checkpointing.folder import REQUEST, Folder
from checkpointing.manifest_fields import file_fields
from checkpointing.mirror import Mirror
from checkpointing.others import Look, check_first
from checkpointing.pieces import PIECE_BYTES
from checkpointing.plan import agreed_values
from checkpointing.planner import Planner
from checkpointing.records import FileEntry, Manifest, Summary
from checkpointing.retention import Keep, plan_pruning
from checkpointing.storage.local import SMALL_BYTES
from checkpointing.transfer import write_small
from checkpointing.values import decode

_LOOK_S = 30.0
_log = logging.getLogger("checkpointing")


class Committer:
    """Holds what rank 0 knows between the two rounds of a save, and between saves."""

    def __init__(self, folder: Folder, keep: Keep) -> None:
        self._folder, self._storage, self._keep = folder, folder.storage, keep
        self._planner = Planner()
        self._run_id = ""
        self._values: dict[str, Any] = {}
        self._step, self._tmp, self._lock = -1, Path(), None
        self._open = False
        self._requested = False
        self._known: dict[int, tuple[tuple[int | str, ...], Summary]] = {}
        self.known_bad: set[int] = set()
        """Steps that a restore of this process read in full and found damaged."""
        self.back_to: int | None = None
        """The step a restore was asked to go back to: newer ones are set aside once the run goes on from there."""
        self.mirror: Mirror | None = None
        """The second tier."""
        self.found_damage = False
        """Whether a restore found a checkpoint damaged, or could not read it, since the last save."""
        self.points_latest = True
        """Whether `latest` is ours to move."""
        self._went_back: int | None = None
        self._settled = False
        """Whether it is known whose run this is: one that was restored, or has a checkpoint by now."""
        self._look: Look | None = None

    @told_as(SaveError, "rank 0: ")
    def open(self, step: int, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Plan the save and make its folder. Returns what each rank has to write."""
        self._planner.plan(bodies)
        self._values = agreed_values([body["values"] for body in bodies], self._planner.taken)
        self._planner.warn_of_different(bodies)
        self._check_free(step)
        self._check_other_runs(step)
        self._storage.make_folders(self._folder.root)
        self._run_id = self._run_id or uuid.uuid4().hex
        self._step, self._open = step, True
        self._requested = REQUEST in self._storage.names(self._folder.root)
        self._tmp = self._folder.root / f"step-{step}.{self._nonce()}"
        self._storage.make_folder(self._tmp)
        self._lock = self._storage.lock(self._tmp)
        common = {"folder": self._tmp.name, "run_id": self._run_id, "anew": self._take_damage()}
        return [common | self._planner.task(rank, body) for rank, body in enumerate(bodies)]

    @told_as(SaveError, "rank 0: ")
    def commit(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write the manifest, and make the save visible. Returns an empty answer for each rank."""
        data = self._manifest(bodies)
        if len(data) > SMALL_BYTES:
            raise StateError(
                f"the manifest would have {len(data)} bytes, and readers take {SMALL_BYTES}: save what is large among "
                "the values as tensors, or by an ObjectProvider"
            )
        if self._look is not None and self.mirror is not None:
            self._look.check(self._step, min(_LOOK_S, self.mirror.patience_s / 2))
        write_small(self._storage, self._tmp / manifests.FILE_NAME, data)
        self._storage.sync_folder(self._tmp)
        self._leave_newer()
        self._publish()
        self._settled = True
        return [{} for _ in bodies]

    def tidy(self) -> None:
        """Clear away what a durable save leaves behind; what fails here is told, and fails nothing."""
        back, self._went_back = self._went_back, None
        if self.mirror is not None:
            if back is not None:
                self.mirror.leave_newer(back, self._run_id)
            self.mirror.copy(self._step)
        for chore in (self._release, self._point_latest, self._prune, self._clear_leftovers, self._clear_request):
            try:
                chore()
            except OSError as error:
                _log.warning("after the save of step %d: %s: %s", self._step, chore.__name__.strip("_"), error)

    def end(self, timeout_s: float) -> SaveError | None:
        """Wait for the copies to the second tier; return what that lacks then."""
        try:
            if self.mirror is not None:
                self.mirror.close(timeout_s)
        except SaveError as error:
            return error
        return None

    def abandon(self, *, remove: bool) -> None:
        """Give up the save in hand. `remove` its folder only when no rank can be writing in it any more."""
        if not self._open:
            return
        if remove:
            with suppress(OSError):  # the error that ended the save is the one to tell
                self._storage.remove_tree(self._tmp)
        with suppress(OSError):
            self._release()

    def _take_damage(self) -> bool:
        """Return whether damage was found since the last save: it may be in a file that the next one would refer to."""
        found, self.found_damage = self.found_damage, False
        if self.mirror is not None:
            found, self.mirror.found_damage = found or self.mirror.found_damage, False
        return found

    def _check_free(self, step: int) -> None:
        """Raise StateError where a checkpoint stands that a save would have to replace."""
        if step in self.known_bad or (self.back_to is not None and step > self.back_to):
            return
        try:
            self._folder.inspect(step)
        except VersionError:  # nothing is wrong with it
            pass
        except IntegrityError:
            return
        raise StateError(
            f"{self._folder.at(step)} exists already, and a save never overwrites; save another step, or move the "
            "folder away"
        )

    def goes_on_from(self, found: Manifest, *, back: bool = False) -> None:
        """Let what is saved from here on belong to the run of a checkpoint. `back`: newer ones of it are abandoned."""
        self._run_id, self.back_to = found.run_id, found.step if back else None
        self._settled = True

    def _check_other_runs(self, step: int) -> None:
        """Raise StateError where a restart would go on from another run's checkpoint instead of this save."""
        check_first(self._folder, step, self._run_id, self.known_bad, all_steps=not self._settled)
        # A restore has looked at all of both tiers itself; else it is looked at while ranks write.
        self._look = None
        if not self._settled and self.mirror is not None:
            self._look = Look(self.mirror.second, self._run_id)

    def _nonce(self) -> str:
        return f"tmp-{self._run_id[:8]}-{uuid.uuid4().hex[:8]}"

    def _manifest(self, bodies: Sequence[Mapping[str, Any]]) -> bytes:
        """Return the bytes of the manifest. Its table of tensors is made again only when one of them moved."""
        files, moved = [], []
        for rank, body in enumerate(bodies):
            files.append(file_fields(FileEntry(file_name(rank), *body["file"]), body["pieces"]))
            files += [file_fields(FileEntry(*link["file"]), link["pieces"]) for link in body["links"]]
            links = [[link["file"][0], link["entries"]] for link in body["links"]]
            moved.append([body["file"][1], links, body["parts"], body["objects"]])
        table = self._planner.table(json.dumps(moved), bodies)
        return manifests.assemble(
            Manifest(
                run_id=self._run_id,
                step=self._step,
                world_size=len(bodies),
                piece_bytes=PIECE_BYTES,
                files=(),
                tensors=(),
                aliases=self._planner.aliases,
                objects=self._planner.objects,
                values={name: decode(value) for name, value in self._values.items()},
            ),
            files=files,
            table=table,
        )

    def _leave_newer(self) -> None:
        """Set newer checkpoints aside when the run went back: or the next restart would go on from them again."""
        if self.back_to is not None:
            for step, found in self._folder.committed().items():
                if step > self.back_to and found.run_id == self._run_id:
                    self._folder.set_aside(step, "aside")
            self._went_back, self.back_to = self.back_to, None

    def _publish(self) -> None:
        place = self._folder.at(self._step)
        if place.name in self._storage.names(self._folder.root):
            self._check_free(self._step)  # another process may have been quicker
            # Garbage by definition; moved aside, for whoever wants to look at it.
            self._storage.rename(place, place.with_name(f"{place.name}.bad-{uuid.uuid4().hex[:8]}"))
        self._storage.rename(self._tmp, place)
        try:
            self._storage.sync_folder(self._folder.root)
        except OSError:
            # It may or may not survive a power cut, so it must not count: take it back, and let the save fail.
            self._storage.rename(place, self._tmp)
            raise
        self.known_bad.discard(self._step)

    def _release(self) -> None:
        lock, self._lock, self._open = self._lock, None, False
        if lock is not None:
            self._storage.close(lock)

    def _point_latest(self) -> None:
        if not self.points_latest:
            return
        newest = max((*self._folder.committed(self._known), self._step))
        new = self._folder.root / f"latest.{self._nonce()}"
        write_small(self._storage, new, f"{self._folder.at(newest).name}\n".encode())
        self._storage.rename(new, self._folder.root / "latest")
        self._storage.sync_folder(self._folder.root)

    def _prune(self) -> None:
        committed = self._folder.committed(self._known)
        intact = {step: found.values for step, found in committed.items() if found.run_id == self._run_id}
        for step in plan_pruning(self._keep, intact, self.known_bad, saved=self._step):
            if self.mirror is not None and not self.mirror.let_go(step):  # it goes after a later save
                continue
            place = self._folder.at(step)
            with _warned(place):
                self._storage.remove_committed(place, place.with_name(f"{place.name}.{self._nonce()}"))

    def _clear_leftovers(self) -> None:
        for path in self._folder.leftovers(self._run_id):
            if path.name.startswith("latest."):
                self._storage.remove_file(path)
                continue
            lock = self._storage.lock(path)
            if lock is None:  # another process of this run is writing in it
                continue
            try:
                with _warned(path):
                    self._storage.remove_tree(path)
            finally:
                self._storage.close(lock)

    def _clear_request(self) -> None:
        if self._requested:
            self._storage.remove_file(self._folder.root / REQUEST)


@contextmanager
def _warned(path: Path) -> Iterator[None]:
    """Say what cannot be removed, and go on with what else there is: one folder must not fill the disk with others."""
    try:
        yield
    except OSError as error:
        _log.warning("%s cannot be removed: %s", path, error)
