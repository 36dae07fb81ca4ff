"""Which rank reads which bytes, and who gets them from whom. Pure: manifests and boxes in, a frozen plan out.

box     a block of a global tensor: where it begins and its shape, one number per dim
entry   a box as it was saved: a TensorEntry of the manifest
want    a box that a rank needs; saved on N ranks and wanted on M, wants and entries overlap in any way
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import attrgetter

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
_PLACE = attrgetter("entry.file", "entry.begin", "entry.end", "entry.name")


@dataclass(frozen=True, slots=True)
class Task:
    """One entry: who reads it, and who needs some of it (the reader too, when it does)."""

    entry: TensorEntry
    reader: int
    takers: tuple[int, ...]
    shared: bool
    """Whether every rank needs all of it: then it is broadcast."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Every byte once: tasks in the order in which entries lie on disk, the same on every rank."""

    tasks: tuple[Task, ...]

    def read_by(self, rank: int) -> tuple[Task, ...]:
        """Return what a rank reads."""
        return tuple(task for task in self.tasks if task.reader == rank)

    def __str__(self) -> str:
        lines = (
            f"{task.entry.name} {list(task.entry.offset)}+{list(task.entry.shape)}: rank {task.reader} reads"
            + (", all get it" if task.shared else f", for {list(task.takers)}")
            for task in self.tasks
        )
        return "\n".join(lines)


def plan_load(manifest: Manifest, wants: Sequence[Wants]) -> LoadPlan:
    """Give each entry that is needed to one of the ranks that need it, so that the bytes read balance.

    Raises IntegrityError when what was saved does not cover what is wanted.
    """
    by_name = entries_by_name(manifest)
    for want in wants:
        for name, box in want.items():
            check_cover(name, by_name.get(name, ()), box)
    needed = _needed(by_name, wants)
    loads = [0] * len(wants)
    tasks = []
    for entry, takers, by_all in sorted(
        needed, key=lambda one: (len(one[1]) > 1, one[0].begin - one[0].end, one[0].name)
    ):
        reader = min(takers, key=lambda rank: (loads[rank], rank))
        loads[reader] += entry.end - entry.begin
        tasks.append(Task(entry, reader, takers, by_all and len(wants) > 1))
    tasks.sort(key=_PLACE)
    return LoadPlan(tuple(tasks))


def entries_by_name(manifest: Manifest) -> dict[str, list[TensorEntry]]:
    """Return the entries of each tensor; of the same box saved twice only the first."""
    found: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in manifest.tensors:
        found[entry.name].append(entry)
    for name, entries in found.items():
        if len(entries) > 1:
            first: dict[Box, TensorEntry] = {}
            for entry in entries:
                first.setdefault(box_of(entry), entry)
            found[name] = list(first.values())
    return dict(found)


def check_cover(name: str, entries: Iterable[TensorEntry], box: Box) -> None:
    """Raise IntegrityError unless the entries, which do not overlap, hold all of the box."""
    there, entries = 0, list(entries)
    if len(entries) == 1 and _is_box(entries[0], box):
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


def _needed(
    by_name: Mapping[str, Sequence[TensorEntry]], wants: Sequence[Wants]
) -> list[tuple[TensorEntry, tuple[int, ...], bool]]:
    """Return each entry that is needed, by which ranks, and whether every rank needs all of it."""
    found, every = [], tuple(range(len(wants)))
    for name, entries in by_name.items():
        boxes = [want.get(name) for want in wants]
        for entry in entries:
            takers = tuple(rank for rank, box in enumerate(boxes) if box is not None and _touches(entry, box))
            if takers:
                by_all = takers == every and all(box is not None and _is_inside(entry, box) for box in boxes)
                found.append((entry, takers, by_all))
    return found


def _is_box(entry: TensorEntry, box: Box) -> bool:
    return entry.shape == box.shape and entry.offset == box.offset


def _touches(entry: TensorEntry, box: Box) -> bool:
    # One without elements has nothing to share, and is read by who wants it all the same.
    return _is_box(entry, box) or box_of(entry).overlap(box) is not None or not (box.size or entry.begin - entry.end)


def _is_inside(entry: TensorEntry, box: Box) -> bool:
    if _is_box(entry, box):
        return bool(box.size)
    return box_of(entry).overlap(box) == box_of(entry)
