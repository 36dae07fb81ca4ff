"""What has not changed since the last save: it is referred to instead of written again.

A reference is a hard link to the older data file, inside of the new checkpoint's folder: every checkpoint is whole by
itself, and the file system counts the references, so that pruning the older one frees nothing the newer one needs.
What may be unchanged is hashed where it lies, which costs no write and no copy; a wrong guess costs one hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from checkpointing.pieces import PIECE_BYTES, piece_ranges
from checkpointing.plan import SMALL_BYTES
from checkpointing.providers.base import Cost, Place, Provider
from checkpointing.records import FileEntry, TensorSpec


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor as this rank last wrote it."""

    spec: TensorSpec
    file: str
    """The name a link to the data file has in later checkpoints."""
    begin: int
    end: int
    hashes: tuple[str, ...]
    settled: bool
    """Whether the save before found the same bytes, so that the next one may."""


@dataclass(frozen=True, slots=True)
class LastSave:
    """What this rank wrote, or referred to, in the last save that is durable."""

    folder: Path
    kept: Mapping[str, Kept] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    """By the name of the link."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """From the name of the link to the name of the file in `folder`."""


def link_name(rank: int, step: int) -> str:
    """Return the name under which later checkpoints refer to the file that `rank` wrote at `step`."""
    return f"rank-{rank:05d}.from-{step}.safetensors"


def unchanged(
    last: LastSave | None, specs: Iterable[TensorSpec], providers: Mapping[str, Provider], frozen: Iterable[str]
) -> dict[str, Kept]:
    """Return what of `specs` has the very bytes of the last save, by name."""
    if last is None:
        return {}
    never = set(frozen)
    return {
        spec.name: kept
        for spec in specs
        if (kept := last.kept.get(spec.name)) is not None
        and kept.spec == spec
        and (kept.settled or spec.name in never)
        and _hashes(providers.get(spec.name), kept) == kept.hashes
    }


def references(last: LastSave, kept: Mapping[str, Kept]) -> list[dict[str, Any]]:
    """Return the files that `kept` refers to, as they are reported: their entries, and what of them is used."""
    found = []
    for name in sorted({one.file for one in kept.values()}):
        used = sorted((k for k in kept.values() if k.file == name), key=lambda k: (k.begin, k.end, k.spec.name))
        file = last.files[name]
        found.append(
            {
                "file": [name, file.length, file.head_bytes, file.xxh3_64],
                "pieces": "".join(hash_ for k in used for hash_ in k.hashes),
                "entries": [[k.spec.name, k.begin, k.end] for k in used],
            }
        )
    return found


def after_save(
    last: LastSave | None,
    folder: Path,
    file: FileEntry,
    link: str,
    written: Sequence[tuple[TensorSpec, int, int, tuple[str, ...]]],
    referred: Mapping[str, Kept],
) -> LastSave:
    """Return what the next save may refer to."""
    kept = {name: replace(one, settled=True) for name, one in referred.items()}
    for spec, begin, end, hashes in written:
        if spec.num_bytes > SMALL_BYTES:
            before = last.kept.get(spec.name) if last else None
            same = before is not None and before.spec == spec and before.hashes == hashes
            kept[spec.name] = Kept(spec, link, begin, end, hashes, same)
    files, paths = {link: file}, {link: file.path}
    for name in {one.file for one in referred.values()}:
        assert last is not None
        files[name], paths[name] = last.files[name], name
    return LastSave(folder, kept, files, paths)


def _hashes(provider: Provider | None, kept: Kept) -> tuple[str, ...] | None:
    """Return the hashes a tensor would have where it lay in the file, from live memory."""
    if provider is None or provider.cost is not Cost.VIEW or provider.place is not Place.HOST:
        return None
    (data,) = provider.chunks()
    if len(data) != kept.end - kept.begin:
        return None
    view = memoryview(data)
    ranges = piece_ranges(kept.begin, kept.end, PIECE_BYTES)
    return tuple(xxhash.xxh3_64_hexdigest(view[a - kept.begin : b - kept.begin]) for a, b in ranges)
