"""What the disk gives: bytes written and read past the page cache, without a format, hashes or names. And meters."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

PART_BYTES = 4 * 2**20


def write_raw(path: Path, num_bytes: int, threads: int) -> None:
    """Write a preallocated file with O_DIRECT, from `threads` threads with a buffer each, and fsync it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o666)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        _each(num_bytes, threads, lambda buffer, at, length: os.pwrite(fd, buffer[:length], at))
        os.ftruncate(fd, num_bytes)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_raw(path: Path, threads: int) -> None:
    """Read a file with O_DIRECT, into `threads` buffers again and again."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        _each(os.fstat(fd).st_size, threads, lambda buffer, at, length: os.preadv(fd, [buffer[:length]], at))
    finally:
        os.close(fd)


@cache
def warm_buffers(threads: int) -> tuple[memoryview, ...]:
    """Return buffers whose pages are there, huge ones where there are any, the same for every call."""
    made = []
    for _ in range(threads):
        mapped = mmap.mmap(-1, PART_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.madvise(mmap.MADV_HUGEPAGE)
        mapped.write(bytes(PART_BYTES))
        made.append(memoryview(mapped))
    return tuple(made)


def _each(num_bytes: int, threads: int, move: Callable[[memoryview, int, int], int]) -> None:
    buffers = warm_buffers(threads)
    starts, lock, errors = iter(range(0, num_bytes, PART_BYTES)), threading.Lock(), []

    def serve(buffer: memoryview) -> None:
        try:
            while True:
                with lock:
                    at = next(starts, None)
                if at is None:
                    return
                length = min(PART_BYTES, num_bytes - at)
                move(buffer, at, length + -length % 4096)
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
            errors.append(error)

    workers = [threading.Thread(target=serve, args=(buffer,)) for buffer in buffers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def sync_tree(path: Path) -> int:
    """Make everything under a folder durable, its names included. Returns the bytes of its files."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            total += os.stat(f"{folder}/{name}").st_size
            _sync(f"{folder}/{name}", os.O_RDONLY)
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
    _sync(str(path.parent), os.O_RDONLY | os.O_DIRECTORY)
    return total


def drop_caches(path: Path) -> None:
    """Let the next read of the files under a folder come from the disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            fd = os.open(f"{folder}/{name}", os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _sync(path: str, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Meter:
    """CPU seconds and peak resident bytes of this process and those it started, above what was there before."""

    cpu_s = 0.0
    peak_bytes = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure inside."""
        processes = _family()
        for process in processes:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
        cpu, resident = _cpu(processes), _status(processes, "VmRSS")
        try:
            yield
        finally:
            self.cpu_s = _cpu(processes) - cpu
            self.peak_bytes = _status(processes, "VmHWM") - resident


def machine_user_s() -> float:
    """Return the seconds all processes of the machine have spent outside of the kernel."""
    user, nice = Path("/proc/stat").read_text().split()[1:3]
    return (int(user) + int(nice)) / os.sysconf("SC_CLK_TCK")


def own_user_s() -> float:
    """Return those of this process and the ones it started."""
    return sum(process.cpu_times().user for process in _family() if process.is_running())


def _family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def _cpu(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes if process.is_running()]
    return sum(one.user + one.system for one in times)


def _status(processes: list[psutil.Process], field: str) -> int:
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    return total
