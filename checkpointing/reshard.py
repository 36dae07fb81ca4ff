"""Which rank reads which bytes, and who gets them from whom. Pure: manifests and boxes in, a frozen plan out.

box     a block of a global tensor: where it begins and its shape, one number per dim
entry   a box as it was saved: a TensorEntry of the manifest
want    a box that a rank needs; saved on N ranks and wanted on M, wants and entries overlap in any way
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from typing import NamedTuple

from checkpointing.errors import IntegrityError
from checkpointing.records import Manifest, TensorEntry


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a global tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements in the box."""
        return prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """Return what two boxes of one tensor share; None when that is nothing. A scalar's box shares itself."""
        begins = tuple(map(max, self.offset, other.offset))
        ends = tuple(map(min, self.ends, other.ends))
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            return None
        return Box(begins, tuple(end - begin for begin, end in zip(begins, ends, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return the slices of this box in a tensor that holds `outer`."""
        return tuple(
            slice(at - base, at - base + dim)
            for at, base, dim in zip(self.offset, outer.offset, self.shape, strict=True)
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index, per dim."""
        return tuple(at + dim for at, dim in zip(self.offset, self.shape, strict=True))


def box_of(entry: TensorEntry) -> Box:
    """Return the box of an entry."""
    return Box(entry.offset, entry.shape)


def whole(shape: Sequence[int]) -> Box:
    """Return the box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


Wants = Mapping[str, Box]
"""Names to the box a rank needs of each."""
RUN_BYTES = 8 * 2**20
"""Neighbours are read, and handed over, together up to this size."""
_PLACE = itemgetter(*map(TensorEntry._fields.index, ("file", "begin", "end", "name")))


class Task(NamedTuple):
    """Neighbours on disk that the same ranks need: who reads them, and who needs some of them (the reader does)."""

    entries: tuple[TensorEntry, ...]
    reader: int
    takers: tuple[int, ...]
    shared: bool
    """Whether every rank needs all of it: then it is broadcast."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the entries, which lie without gaps."""
        return self.entries[-1].end - self.entries[0].begin


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Every byte once: tasks in the order in which entries lie on disk, the same on every rank."""

    tasks: tuple[Task, ...]

    def __str__(self) -> str:
        lines = (
            f"{entry.name} {list(entry.offset)}+{list(entry.shape)}: rank {task.reader} reads"
            + (", all get it" if task.shared else f", for {list(task.takers)}")
            for task in self.tasks
            for entry in task.entries
        )
        return "\n".join(lines)


def plan_load(manifest: Manifest, wants: Sequence[Wants]) -> LoadPlan:
    """Give each entry that is needed to one of the ranks that need it, so that the bytes read balance.

    Raises IntegrityError when what was saved does not cover what is wanted.
    """
    by_name, ranks_of = entries_by_name(manifest), defaultdict[int, list[int]](list)
    for rank, want in enumerate(wants):
        ranks_of[id(want)].append(rank)  # replicas want the same: then looked at once
    takers, partly = dict[int, tuple[int, ...]](), set[int]()
    for ranks in ranks_of.values():
        for name, box in wants[ranks[0]].items():
            entries = by_name.get(name, ())
            if not (len(entries) == 1 and is_box(entries[0], box)):
                entries = _needed(name, entries, box, partly)
            for entry in entries:
                takers[id(entry)] = (*takers.get(id(entry), ()), *ranks)
    every, loads = len(wants), [0] * len(wants)
    tasks = []
    for run in _runs(manifest, takers, partly):
        needing = tuple(sorted(takers[id(run[0])]))
        tasks.append(Task(run, -1, needing, 1 < len(needing) == every and id(run[0]) not in partly))
    # What one rank alone needs is its own to read; then the largest first, to whoever has least.
    for at in sorted(range(len(tasks)), key=lambda at: (len(tasks[at].takers) > 1, -tasks[at].num_bytes, at)):
        reader = min(tasks[at].takers, key=lambda rank: (loads[rank], rank))
        loads[reader] += tasks[at].num_bytes
        tasks[at] = tasks[at]._replace(reader=reader)
    return LoadPlan(tuple(tasks))


def _needed(name: str, entries: Sequence[TensorEntry], box: Box, partly: set[int]) -> Sequence[TensorEntry]:
    """Return the entries with something of a box; of those that have more than that, note the id."""
    check_cover(name, entries, box)
    needed = [entry for entry in entries if _touches(entry, box)]
    partly.update(id(entry) for entry in needed if not _is_inside(entry, box))
    return needed


def _runs(
    manifest: Manifest, takers: Mapping[int, tuple[int, ...]], partly: Collection[int]
) -> Iterator[tuple[TensorEntry, ...]]:
    """Yield the entries that anyone needs in the order of their bytes, with neighbours that the same ranks need."""
    run: list[TensorEntry] = []
    for entry in sorted((entry for entry in manifest.tensors if id(entry) in takers), key=_PLACE):
        if run:
            last, here = run[-1], id(entry)
            joins = last.end == entry.begin and last.file == entry.file and entry.end - run[0].begin <= RUN_BYTES
            alike = takers[id(last)] == takers[here] and (not partly or (id(last) in partly) == (here in partly))
            if not (joins and alike):
                yield tuple(run)
                run = []
        run.append(entry)
    if run:
        yield tuple(run)


def entries_by_name(manifest: Manifest) -> dict[str, Sequence[TensorEntry]]:
    """Return the entries of each tensor; of the same box saved twice only the first."""
    one: dict[str, Sequence[TensorEntry]] = {entry.name: (entry,) for entry in manifest.tensors}
    if len(one) == len(manifest.tensors):
        return one
    found: dict[str, dict[Box, TensorEntry]] = defaultdict(dict)
    for entry in manifest.tensors:
        found[entry.name].setdefault(box_of(entry), entry)
    return {name: [*entries.values()] for name, entries in found.items()}


def check_cover(name: str, entries: Iterable[TensorEntry], box: Box) -> None:
    """Raise IntegrityError unless the entries, which do not overlap, hold all of the box."""
    there, entries = 0, list(entries)
    if len(entries) == 1 and is_box(entries[0], box):
        return
    for entry in entries:
        if entry.shape and len(entry.shape) != len(box.shape):
            raise IntegrityError(f"tensor {name!r} was saved as {list(entry.global_shape)}; {box} is no part of it")
        shared = box_of(entry).overlap(box)
        there += shared.size if shared else 0
    if there != box.size:
        raise IntegrityError(
            f"tensor {name!r}: {there} of the {box.size} elements at {list(box.offset)}+{list(box.shape)} were saved; "
            "was it saved by all ranks that hold a part of it?"
        )


def is_box(entry: TensorEntry, box: Box) -> bool:
    """Return whether an entry is exactly a box."""
    return entry.shape == box.shape and entry.offset == box.offset


def _touches(entry: TensorEntry, box: Box) -> bool:
    # One without elements has nothing to share, and is read by who wants it all the same.
    return is_box(entry, box) or box_of(entry).overlap(box) is not None or not (box.size or entry.begin - entry.end)


def _is_inside(entry: TensorEntry, box: Box) -> bool:
    if is_box(entry, box):
        return bool(box.size)
    return box_of(entry).overlap(box) == box_of(entry)
