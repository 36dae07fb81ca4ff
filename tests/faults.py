"""The N-th system call fails: the calls of `os` that the storage makes, and those that give memory and threads."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DISK_CALLS = (
    "open", "pwrite", "write", "fsync", "ftruncate", "posix_fallocate", "rename", "unlink", "rmdir", "mkdir", "link",
    "close", "listdir", "scandir", "stat", "fstat", "preadv",
)  # fmt: skip
SHORT = "short write"
OPENING = ("open", "listdir", "scandir")
"""The calls that need a descriptor, and so can fail with EMFILE."""


class Faults:
    """Counts calls that touch `folder` and can have the fault; from call `at` on they do, `once` or for ever."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, at: int, fault: int | str, *, once: bool) -> None:
        self.calls: list[str] = []
        self.armed = True
        self._folder, self._at, self._fault, self._once = str(folder), at, fault, once
        self._fds: set[int] = set()
        self._lock = threading.Lock()
        for name in DISK_CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            first = args[0] if args else "."
            ours = first in self._fds if isinstance(first, int) else str(first).startswith(self._folder)
            if not (self.armed and ours):
                return real(*args, **named)
            hit = (self._fault != errno.EMFILE or name in OPENING) and self._counted(name)
            if hit and name == "close" and self._fault != SHORT:
                self._fds.discard(args[0])
                real(*args)  # a close that fails has closed
            if hit and self._fault == SHORT and name in ("pwrite", "write"):
                return real(args[0], args[1][: max(1, len(args[1]) // 3)], *args[2:])
            if hit and self._fault != SHORT:
                raise OSError(int(self._fault), os.strerror(int(self._fault)))
            result = real(*args, **named)
            with self._lock:
                if name == "open":
                    self._fds.add(result)
                elif name == "close":
                    self._fds.discard(args[0])
            return result

        return call

    def _counted(self, name: str) -> bool:
        with self._lock:
            self.calls.append(name)
            number = len(self.calls) - 1
        return number == self._at if self._once else number >= self._at


class Shortage:
    """Memory or threads run out at the N-th request: slabs, arenas, threads."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, *, once: bool) -> None:
        self.calls: list[str] = []
        self.armed = True
        self._at, self._once = at, once
        import torch

        patch.setattr(mmap, "mmap", self._wrap("mmap", mmap.mmap, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))))
        patch.setattr(threading.Thread, "start", self._wrap("thread", threading.Thread.start, no_thread()))
        for name in ("zeros", "empty"):
            patch.setattr(torch, name, self._wrap(f"torch.{name}", getattr(torch, name), MemoryError("no memory")))

    def _wrap(self, name: str, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self.armed:
                self.calls.append(name)
                number = len(self.calls) - 1
                if number == self._at if self._once else number >= self._at:
                    raise error
            return real(*args, **named)

        return call


def no_thread() -> RuntimeError:
    return RuntimeError("can't start new thread")
