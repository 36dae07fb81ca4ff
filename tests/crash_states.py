"""Every state a crash could leave on the disk, from a record of what a program asked the disk to do.

`recorded` listens behind `LocalStorage`, the one place that changes the disk. `crash_states` replays the record up to
every call, and keeps of what was not yet synced: all of it (the process died), none of it, the names without the bytes,
the bytes without the names, or all of it with the last write torn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from checkpointing.handle import SaveHandle
from checkpointing.storage.local import LocalStorage

WAYS = ("all", "nothing unsynced", "names without bytes", "bytes without names", "last write torn")
_CHANGES = (
    "make_folder", "create", "create_direct", "write", "write_at", "truncate", "sync", "sync_folder", "rename", "link",
    "remove_file", "remove_tree",
)  # fmt: skip


@dataclass
class File:
    """A file: what was asked for, and what a power cut would leave."""

    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    before_last: bytes | None = None


@dataclass
class Disk:
    """Files and names; `durable` are the names as of the last sync of their folder."""

    root: Path
    names: dict[Path, File | None] = field(default_factory=dict)
    durable: dict[Path, File | None] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Disk:
        disk = cls(root)
        for path in sorted(root.rglob("*")):
            data = None if path.is_dir() else path.read_bytes()
            disk.names[path] = None if data is None else File(bytearray(data), data)
        disk.durable = dict(disk.names)
        return disk

    def write(self, file: File, data: bytes, offset: int) -> None:
        file.before_last = bytes(file.now)
        file.now.extend(bytes(max(0, offset + len(data) - len(file.now))))
        file.now[offset : offset + len(data)] = data

    def remove(self, path: Path) -> None:
        for name in [one for one in self.names if one == path or path in one.parents]:
            del self.names[name]

    def rename(self, old: Path, new: Path) -> None:
        moved = {one: file for one, file in self.names.items() if one == old or old in one.parents}
        self.remove(old)
        self.remove(new)
        self.names |= {new / one.relative_to(old): file for one, file in moved.items()}
        # What is durable inside of a folder goes with the folder, whose own name may not be durable yet.
        for one, file in list(self.durable.items()):
            if old in one.parents:
                self.durable[new / one.relative_to(old)] = file

    def sync_folder(self, path: Path) -> None:
        for name in [one for one in self.durable if one.parent == path and one not in self.names]:
            del self.durable[name]
        self.durable |= {name: file for name, file in self.names.items() if name.parent == path}

    def left(self, way: str, last: File | None) -> dict[Path, bytes | None]:
        """Return what is on the disk after a crash: bytes of files, None for folders."""
        names = self.durable if way in ("nothing unsynced", "bytes without names") else self.names
        kept: dict[Path, bytes | None] = {}
        for path, file in names.items():
            if file is None:
                kept[path] = None
            elif way in ("nothing unsynced", "names without bytes"):
                kept[path] = file.synced
            elif way == "last write torn" and file is last and file.before_last is not None:
                half = len(file.before_last) + (len(file.now) - len(file.before_last)) // 2
                kept[path] = bytes(file.now[: half or len(file.now) // 2])
            else:
                kept[path] = bytes(file.now)
        # A name is lost with any folder above it.
        return {path: data for path, data in kept.items() if self._above(path) <= kept.keys()}

    def _above(self, path: Path) -> set[Path]:
        return {one for one in path.parents if self.root in one.parents}


@contextmanager
def recorded() -> Iterator[list[tuple[Any, ...]]]:
    """Record every change of the disk, and ("ack", step) where a save is told to be durable."""
    log: list[tuple[Any, ...]] = []
    lock = threading.Lock()
    paths: dict[int, Path] = {}

    def wrap(name: str, method: Any) -> Any:
        def call(self: LocalStorage, *args: Any) -> Any:
            result = method(self, *args)
            with lock:
                if name.startswith("create"):
                    paths[result] = args[0]
                    log.append((name, args[0], args[1]))
                elif name in ("write", "write_at", "truncate", "sync"):
                    log.append((name, paths[args[0]], *(bytes(a) if not isinstance(a, int) else a for a in args[1:])))
                else:
                    log.append((name, *args))
            return result

        return call

    finish = SaveHandle.finish

    def finished(self: SaveHandle, path: Path) -> None:
        with lock:
            log.append(("ack", int(path.name.removeprefix("step-"))))
        finish(self, path)

    with pytest.MonkeyPatch.context() as patch:
        for name in _CHANGES:
            patch.setattr(LocalStorage, name, wrap(name, getattr(LocalStorage, name)))
        patch.setattr(SaveHandle, "finish", finished)
        yield log


def crash_states(disk: Disk, log: list[tuple[Any, ...]]) -> Iterator[tuple[str, set[int], dict[Path, bytes | None]]]:
    """Yield (what it is, the steps acknowledged by then, what is on the disk) for every state."""
    acknowledged: set[int] = set()
    for number, (name, *args) in enumerate(log):
        last = _apply(disk, name, args, acknowledged)
        for way in WAYS:
            yield f"after call {number}, {name}: {way}", set(acknowledged), disk.left(way, last)


def _apply(disk: Disk, name: str, args: list[Any], acknowledged: set[int]) -> File | None:
    if name == "ack":
        acknowledged.add(args[0])
    elif name == "make_folder":
        disk.names[args[0]] = None
    elif name.startswith("create"):
        disk.names[args[0]] = File(bytearray(args[1] if name == "create_direct" else 0))
    elif name == "sync_folder":
        disk.sync_folder(args[0])
    elif name == "rename":
        disk.rename(*args)
    elif name == "link":
        disk.names[args[1]] = disk.names[args[0]]
    elif name in ("remove_file", "remove_tree"):
        disk.remove(args[0])
    else:
        file = disk.names[args[0]]
        assert file is not None
        if name == "sync":
            file.synced = bytes(file.now)
        elif name == "truncate":
            del file.now[args[1] :]
        else:
            disk.write(file, args[1], args[2] if name == "write_at" else len(file.now))
            return file
    return None


def put(root: Path, state: dict[Path, bytes | None], origin: Path) -> None:
    """Make a folder hold a state that was recorded under `origin`."""
    root.mkdir()
    for path, data in sorted(state.items()):
        place = root / path.relative_to(origin)
        place.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            place.mkdir(exist_ok=True)
        else:
            place.write_bytes(data)
