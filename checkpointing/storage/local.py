"""A local or shared file system, call by call: the only place that opens, writes, fsyncs, renames and unlinks.

Every method does one thing that can fail, and lets the OSError through: whoever calls knows what it was for.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

# One write or read returns at most about 2 GiB anyway; smaller pieces keep signs of life coming.
CHUNK_BYTES = 64 * 2**20


class LocalStorage:
    """Plain system calls. Holds no state."""

    def make_folders(self, path: Path) -> None:
        """Create a folder and its parents, each durable in the one above it."""
        if path.is_dir():
            return
        self.make_folders(path.parent)
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise
        self.sync_folder(path.parent)

    def make_folder(self, path: Path) -> None:
        """Create a folder that is not there yet."""
        path.mkdir()

    def create(self, path: Path, length: int) -> int:
        """Create a file that is not there yet, with room for `length` bytes, so that a full disk shows before the work.

        Returns the file descriptor.
        """
        return _with_room(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), length)

    def create_direct(self, path: Path, length: int) -> int:
        """As `create`, for `write_at` past the page cache; through it where the file system knows no O_DIRECT."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems make the file first and refuse then.
            fd = os.open(path, flags & ~os.O_EXCL, 0o666)
        return _with_room(fd, length)

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`. From several threads at once; for O_DIRECT all three are to be aligned."""
        done = 0
        while done < len(data):
            try:
                written = os.pwrite(fd, data[done:], offset + done)
            except OSError as error:
                # Refused at the first write (a larger block size), or behind a write that ended off the grid.
                if error.errno != errno.EINVAL or not _without_direct(fd):
                    raise
                continue
            if not written:
                raise OSError(errno.EIO, "a write of 0 bytes")
            done += written

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file to its length, when writes were padded."""
        os.ftruncate(fd, length)

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name, which keeps its bytes when the first one goes."""
        os.link(old, new)

    def write(self, fd: int, data: memoryview | bytes) -> None:
        """Write all of `data` at the file's position."""
        rest = memoryview(data)
        while rest:
            written = os.write(fd, rest)
            if not written:
                raise OSError(errno.EIO, "a write of 0 bytes")
            rest = rest[written:]

    def sync(self, fd: int) -> None:
        """Return when the file's bytes are on the device."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a file descriptor."""
        os.close(fd)

    def sync_folder(self, path: Path) -> None:
        """Return when the names in a folder are on the device."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name, at once; an existing file is replaced, a filled folder is not."""
        os.rename(old, new)

    def remove_file(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and the files in it. A folder inside it is not ours, and an OSError."""
        for entry in list(os.scandir(path)):
            os.unlink(entry.path)
        os.rmdir(path)

    def lock(self, path: Path) -> int | None:
        """Lock a folder until `close`, or until this process dies. Returns the descriptor; None if it cannot."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by someone; or a file system without locks, where nobody can tell
            os.close(fd)
            return None
        return fd

    def names(self, path: Path) -> list[str]:
        """Return the names in a folder; none when there is no folder."""
        try:
            return os.listdir(path)
        except FileNotFoundError:
            return []

    def read(self, path: Path) -> bytes:
        """Return the bytes of a small file."""
        return path.read_bytes()

    def length(self, path: Path) -> int:
        """Return the bytes of a file."""
        return path.stat().st_size

    def open(self, path: Path) -> int:
        """Open a file for reading. Returns the file descriptor."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, fd: int, data: memoryview, offset: int) -> int:
        """Fill `data` from the file at `offset`. Returns the bytes read, fewer where the file ends."""
        done = 0
        while done < len(data):
            count = os.preadv(fd, [data[done:]], offset + done)
            if not count:
                break
            done += count
        return done


def _with_room(fd: int, length: int) -> int:
    try:
        if length:
            os.posix_fallocate(fd, 0, length)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            os.close(fd)
            raise
    return fd


def _without_direct(fd: int) -> bool:
    """Turn O_DIRECT off; return whether another write may fare better."""
    flags, direct = fcntl.fcntl(fd, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    if flags & direct:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~direct)
        return True
    return False
