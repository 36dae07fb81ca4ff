"""A save, as the engine's thread of every rank runs it: report, get the plan, stage, flush, get the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from checkpointing.commit import Committer
from checkpointing.config import CheckpointConfig
from checkpointing.control import Control, run_round, told_as
from checkpointing.datafile import DataLayout, file_name, layout, slices_text
from checkpointing.errors import CheckpointError, RankError, SaveError
from checkpointing.fill import Filling, Sources, fill_plan
from checkpointing.flush import FlushFile, FlushPool, drain
from checkpointing.folder import Folder
from checkpointing.handle import SaveHandle
from checkpointing.incremental import LastSave, Survey, after_save, link_name, references, survey
from checkpointing.manifest import FORMAT_VERSION
from checkpointing.marks import Mark
from checkpointing.memory import no_collection
from checkpointing.pieces import PIECE_BYTES, num_pieces
from checkpointing.records import FileEntry, TensorSpec
from checkpointing.rows import Part, cut_parts, written_specs
from checkpointing.slabs import SlabRing
from checkpointing.snapshot import Snapshot
from checkpointing.staging import Stager


@dataclass(slots=True)
class SaveJob:
    """One save, from the call to its end."""

    what: str
    step: int
    handle: SaveHandle
    snapshot: Snapshot | None = None
    error: Exception | None = None
    """What went wrong before anything was begun; the other ranks are told."""
    urgent_done: Callable[[], None] = lambda: None
    """Called once `save` may return."""
    staged: Callable[[], None] = lambda: None
    """Called once live memory is not read any more."""
    beat: Callable[[], None] = lambda: None
    """Called as a sign of life."""
    _given_up: CheckpointError | None = None

    def give_up(self, error: CheckpointError) -> None:
        """End early, if it is not too late; called from other threads than the engine's."""
        self._given_up = error

    def check(self) -> None:
        """Give a sign of life, and raise why it is to end early."""
        self.beat()
        if self._given_up is not None:
            raise self._given_up


@dataclass(slots=True)
class Saver:
    """What a rank keeps from save to save."""

    control: Control
    folder: Folder
    committer: Committer
    config: CheckpointConfig
    ring: SlabRing
    pool: FlushPool
    _told: str = ""
    """The fingerprint rank 0 is known to have."""
    _plan: tuple[str, list[str]] = ("", [])
    _specs: tuple[tuple[str, str], list[TensorSpec]] = (("", ""), [])
    _last: LastSave | None = None
    _fills: dict[str, Filling] = field(default_factory=dict)
    _layouts: dict[str, DataLayout] = field(default_factory=dict)

    def run(self, job: SaveJob) -> Path:
        """Save; every rank must call. Returns the committed folder, or raises the same error on every rank."""
        task = run_round(
            self.control,
            job.what,
            "plan",
            lambda: self._report(job),
            lambda bodies: self.committer.open(job.step, bodies),
        )
        try:
            assert job.snapshot is not None
            self._told = job.snapshot.structure.fingerprint
            if task["names"] is not None:
                self._plan = (task["plan"], task["names"])
                self._fills.clear()
                self._layouts.clear()
            if task["anew"]:
                self._last = None
            written = _Written()
            run_round(self.control, job.what, "commit", lambda: self._write(job, task, written), self.committer.commit)
        except BaseException as error:
            # A silent rank may still be writing; its folder is left to a later save.
            self.committer.abandon(remove=isinstance(error, CheckpointError) and not isinstance(error, RankError))
            raise
        place = self.folder.at(job.step)
        if self.config.incremental:
            link = link_name(self.control.rank, job.step, written.looked.files)
            self._last = written.remember(self._last, place, link)
        return place

    @no_collection()
    def _report(self, job: SaveJob) -> dict[str, Any]:
        job.check()
        if job.error is not None:
            with told_as(SaveError):
                raise job.error
        assert job.snapshot is not None
        structure = job.snapshot.structure
        specs = None if structure.fingerprint == self._told else structure.specs
        self._told = ""  # until the round is over well
        report = {"fingerprint": structure.fingerprint, "specs": specs, "plan": self._plan[0]}
        digests = job.snapshot.digests() if self.control.world_size > 1 else {}
        return report | {"values": job.snapshot.values, "digests": digests}

    @told_as(SaveError)
    def _write(self, job: SaveJob, task: Mapping[str, Any], written: _Written) -> dict[str, Any]:
        """Write this rank's file. Returns its entry and hashes, and the links to older files."""
        assert job.snapshot is not None
        tmp = self.folder.root / task["folder"]
        mine = self._mine(job.snapshot)
        looked = written.looked = self._survey(job.snapshot, mine, tmp)
        parts = looked.parts
        left = written_specs(mine, looked.kept, parts)
        cut = cut_parts(left, mine, {spec.name for spec in job.snapshot.structure.specs}) if parts else ()
        filling = self._filling(job, left, cut, task["run_id"])
        fd = self.folder.storage.create_direct(tmp / file_name(self.control.rank), filling.layout.end)
        file = FlushFile(fd, job.handle.meter)
        try:
            self._fill(job, file, filling, task["run_id"], written)
        except BaseException as error:
            file.give_up(error)
            raise
        finally:
            # A descriptor that is closed under a write would be another file's by then; a hung one is let go.
            if file.drained(self.config.timeout_s):
                self.folder.storage.close(fd)
        entry = written.file
        return {
            "file": [entry.length, entry.head_bytes, entry.xxh3_64],
            "pieces": written.pieces,
            "links": references(self._last, looked.kept) if self._last and looked.kept else [],
            "parts": parts,
            "objects": dict(zip([s.name for s in filling.objects], written.sizes, strict=True)),
        }

    def _fill(self, job: SaveJob, file: FlushFile, filling: Filling, run_id: str, written: _Written) -> None:
        assert job.snapshot is not None

        def alive() -> None:
            job.check()
            self.control.alive()

        stager = Stager(self.ring, self.pool, file, alive, self.config.timeout_s)
        job.handle.meter.total_bytes = filling.layout.end
        sources = Sources(filling, job.snapshot, written.looked.fine)
        stager.stage(filling.bulk(urgent=True), sources.known)
        if not filling.urgent_tail:
            job.urgent_done()
            stager.stage(filling.bulk(urgent=False), sources.known)
        sizes = sources.finish()
        length = filling.layout.end + sum(sizes)
        job.handle.meter.total_bytes = length
        stager.stage(filling.tail(sizes), sources.known)
        if filling.urgent_tail:
            job.urgent_done()
            stager.stage(filling.bulk(urgent=False), sources.known)
        job.snapshot.check()
        job.staged()
        head = filling.layout.head(self._metadata(job.step, run_id, filling), sizes)
        drain(file, job.check, self.control.alive, self.config.timeout_s)
        storage = self.folder.storage
        with self.ring.borrowed(self.config.timeout_s) as slab:
            for at in range(0, len(head), PIECE_BYTES):
                part = head[at : at + PIECE_BYTES]
                slab.view[: len(part)] = part
                storage.write_at(file.fd, slab.view[: len(part)], at)
        file.meter.wrote(len(head))
        storage.truncate(file.fd, length)
        storage.sync(file.fd)
        written.file = FileEntry(file_name(self.control.rank), length, len(head), xxhash.xxh3_64_hexdigest(head))
        written.pieces, written.sizes, written.filling, written.marks = stager.pieces(), sizes, filling, sources.marks

    def _mine(self, snapshot: Snapshot) -> list[TensorSpec]:
        """Return what this rank writes, in the order of the file."""
        key = (snapshot.structure.fingerprint, self._plan[0])
        if self._specs[0] != key:
            by_name = {spec.name: spec for spec in snapshot.structure.specs}
            self._specs = (key, [by_name[name] for name in self._plan[1]])
        return self._specs[1]

    def _survey(self, snapshot: Snapshot, mine: list[TensorSpec], tmp: Path) -> Survey:
        """Return what need not be written, with links to the files that have it."""
        if not self.config.incremental:
            return Survey()
        looked = survey(self._last, mine, snapshot.providers, snapshot.structure.frozen)
        try:
            for name in looked.files:
                assert self._last is not None
                self.folder.storage.link(self._last.folder / self._last.paths[name], tmp / name)
        except OSError:  # a file system without links, or a folder that went: then everything is written
            for name in looked.files:
                with suppress(OSError):
                    self.folder.storage.remove_file(tmp / name)
            return looked.without_references()
        return looked

    @no_collection()
    def _filling(self, job: SaveJob, specs: Sequence[TensorSpec], parts: Sequence[Part], run_id: str) -> Filling:
        """Return how the file is filled; kept while the plan, the snapshot's structure and the links stay."""
        assert job.snapshot is not None
        specs = [part.spec for part in parts] or specs
        key = xxhash.xxh3_64_hexdigest(repr([spec.name for spec in specs]).encode()) if self.config.incremental else ""
        placed = self._layouts.get(key)
        if placed is None:
            self._layouts.clear()
            placed = self._layouts[key] = layout(specs, self._metadata(job.step, run_id, None, specs))
        filling = self._fills.get(key)
        if filling is None or filling.structure is not job.snapshot.structure:
            self._fills.clear()
            filling = self._fills[key] = fill_plan(placed, job.snapshot.structure, parts)
        return filling

    def _metadata(
        self, step: int, run_id: str, filling: Filling | None, specs: Sequence[TensorSpec] = ()
    ) -> dict[str, str]:
        """Return what a reader of the lone file is told; safetensors allows strings only."""
        slices = slices_text(specs) if filling is None else filling.slices
        return {
            "format": "pt",
            "longrail_format_version": str(FORMAT_VERSION),
            "run_id": run_id,
            "step": str(step),
            "rank": str(self.control.rank),
            "world_size": str(self.control.world_size),
            "slices": slices,
        }


@dataclass(slots=True)
class _Written:
    """What this rank wrote in one save."""

    file: FileEntry = field(default_factory=lambda: FileEntry("", 0, 0, ""))
    pieces: str = ""
    sizes: list[int] = field(default_factory=list)
    filling: Filling | None = None
    looked: Survey = field(default_factory=Survey)
    marks: Mapping[str, Sequence[Mark]] = field(default_factory=dict)

    def remember(self, last: LastSave | None, folder: Path, link: str) -> LastSave:
        """Return what the next save may refer to."""
        assert self.filling is not None
        return after_save(last, folder, self.file, link, self.looked, self._parts(self.filling))

    def _parts(self, filling: Filling) -> Iterator[tuple[Part, int, tuple[str, ...], Sequence[Mark]]]:
        at = 0
        for spec, (begin, end) in zip(filling.layout.specs, filling.layout.ranges, strict=False):  # objects come last
            first, at = at, at + 16 * num_pieces(begin, end, PIECE_BYTES)
            part = filling.parts.get(spec.name) or Part(spec, spec, 0)
            if part.held.name in self.looked.probes:
                hashes = tuple(self.pieces[i : i + 16] for i in range(first, at, 16))
                yield part, begin, hashes, self.marks.get(spec.name, ())
