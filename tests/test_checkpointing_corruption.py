"""The corruption matrix: every region of every file, damaged in every way; all of it is found, and named."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, KeepLast, ObjectProvider
from checkpointing.errors import IntegrityError
from checkpointing.folder import Folder
from checkpointing.manifest import loads
from checkpointing.pieces import piece_ranges
from checkpointing.storage import open_storage
from checkpointing.storage.local import LocalStorage
from checkpointing.tiers import copy_step
from checkpointing.verify import damages
from tests.flat_states import Flat, assorted
from tests.spawn import run_ranks
from tests.test_checkpointing_s3 import bucket

__all__ = ["bucket"]
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Region:
    """Bytes of a file that mean one thing."""

    file: str
    begin: int
    end: int
    tensor: str | None = None
    piece: int | None = None


def state(rank: int, step: int) -> dict[str, Any]:
    torch.manual_seed(step * 10 + rank)
    own = {f"{name}.{rank}": value for name, value in assorted(step * 10 + rank).items()}
    large = {f"large.{rank}": torch.randn(1_100_000), f"words.{rank}": ObjectProvider({"é": list(range(9000))})}
    return own | large | {f"frozen.{rank}": torch.arange(300_000.0) + rank}


def save_steps(info: Any, root: Path, *, incremental: bool) -> None:
    with Checkpointer(root, keep=KeepLast(9), incremental=incremental, timeout_s=30) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, Flat(state(info.rank, step))).wait()


def save_plain(info: Any, root: Path) -> None:
    save_steps(info, root, incremental=False)


def save_incremental(info: Any, root: Path) -> None:
    save_steps(info, root, incremental=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    run_ranks(save_plain, 2, root)
    return Folder(root, LocalStorage())


@pytest.fixture(scope="module")
def incremental(tmp_path_factory):
    root = tmp_path_factory.mktemp("incremental")
    run_ranks(save_incremental, 2, root)
    return Folder(root, LocalStorage())


def regions(folder: Folder, step: int) -> list[Region]:
    """Every region of every data file that the checkpoint refers to, and pieces of its manifest."""
    manifest = folder.inspect(step)
    found: list[Region] = []
    for file in manifest.files:
        text_end = 8 + int.from_bytes((folder.at(step) / file.path).read_bytes()[:8], "little")
        found += [Region(file.path, 0, 8), Region(file.path, 8, text_end)]
        if text_end < file.head_bytes:
            found.append(Region(file.path, text_end, file.head_bytes))
    for entry in manifest.tensors:
        for piece, (begin, end) in enumerate(piece_ranges(entry.begin, entry.end, manifest.piece_bytes)):
            if begin < end:
                found.append(Region(entry.file, begin, end, entry.name, piece))
    data = (folder.at(step) / MANIFEST).read_bytes()
    cuts = sorted({0, 11, 28, len(data) - 1, len(data), *(data.index(f'"{key}":'.encode()) for key in keys(data))})
    return found + [Region(MANIFEST, begin, end) for begin, end in pairwise(cuts)]


def keys(data: bytes) -> list[str]:
    return [key for key in json.loads(data) if key != "xxh3_64"]


def damaged(good: bytes, region: Region, other: Region, older: bytes) -> Iterator[tuple[str, bytes]]:
    """Every way to damage a region; `other` is a region of the same file, `older` the file of another checkpoint."""
    begin, end = region.begin, region.end
    for at in sorted({begin, (begin + end) // 2, end - 1}):
        for bit in (0, 7):
            yield f"bit {bit} of byte {at}", good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :]
    yield "zeroed", good[:begin] + bytes(end - begin) + good[end:]
    yield "a sector zeroed", good[:begin] + bytes(min(512, end - begin)) + good[begin + min(512, end - begin) :]
    yield "ones", good[:begin] + b"\xff" * (end - begin) + good[end:]
    yield "that of an older checkpoint", good[:begin] + older[begin:end] + good[end:]
    yield "cut before", good[:begin]
    yield "cut inside", good[: (begin + end) // 2]
    yield "taken out", good[:begin] + good[end:]
    yield "twice", good[:end] + good[begin:end] + good[end:]
    yield "a byte more", good[:end] + b"\0" + good[end:]
    if begin < other.begin and end <= other.begin:
        middle = good[end : other.begin]
        yield "swapped", good[:begin] + good[other.begin : other.end] + middle + good[begin:end] + good[other.end :]


def first_damage(folder: Folder, step: int) -> Any:
    """What `verify` finds first: a Damage, or the error that reading the manifest raised; None when all is well."""
    try:
        manifest = folder.inspect(step)
    except IntegrityError as error:
        return error
    for file in manifest.files:
        for damage in damages(folder.storage, folder.at(step), manifest, file, lambda _: None):
            return damage
    return None


def restore_error(folder: Folder, step: int) -> str | None:
    """What a restore of exactly this step raises."""
    with Checkpointer(folder.root, group=SINGLE) as ckpt:
        try:
            ckpt.restore(Flat({}), step=step)
        except IntegrityError as error:
            return str(error)
    return None


def check(folder: Folder, step: int, *, loads_too: int) -> dict[str, int]:
    """Damage every region of a step in every way; every so many cases are loaded as well."""
    counts = {"cases": 0, "found": 0, "named_chunks": 0, "loads_refused": 0, "regions": 0}
    found = regions(folder, step)
    assert first_damage(folder, step) is None
    for number, region in enumerate(found):
        counts["regions"] += 1
        path = folder.at(step) / region.file
        good = path.read_bytes()
        same_file = [one for one in found[number + 1 :] if one.file == region.file and one.begin >= region.end]
        other = same_file[0] if same_file else region
        older = folder.root / "step-1" / region.file
        for what, bad in damaged(good, region, other, older.read_bytes() if older.exists() else bytes(len(good))):
            if bad == good:  # zeros that were zeros
                continue
            write_through(path, bad)
            text = f"{region}, {what}"
            counts["cases"] += 1
            damage = first_damage(folder, step)
            assert damage is not None, text
            assert f"step-{step}/{region.file}" in str(damage), f"{text}: {damage}"
            counts["found"] += 1
            if region.tensor is not None and len(bad) == len(good):
                assert (damage.tensor, damage.piece) == (region.tensor, region.piece), f"{text}: {damage}"
                assert (damage.begin, damage.end) == (region.begin, region.end)
                counts["named_chunks"] += 1
            if counts["cases"] % loads_too == 0:
                error = restore_error(folder, step)
                assert error is not None, text
                assert f"step-{step}/{region.file}" in error, f"{text}: {error}"
                counts["loads_refused"] += 1
        write_through(path, good)
    assert first_damage(folder, step) is None
    assert counts["found"] == counts["cases"] > 300
    return counts


def write_through(path: Path, data: bytes) -> None:
    """Write in place: every name of the file sees it."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def test_plain_files(plain, record_property):
    record_property("corruption", check(plain, 3, loads_too=5))


@pytest.mark.slow
def test_incremental_references(incremental, record_property):
    """A damage in a shared file is found in every checkpoint that refers to these bytes, and in no other."""
    manifest = incremental.inspect(3)
    linked = [file.path for file in manifest.files if ".from-" in file.path]
    assert len(linked) == 2
    assert os.path.samefile(incremental.at(3) / linked[0], incremental.at(1) / "rank-00000.safetensors")
    record_property("corruption", check(incremental, 3, loads_too=9))
    (frozen,) = (entry for entry in manifest.tensors if entry.name == "frozen.1")
    path = incremental.at(3) / frozen.file
    good = path.read_bytes()
    write_through(path, good[: frozen.begin] + b"?" + good[frozen.begin + 1 :])
    for step in (1, 2, 3):
        damage = first_damage(incremental, step)
        assert (damage.tensor, damage.piece) == ("frozen.1", 0)
    write_through(path, good)


def test_whole_files(plain, record_property):
    """Missing, exchanged, another checkpoint's, and things that are no plain files."""
    counts = {"cases": 0, "found": 0}
    place = plain.at(3)
    names = [file.path for file in plain.inspect(3).files]
    for name in (*names, MANIFEST):
        path, aside = place / name, place / "aside"
        path.rename(aside)
        for make in (
            lambda path: None,
            lambda path: path.mkdir(),
            lambda path: os.mkfifo(path),
            lambda path: path.symlink_to(place / "aside"),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes((plain.at(2) / path.name).read_bytes()),
        ):
            make(path)
            counts["cases"] += 1
            damage = first_damage(plain, 3)
            assert damage is not None
            assert "step-3" in str(damage)
            assert restore_error(plain, 3) is not None
            counts["found"] += 1
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        aside.rename(path)
    first, second = (place / name for name in names[:2])
    first.rename(place / "aside")
    second.rename(first)
    (place / "aside").rename(second)
    assert "step-3/" in str(first_damage(plain, 3))
    first.rename(place / "aside")
    second.rename(first)
    (place / "aside").rename(second)
    assert first_damage(plain, 3) is None
    record_property("corruption", {"cases": counts["cases"] + 1, "found": counts["found"] + 1})


@pytest.mark.slow
def test_an_object_store(plain, bucket, record_property):
    root, storage = open_storage(f"{bucket}/matrix")
    second = Folder(root, storage)
    copy_step(plain, second, 3)
    counts = {"cases": 0, "found": 0, "named_chunks": 0}
    manifest = loads((plain.at(3) / MANIFEST).read_bytes())
    assert first_damage(second, 3) is None
    chosen = [one for one in regions(plain, 3) if one.tensor is None or one.piece or "page" in one.tensor]
    for region in chosen:
        good = (plain.at(3) / region.file).read_bytes()
        at = (region.begin + region.end) // 2
        flipped = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
        for bad in (flipped, good[:at], good + b"\0"):
            storage.write_stream(root / "step-3" / region.file, len(bad), [bad])
            damage = first_damage(second, 3)
            assert f"step-3/{region.file}" in str(damage)
            counts["cases"] += 1
            counts["found"] += 1
            if bad is flipped and region.tensor:
                assert (damage.tensor, damage.piece) == (region.tensor, region.piece)
                counts["named_chunks"] += 1
        storage.write_stream(root / "step-3" / region.file, len(good), [good])
    assert len(manifest.files) == 2
    assert first_damage(second, 3) is None
    record_property("corruption", counts)
