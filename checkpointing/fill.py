"""How one rank's file is filled from a snapshot: its extents, and the sources they come from.

The bulk, up to the last full block of the tensors, is staged while objects are still being serialised; the tail, which
holds the objects, is planned when their sizes are known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from checkpointing.blocks import Block, Extent, plan_blocks
from checkpointing.datafile import DataLayout, bytes_of, slices_text
from checkpointing.dtypes import itemsize
from checkpointing.marks import Mark, MarkedSource
from checkpointing.pieces import PIECE_BYTES
from checkpointing.providers.composite import CompositeProvider
from checkpointing.records import TensorSpec
from checkpointing.rows import Part
from checkpointing.snapshot import Snapshot, Structure
from checkpointing.sources import HostSource, LaterSource, Source, later, made_source, view_source


@dataclass(frozen=True, slots=True)
class _Member:
    """What one extent holds: one tensor or object, or small ones from the arena."""

    names: tuple[str, ...]
    part: Part | None = None
    """The one tensor, or part of it; None of objects."""
    small: bool = False
    in_place: bool = False
    """Whether the small ones lie in the arena as they lie in the file."""


@dataclass(slots=True)
class Filling:
    """The plan of one file; a function of its layout and of the structure of the state."""

    layout: DataLayout
    structure: Structure
    parts: Mapping[str, Part]
    """By their name in the file; none when all are whole tensors."""
    slices: str
    members: list[_Member]
    extents: list[Extent]
    tail_at: int
    """Where the last block that is not full of tensors begins."""
    _bulk: tuple[Block, ...]
    _picks: dict[int, CompositeProvider]
    """Of members that are not contiguous in the arena: views of it, made for one arena."""
    _arena: torch.Tensor | None = None

    @property
    def objects(self) -> tuple[TensorSpec, ...]:
        """Objects, in the order of the file."""
        return self.layout.specs[len(self.layout.ranges) :]

    @property
    def urgent_tail(self) -> bool:
        """Whether something in the tail is to be copied before `save` returns."""
        return any(one.urgent and one.end > self.tail_at for one in self.extents)

    def bulk(self, *, urgent: bool) -> list[Block]:
        """Return the full blocks, of the urgent ones or of the others."""
        return [block for block in self._bulk if block.urgent == urgent]

    def tail(self, sizes: Sequence[int]) -> tuple[Block, ...]:
        """Return the last blocks, now that the sizes of the objects are known."""
        ranges = self.layout.object_ranges(sizes)
        first = len(self.members) - len(self.objects)
        extents = [Extent(first + i, begin, end) for i, (begin, end) in enumerate(ranges) if begin < end]
        end = ranges[-1][1] if ranges else self.layout.end
        return plan_blocks([one for one in (*self.extents, *extents) if one.end > self.tail_at], self.tail_at, end)

    def small_source(self, index: int, snapshot: Snapshot) -> Source:
        """Return the source of small tensors: the arena itself where they lie in it as they lie in the file."""
        names, places = self.members[index].names, self.structure.arena_places
        if self.members[index].in_place:
            return HostSource([bytes_of(snapshot.arena)[places[names[0]][0] : places[names[-1]][1]]])
        if self._arena is not snapshot.arena:
            self._arena, self._picks = snapshot.arena, {}
        if index not in self._picks:
            self._picks[index] = CompositeProvider.of([snapshot.arena[a:b] for a, b in map(places.__getitem__, names)])
        return made_source("", self._picks[index])


class Sources:
    """The sources of one save, by the number of the member; what needs work is begun on threads of its own.

    Of tensors that are `fine` marks are made, of so many bytes.
    """

    def __init__(self, filling: Filling, snapshot: Snapshot, fine: Mapping[str, int]) -> None:
        self.known: dict[int, Source] = {}
        self.marks = defaultdict[str, list[Mark]](list)
        """By the name in the file, of tensors that are `fine`."""
        self._objects: list[HostSource | Future[HostSource]] = []
        for index, member in enumerate(filling.members):
            if member.small:
                self.known[index] = filling.small_source(index, snapshot)
                continue
            (name,) = member.names if member.part is None else (member.part.held.name,)
            made = snapshot.made.get(name)
            source = made or view_source(name, snapshot.providers[name])
            if source is None:
                made = later(name, snapshot.providers[name])
                source = LaterSource(made)
            if (part := member.part) is not None and (part.at or part.spec is not part.held or name in fine):
                source = MarkedSource(source, part.at, fine.get(name, 0), self.marks[member.names[0]])
            self.known[index] = source
            if index >= len(filling.members) - len(filling.objects):
                assert made is not None
                self._objects.append(made)

    def finish(self) -> list[int]:
        """Return the sizes of the objects, once all are serialised."""
        return [(one.result() if isinstance(one, Future) else one).num_bytes for one in self._objects]


def fill_plan(placed: DataLayout, structure: Structure, parts: Sequence[Part] = ()) -> Filling:
    """Return how a file of this layout is filled from states of this structure."""
    part_of = {part.spec.name: part for part in parts}
    members: list[_Member] = []
    extents: list[Extent] = []
    pairs = [pair for pair in zip(placed.specs, placed.ranges, strict=False) if pair[1][0] < pair[1][1]]
    small = structure.arena_places

    def group(pair: tuple[TensorSpec, tuple[int, int]]) -> tuple[object, ...]:
        spec = pair[0]
        return (itemsize(spec.dtype),) if spec.name in small else (0, spec.name)

    for key, found in groupby(pairs, key=group):
        held = list(found)
        names = tuple(spec.name for spec, _ in held)
        cuts = tuple(end for _, (_, end) in held[:-1])
        part = part_of.get(names[0]) or Part(held[0][0], held[0][0], 0)
        urgent = part.held.name in structure.urgent
        extents.append(Extent(len(members), held[0][1][0], held[-1][1][1], urgent, cuts))
        in_place = key[0] != 0 and all(small[a][1] == small[b][0] for a, b in pairwise(names))
        members.append(_Member(names, part, key[0] != 0, in_place))
    members += [_Member((spec.name,)) for spec in placed.specs[len(placed.ranges) :]]
    tail_at = max(placed.head_bytes, placed.end - placed.end % PIECE_BYTES)
    bulk = plan_blocks(extents, placed.head_bytes, tail_at)
    return Filling(placed, structure, part_of, slices_text(placed.specs), members, extents, tail_at, bulk, {})
