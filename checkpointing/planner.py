"""Rank 0's plan of a save, kept from save to save: reports and answers are long only when a structure changed."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from checkpointing import manifest as manifests
from checkpointing.datafile import file_name
from checkpointing.errors import SaveError
from checkpointing.manifest_tensors import check_table
from checkpointing.memory import no_collection
from checkpointing.plan import plan_tensors
from checkpointing.records import TensorEntry, TensorSpec
from checkpointing.rows import rows_of, written_specs
from checkpointing.snapshot import described

_log = logging.getLogger("checkpointing")


class Planner:
    """Who writes what, as long as every rank's fingerprint stays."""

    def __init__(self) -> None:
        self._fingerprints: list[str] = []
        self._specs: list[tuple[TensorSpec, ...]] = []
        self._plan_id = ""
        self._writes: tuple[tuple[TensorSpec, ...], ...] = ()
        self.aliases: dict[str, str] = {}
        self.taken: dict[str, int] = {}
        """Names of tensors and objects, and a rank that holds each."""
        self._table_key, self._table = "", b""
        self._warned: set[str] = set()

    @property
    def objects(self) -> dict[str, str]:
        """Names of objects, and their encoding."""
        return {spec.name: spec.encoding for specs in self._writes for spec in specs if spec.encoding}

    @no_collection()
    def plan(self, bodies: Sequence[Mapping[str, Any]]) -> None:
        """Take the ranks' reports. Raises StateError where they disagree."""
        known = self._specs or [()] * len(bodies)
        fingerprints = [body["fingerprint"] for body in bodies]
        if fingerprints == self._fingerprints and all(body["specs"] is None for body in bodies):
            return
        specs = [
            old if body["specs"] is None else tuple(map(described, body["specs"]))
            for old, body in zip(known, bodies, strict=True)
        ]
        self._writes, self.aliases = plan_tensors(specs)
        self.taken = {spec.name: rank for rank, found in enumerate(specs) for spec in found}
        # Last: after an error above, nothing is known, and ranks that are asked anew send everything.
        self._specs, self._fingerprints, self._plan_id = specs, fingerprints, uuid.uuid4().hex[:16]

    def warn_of_different(self, bodies: Sequence[Mapping[str, Any]]) -> None:
        """Say once which objects are saved from one rank although another one holds other bytes under the name."""
        first: dict[str, tuple[int, str]] = {}
        for rank, body in enumerate(bodies):
            for name, digest in body["digests"].items():
                other, seen = first.setdefault(name, (rank, digest))
                if seen != digest and name not in self._warned:
                    self._warned.add(name)
                    own = name.partition(".")[0] + "{rank}"
                    _log.warning(
                        "object %r differs between rank %d and rank %d, and one of them is saved: a restore gives that "
                        'to every rank. To keep each, save it under a name with the rank in it, as f"%s"',
                        *(name, other, rank, own),
                    )

    def task(self, rank: int, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a rank has to write: the names only when it does not have this plan."""
        names = None if body["plan"] == self._plan_id else [spec.name for spec in self._writes[rank]]
        return {"plan": self._plan_id, "names": names}

    @no_collection()
    def table(self, key: str, bodies: Sequence[Mapping[str, Any]]) -> bytes:
        """Return the table of tensors of a manifest; made again only when one of them moved.

        `key` is everything of the reports that it depends on, beside the plan.
        """
        if self._table_key != self._plan_id + key:
            entries = [entry for rank, body in enumerate(bodies) for entry in self._entries(rank, body)]
            check_table(entries)  # what the reader would refuse is never committed
            self._table = manifests.dumps_table(sorted(entries, key=lambda entry: (entry.name, entry.offset)))
            self._table_key = self._plan_id + key
        return self._table

    def _entries(self, rank: int, body: Mapping[str, Any]) -> list[TensorEntry]:
        by_name = {spec.name: spec for spec in self._writes[rank]} if body["links"] else {}
        entries, referred = [], set[str]()
        for link in body["links"]:
            for name, begin, end, at in link["entries"]:
                referred.add(name)
                entries.append(_entry(rows_of(by_name[name], (begin, end)), link["file"][0], at, at + end - begin))
        at = body["file"][1]
        for spec in written_specs(self._writes[rank], referred, body["parts"]):
            size = body["objects"].get(spec.name, 0) if spec.encoding else spec.num_bytes
            entries.append(_entry(spec, file_name(rank), at, at + size))
            at += size
        if at != body["file"][0]:
            raise SaveError(f"rank {rank} wrote {body['file'][0]} bytes where the plan says {at}")
        return entries


def _entry(spec: TensorSpec, file: str, begin: int, end: int) -> TensorEntry:
    shape = (end - begin,) if spec.encoding else spec.shape
    whole, offset = (shape, (0,)) if spec.encoding else (spec.whole_shape, spec.begin)
    return TensorEntry(spec.name, spec.dtype, whole, offset, shape, file, begin, end, ())
