"""A disk as a crash sees it: folders and files, with what was asked of each since its last sync.

What is not synced may or may not have reached the device, each request by itself. A folder holds its names as a file
holds its bytes; a rename within one folder is one request, as every journalling file system has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

Wanted = Callable[["Request"], "float"]
"""How much of a request reached the device: 1 all of it, 0 nothing, and of a write anything between."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One change of a file or folder that is not synced."""

    number: int
    node: Node
    kind: str
    """`write`, `size`, `put`, `drop` or `move`."""
    offset: int = 0
    data: bytes = b""
    names: tuple[str, ...] = ()
    child: Node | None = None

    @property
    def is_name(self) -> bool:
        return self.kind in ("put", "drop", "move")


@dataclass(slots=True, eq=False)
class Node:
    """A file or a folder: as it was at its last sync, and what was asked since."""

    names: dict[str, Node] | None
    """None for a file."""
    data: bytes = b""
    pending: list[Request] = field(default_factory=list)
    _made: dict[tuple[tuple[int, float], ...], tuple[bytes, str]] = field(default_factory=dict)

    def entries(self, wanted: Wanted) -> dict[str, Node]:
        """The names in a folder after a crash."""
        found = dict(self.names or {})
        for one in self.pending:
            if wanted(one) > 0:
                for gone in one.names[:1] if one.kind == "move" else one.names if one.kind == "drop" else ():
                    found.pop(gone, None)
                if one.child is not None:
                    found[one.names[-1]] = one.child
        return found

    def content(self, wanted: Wanted) -> tuple[bytes, str]:
        """The bytes of a file after a crash, and their hash."""
        key = tuple((one.number, share) for one in self.pending if (share := wanted(one)) > 0)
        if key not in self._made:
            data = bytearray(self.data)
            for one in self.pending:
                share = wanted(one)
                if share > 0 and one.kind == "size":
                    data = data[: one.offset] + bytes(max(0, one.offset - len(data)))
                elif share > 0:
                    part = one.data[: int(len(one.data) * share)]
                    data += bytes(max(0, one.offset + len(part) - len(data)))
                    data[one.offset : one.offset + len(part)] = part
            self._made[key] = bytes(data), xxhash.xxh3_128_hexdigest(data)
        return self._made[key]

    def sync(self) -> None:
        """Everything asked for has reached the device."""
        if self.names is None:
            self.data = self.content(everything)[0]
        else:
            self.names = self.entries(everything)
        self.pending, self._made = [], {}


def everything(_: Request) -> float:
    return 1


class Disk:
    """A tree of nodes below `root`, and the requests in their order."""

    def __init__(self, root: Path) -> None:
        """Begin with what is there, as if all of it were synced."""
        self.root, self._number = root, 0
        self.top = self._read(root)

    def _read(self, path: Path) -> Node:
        if not path.is_dir():
            return Node(None, path.read_bytes()) if path.exists() else Node({})
        return Node({one.name: self._read(one) for one in sorted(path.iterdir())})

    def at(self, path: Path) -> Node:
        """The file or folder a running program finds at a path."""
        node = self.top
        for part in path.relative_to(self.root).parts:
            node = node.entries(everything)[part]
        return node

    def ask(self, node: Node, kind: str, **what: object) -> None:
        """Note a request."""
        self._number += 1
        node.pending.append(Request(self._number, node, kind, **what))  # pyright: ignore[reportArgumentType]
        node._made.clear()

    def name(self, kind: str, *paths: Path, child: Node | None = None) -> None:
        """Note a change of names in one folder."""
        assert len({path.parent for path in paths}) == 1, paths
        self.ask(self.at(paths[0].parent), kind, names=tuple(path.name for path in paths), child=child)

    def open_requests(self) -> list[Request]:
        """What is not synced, of what a crash could show, in the order it was asked for."""
        found: dict[int, Request] = {}
        nodes, seen = [self.top], set()
        while nodes:
            node = nodes.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            found |= {one.number: one for one in node.pending}
            nodes += [*(node.names or {}).values(), *(one.child for one in node.pending if one.child)]
        return [found[number] for number in sorted(found)]

    def left(self, wanted: Wanted) -> dict[Path, tuple[bytes | None, str]]:
        """What is on the disk after a crash: bytes and hash of files, None for folders."""
        kept: dict[Path, tuple[bytes | None, str]] = {}
        nodes = [(self.root, self.top)]
        while nodes:
            path, node = nodes.pop()
            kept[path] = (None, "") if node.names is not None else node.content(wanted)
            if node.names is not None:
                nodes += [(path / name, child) for name, child in node.entries(wanted).items()]
        return kept


def ways(requests: Collection[Request]) -> dict[str, Wanted]:
    """Name every choice of what of the open requests reached the device.

    All subsets while there are few; else every prefix, each one missing, each one alone, names or bytes only; and each
    of the last writes torn, with and without what was asked for before it.
    """
    numbers = [one.number for one in requests]
    found: dict[str, Wanted] = {"all of it": everything, "nothing unsynced": lambda one: 0}
    found["names without bytes"] = lambda one: one.is_name
    found["bytes without names"] = lambda one: not one.is_name
    if len(numbers) <= 7:
        for bits in range(1, 2 ** len(numbers) - 1):
            chosen = frozenset(number for at, number in enumerate(numbers) if bits >> at & 1)
            found[f"only {sorted(chosen)}"] = lambda one, chosen=chosen: one.number in chosen
    for number in numbers:
        found[f"up to {number}"] = lambda one, last=number: one.number <= last
        found[f"without {number}"] = lambda one, gone=number: one.number != gone
        found[f"{number} alone"] = lambda one, only=number: one.number == only
    for torn in [one.number for one in requests if one.kind == "write"][-2:]:
        for share in (0.25, 0.5, 0.999):
            found[f"{torn} torn at {share}"] = lambda one, torn=torn, share=share: share if one.number == torn else 1
            found[f"{torn} torn at {share}, nothing behind"] = lambda one, torn=torn, share=share: (
                share if one.number == torn else float(one.number < torn)
            )
    return found
