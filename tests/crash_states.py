"""Every state a crash could leave on the disk, from a record of what a program asked the disk to do.

`recorded` listens behind `LocalStorage`, the one place that changes the disk; records of several processes are merged
by their times. `crash_states` replays a record up to every call, and of what was not yet synced keeps every choice that
`crash_disk.ways` names.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from checkpointing.handle import SaveHandle
from checkpointing.storage.local import LocalStorage
from tests.crash_disk import Disk, Node, ways

Call = tuple[int, str, tuple[Any, ...]]
"""(when, name, arguments)"""

_BY_FD = ("write", "write_at", "truncate", "sync")
_BY_PATH = ("create", "create_direct", "sync_folder", "rename", "link", "remove_file")
_BY_TREE = ("remove_tree", "discard")


class Record:
    """Calls of one process, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._lock = threading.Lock()
        self._paths: dict[int, Path] = {}

    def note(self, name: str, *args: Any) -> None:
        with self._lock:
            self.calls.append((time.monotonic_ns(), name, args))

    def by_fd(self, name: str, method: Any) -> Any:
        def call(storage: LocalStorage, fd: int, *args: Any) -> Any:
            copied = tuple(one if isinstance(one, int) else bytes(one) for one in args)
            result = method(storage, fd, *args)
            self.note(name, self._paths[fd], *copied)
            return result

        return call

    def by_path(self, name: str, method: Any) -> Any:
        def call(storage: LocalStorage, *args: Any) -> Any:
            result = method(storage, *args)
            if name.startswith("create"):
                self._paths[result] = args[0]
            self.note(name, *args)
            return result

        return call

    def by_tree(self, method: Any) -> Any:
        """Several calls in one: each name that went is a change of its own."""

        def call(storage: LocalStorage, path: Path) -> None:
            there = [one for one in (*sorted(path.rglob("*"), reverse=True), path) if os.path.lexists(one)]
            try:
                method(storage, path)
            finally:
                for one in there:
                    if not os.path.lexists(one):
                        self.note("drop", one)

        return call


@contextmanager
def recorded() -> Iterator[Record]:
    """Record every change of the disk, and ("ack", step) where a save is told to be durable."""
    record = Record()
    finish, mkdir = SaveHandle.finish, Path.mkdir

    def finished(self: SaveHandle, path: Path) -> None:
        record.note("ack", int(path.name.removeprefix("step-")))
        finish(self, path)

    def made(self: Path, *args: Any, **named: Any) -> None:
        mkdir(self, *args, **named)
        record.note("make_folder", self)

    with pytest.MonkeyPatch.context() as patch:
        for name in _BY_FD:
            patch.setattr(LocalStorage, name, record.by_fd(name, getattr(LocalStorage, name)))
        for name in _BY_PATH:
            patch.setattr(LocalStorage, name, record.by_path(name, getattr(LocalStorage, name)))
        for name in _BY_TREE:
            patch.setattr(LocalStorage, name, record.by_tree(getattr(LocalStorage, name)))
        patch.setattr(Path, "mkdir", made)
        patch.setattr(SaveHandle, "finish", finished)
        yield record


def crash_states(disk: Disk, calls: Sequence[Call]) -> Iterator[tuple[str, set[int], dict[Path, Any]]]:
    """Yield (what it is, the steps acknowledged by then, what is on the disk) for every state."""
    acknowledged: set[int] = set()
    for number, (_, name, args) in enumerate(calls):
        if name == "ack":
            acknowledged.add(args[0])
        else:
            _apply(disk, name, args)
        for way, wanted in ways(disk.open_requests()).items():
            yield f"after call {number}, {name} {args[0]}: {way}", set(acknowledged), disk.left(wanted)


def _apply(disk: Disk, name: str, args: Sequence[Any]) -> None:
    path = args[0]
    if disk.root not in (path, *path.parents):
        return
    if name == "make_folder":
        disk.name("put", path, child=Node({}))
    elif name.startswith("create"):
        disk.name("put", path, child=Node(None))
        disk.ask(disk.at(path), "size", offset=args[1])
    elif name == "rename":
        disk.name("move", *args, child=disk.at(path))
    elif name == "link":
        disk.name("put", args[1], child=disk.at(path))
    elif name in ("remove_file", "drop"):
        disk.name("drop", path)
    elif name in ("sync", "sync_folder"):
        disk.at(path).sync()
    elif name == "truncate":
        disk.ask(disk.at(path), "size", offset=args[1])
    else:
        node = disk.at(path)
        offset = args[2] if name == "write_at" else sum(len(one.data) for one in node.pending)
        disk.ask(node, "write", data=args[1], offset=offset)


def put(root: Path, state: dict[Path, Any], origin: Path) -> None:
    """Make a folder hold a state that was recorded under `origin`."""
    for path, (data, _) in sorted(state.items()):
        place = root / path.relative_to(origin)
        if data is None:
            place.mkdir()
        else:
            place.write_bytes(data)
