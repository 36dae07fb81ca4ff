"""What has not changed since the last save: it is referred to instead of written again, whole tensors or rows of them.

A reference is a hard link to the older data file, inside of the new checkpoint's folder: every checkpoint is whole by
itself, and the file system counts the references, so that pruning the older one frees nothing the newer one needs.

Nothing is hashed twice of what changes all over: a few small probes tell whether a tensor is worth a look. Then what
may be unchanged is hashed where it lies, which costs no write and no copy, against hashes of the bytes that were staged
(`marks`): of whole pieces at first, and of what is found to change in parts, of short runs of rows.

So that neither manifests nor disks fill up: MIN_RUN_BYTES, MAX_REFERENCES, MAX_FILES, MIN_USE.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpointing.marks import Mark, clipped, equal_spans, fine_bytes, pieces_of, probes_of, proven, view_of
from checkpointing.plan import SMALL_BYTES
from checkpointing.providers.base import Provider
from checkpointing.records import FileEntry, TensorSpec
from checkpointing.rows import Part, Span, gaps, overlaps, whole_rows

MIN_RUN_BYTES = 256 * 2**10
"""A tensor is not cut for fewer; one that has not changed at all is referred to from SMALL_BYTES on."""
MAX_REFERENCES = 64
"""For so many a tensor of one rank is cut: with what is written between them it has 129 entries in the manifest."""
MAX_FILES = 4
"""Older files a rank's part of a checkpoint refers to: those of which it needs most."""
MIN_USE = 1 / 8
"""A file of which less is needed is not kept for it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Rows of a tensor, where a save put them."""

    begin: int
    end: int
    """Which bytes of the tensor, as this rank holds it."""
    file: str
    """The name a link to the data file has in later checkpoints."""
    at: int
    """Where in the file they begin."""
    hashes: tuple[str, ...] = ()
    """Of their pieces."""


@dataclass(frozen=True, slots=True)
class Known:
    """A tensor as the last save left it."""

    spec: TensorSpec
    probes: tuple[int, ...]
    runs: tuple[Kept, ...]
    """All of it, in order."""
    marks: tuple[Mark, ...]
    """The finest hashes there are of what was staged; all of it, in order."""


@dataclass(frozen=True, slots=True)
class LastSave:
    """What this rank wrote, or referred to, in the last save that is durable."""

    folder: Path
    known: Mapping[str, Known] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    """By the name of the link."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """From the name of the link to the name of the file in `folder`."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a save finds before it writes."""

    probes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of every tensor that a later save may refer to."""
    kept: Mapping[str, tuple[Kept, ...]] = field(default_factory=dict)
    """What is referred to; of each tensor in order."""
    marks: Mapping[str, tuple[Mark, ...]] = field(default_factory=dict)
    """Of what is referred to."""
    fine: Mapping[str, int] = field(default_factory=dict)
    """Tensors that seem to change in parts: what is written of them gets marks as well, of so many bytes."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Of these."""

    @property
    def parts(self) -> dict[str, list[Span]]:
        """What is written of tensors that are referred to in part."""
        left = {
            name: gaps(self.sizes[name], [(one.begin, one.end) for one in kept]) for name, kept in self.kept.items()
        }
        return {name: spans for name, spans in left.items() if spans}

    @property
    def files(self) -> set[str]:
        """Names of the links."""
        return {one.file for kept in self.kept.values() for one in kept}

    def without_references(self) -> Survey:
        """Return what is left where links cannot be made."""
        return replace(self, kept={}, marks={})


def link_name(rank: int, step: int, taken: Collection[str] = ()) -> str:
    """Return the name under which later checkpoints refer to the file that `rank` wrote at `step`.

    A run that went back may have one of that step already: among those that are `taken`.
    """
    names = (f"rank-{rank:05d}.from-{step}{again}.safetensors" for again in ("", *(f"-{n}" for n in range(2, 99))))
    return next(name for name in names if name not in taken)


def survey(
    last: LastSave | None, specs: Iterable[TensorSpec], providers: Mapping[str, Provider], frozen: Collection[str]
) -> Survey:
    """Look at what this rank is about to write: what of it has the very bytes of the last save."""
    probes, views, found, fine = dict[str, tuple[int, ...]](), dict[str, memoryview](), dict[str, list[Kept]](), {}
    known = {} if last is None else last.known
    for spec in specs:
        if spec.num_bytes <= SMALL_BYTES or (view := view_of(providers.get(spec.name), spec.num_bytes)) is None:
            continue
        name, before = spec.name, known.get(spec.name)
        probes[name] = probes_of(view)
        if before is None or before.spec != spec:
            continue
        if name in frozen or any(a == b for a, b in zip(before.probes, probes[name], strict=True)):
            views[name], found[name], fine[name] = view, _unchanged_runs(before, view), fine_bytes(spec)
    chosen = {} if last is None else _worth_it(found, last.files)
    kept, marks = dict[str, tuple[Kept, ...]](), dict[str, tuple[Mark, ...]]()
    for name, runs in chosen.items():
        if proved := list(_proved(known[name], runs, views[name])):
            kept[name] = tuple(one for one, _ in proved)
            marks[name] = tuple(mark for _, own in proved for mark in own)
    return Survey(probes, kept, marks, fine, {name: len(view) for name, view in views.items()})


def references(last: LastSave, kept: Mapping[str, Sequence[Kept]]) -> list[dict[str, Any]]:
    """Return the files that `kept` refers to, as they are reported: their entries, and what of them is used."""
    by_file: dict[str, list[tuple[str, Kept]]] = defaultdict(list)
    for name, runs in kept.items():
        for run in runs:
            by_file[run.file].append((name, run))
    found = []
    for file, used in sorted(by_file.items()):
        used.sort(key=lambda one: one[1].at)  # none is empty, so no two begin at one place
        entry = last.files[file]
        found.append(
            {
                "file": [file, entry.length, entry.head_bytes, entry.xxh3_64],
                "pieces": "".join(hash_ for _, run in used for hash_ in run.hashes),
                "entries": [[name, run.begin, run.end, run.at] for name, run in used],
            }
        )
    return found


def after_save(
    last: LastSave | None,
    folder: Path,
    file: FileEntry,
    link: str,
    looked: Survey,
    written: Iterable[tuple[Part, int, tuple[str, ...], Sequence[Mark]]],
) -> LastSave:
    """Return what the next save may refer to.

    `written` are the parts of tensors with probes: where they begin in the file, the hashes of their pieces, and marks
    where there are finer ones.
    """
    runs, marks, specs = defaultdict[str, list[Kept]](list), defaultdict[str, list[Mark]](list), dict[str, TensorSpec]()
    for name, kept in looked.kept.items():
        assert last is not None
        specs[name] = last.known[name].spec
        runs[name] += kept
        marks[name] += looked.marks[name]
    for part, at, hashes, fine in written:
        name, run = part.held.name, Kept(part.at, part.at + part.spec.num_bytes, link, at, hashes)
        specs[name] = part.held
        runs[name].append(run)
        marks[name] += fine or pieces_of(run.begin, run.end, run.at, hashes)
    known = {
        name: Known(spec, looked.probes[name], _in_order(runs[name]), tuple(sorted(marks[name])))
        for name, spec in specs.items()
    }
    files, paths = {link: file}, {link: file.path}
    for name in looked.files:
        assert last is not None
        files[name], paths[name] = last.files[name], name
    return LastSave(folder, known, files, paths)


def _in_order(runs: Iterable[Kept]) -> tuple[Kept, ...]:
    return tuple(sorted(runs, key=lambda run: run.begin))


def _unchanged_runs(known: Known, view: memoryview) -> list[Kept]:
    """Return the rows that have the bytes of the last save, where it left them; the longest, and in order."""
    found, whole = list[Kept](), set[int]()
    spans = equal_spans(view, known.marks)
    for index, span in overlaps(spans, [(run.begin, run.end) for run in known.runs]):
        run, (begin, end) = known.runs[index], whole_rows(known.spec, span)
        if (begin, end) == (run.begin, run.end):
            whole.add(begin)
        elif end - begin < MIN_RUN_BYTES:
            continue
        found.append(Kept(begin, end, run.file, run.at + begin - run.begin))
    found.sort(key=lambda run: (run.begin - run.end, run.begin))
    chosen = found[:MAX_REFERENCES]
    for run in found[MAX_REFERENCES:]:
        # What is a run already may cut nothing further: then it is as well referred to as written again.
        if run.begin in whole and _num_entries(len(view), [*chosen, run]) <= 2 * MAX_REFERENCES + 1:
            chosen.append(run)
    return list(_in_order(chosen))


def _num_entries(size: int, runs: Sequence[Kept]) -> int:
    return len(runs) + len(gaps(size, sorted((run.begin, run.end) for run in runs)))


def _worth_it(found: Mapping[str, list[Kept]], files: Mapping[str, FileEntry]) -> dict[str, list[Kept]]:
    """Return the runs in files of which enough is needed."""
    needed: dict[str, int] = defaultdict(int)
    for run in (run for runs in found.values() for run in runs):
        needed[run.file] += run.end - run.begin
    used = [name for name, size in needed.items() if size >= MIN_USE * files[name].length]
    used = sorted(used, key=lambda name: (-needed[name], name))[:MAX_FILES]
    return {name: [run for run in runs if run.file in used] for name, runs in found.items()}


def _proved(known: Known, runs: Sequence[Kept], view: memoryview) -> Iterator[tuple[Kept, tuple[Mark, ...]]]:
    """Yield runs with the hashes of their pieces, and their marks; not those that have changed meanwhile.

    Hashes that are known are those of staged bytes. Others, at the ends of a run, are made of bytes that are proven to
    be these.
    """
    there = {mark[:2]: mark[2] for mark in known.marks}
    there |= {mark[:2]: mark[2] for run in known.runs for mark in pieces_of(run.begin, run.end, run.at, run.hashes)}

    def hash_of(begin: int, end: int) -> str:
        return there.get((begin, end)) or proven(view, known.marks, begin, end) or ""

    for run in runs:
        hashes = [hash_of(begin, end) for begin, end, _ in pieces_of(run.begin, run.end, run.at)]
        spans = [(begin, end) for _, begin, end in clipped(known.marks, run.begin, run.end)]
        marks = tuple((begin, end, hash_of(begin, end)) for begin, end in spans)
        if all(hashes) and all(mark[2] for mark in marks):
            yield replace(run, hashes=tuple(hashes)), marks
