"""Past the page cache where the file system lets us, and through it where it refuses, at open or at the first write."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from checkpointing.pieces import PIECE_BYTES
from checkpointing.storage.local import LocalStorage
from checkpointing.storage.page_cache import cached_bytes
from tests.flat_states import Flat, assorted, same

STATE = assorted(1) | {"large": torch.arange(PIECE_BYTES // 4 + 999.0)}


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def writes(tmp_path, monkeypatch) -> list[bool]:
    """Of every write of tensors, whether it went past the page cache; skipped where the file system cannot."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    seen: list[bool] = []
    real = os.pwrite

    def pwrite(fd: int, data: Any, at: int) -> int:
        done = real(fd, data, at)
        seen.append(is_direct(fd))
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    return seen


def saved_and_restored(path: Any) -> bool:
    with Checkpointer(path, group=SINGLE) as ckpt:
        ckpt.save(1, Flat(STATE)).wait()
    with Checkpointer(path, group=SINGLE) as ckpt:
        ckpt.restore(back := Flat({}))
    return same(back.loaded, STATE)


def test_every_write_of_tensors_is_direct(tmp_path, writes):
    assert saved_and_restored(tmp_path / "run")
    assert len(writes) >= 3
    assert all(writes)


def test_refused_when_a_file_is_opened(tmp_path, monkeypatch, writes):
    """As some file systems do: after they have made the file."""
    real = os.open

    def refuses(path: Any, flags: int, *args: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, *args, **named))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *args, **named)

    monkeypatch.setattr(os, "open", refuses)
    assert saved_and_restored(tmp_path / "run")
    assert writes
    assert not any(writes)


def test_refused_at_the_first_write_and_at_the_first_read(tmp_path, monkeypatch, writes):
    """As file systems with larger blocks do."""
    monkeypatch.setattr(os, "pwrite", refusing(os.pwrite))
    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    monkeypatch.setattr(LocalStorage, "is_cached", lambda *args: False)  # so that reads want to go past the cache
    assert saved_and_restored(tmp_path / "run")
    assert writes
    assert not any(writes)


def test_threads_whose_first_writes_are_refused_together(tmp_path, monkeypatch, writes):
    """Each finds the file without O_DIRECT when it looks behind the other's refusal."""
    together, real = threading.Barrier(2), os.pwrite

    def refuses(fd: int, data: Any, at: int) -> int:
        if is_direct(fd):
            together.wait(10)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", refuses)
    storage, size = LocalStorage(), 4096
    fd = storage.create_direct(tmp_path / "file", 2 * size)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda at: storage.write_at(fd, memoryview(bytes([1 + at]) * size), at * size), range(2)))
    finally:
        storage.close(fd)
    assert (tmp_path / "file").read_bytes() == b"\1" * size + b"\2" * size


def refusing(real: Callable[..., int]) -> Callable[..., int]:
    def call(fd: int, *args: Any) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, *args)

    return call


def test_what_is_cached_is_told_and_asking_reads_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(PIECE_BYTES))
    storage, fd = LocalStorage(), os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if not storage.is_cached(fd, 0, PIECE_BYTES):
            pytest.skip("this kernel does not say what it has cached (Linux 6.5 does)")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if storage.is_cached(fd, 0, PIECE_BYTES):
            pytest.skip("this file system has no other place")
        os.pread(fd, 1, 0)
        os.posix_fadvise(fd, PIECE_BYTES // 2, 0, os.POSIX_FADV_DONTNEED)
        before = cached_bytes(fd, 0, PIECE_BYTES)
        assert not storage.is_cached(fd, PIECE_BYTES // 2, PIECE_BYTES // 2)
        assert cached_bytes(fd, 0, PIECE_BYTES) == before
        assert not storage.is_cached(99999, 0, PIECE_BYTES)
    finally:
        os.close(fd)
