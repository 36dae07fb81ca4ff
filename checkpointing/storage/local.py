"""A local or shared file system, call by call: the only place that opens, writes, fsyncs, renames and unlinks.

Every method does one thing that can fail, and lets the OSError through: whoever calls knows what it was for.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from checkpointing.storage.page_cache import cached_bytes

# One write or read returns at most about 2 GiB anyway; smaller pieces keep signs of life coming.
CHUNK_BYTES = 64 * 2**20
SMALL_BYTES = 2**29


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
            direct = _is_direct(fd)  # before the write: behind it another thread may have turned it off
            try:
                written = os.pwrite(fd, data[done:], offset + done)
            except OSError as error:
                # Refused at the first write (a larger block size), or behind a write that ended off the grid.
                if error.errno != errno.EINVAL or not direct:
                    raise
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
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
        """Remove a folder and the files in it. A folder inside it is not ours, and an OSError.

        Of a link to a folder the link goes, and nothing that it points to.
        """
        if path.is_symlink():
            os.unlink(path)
            return
        # Files first: a folder that someone put there must not keep what is ours on a disk that fills up.
        for entry in sorted(os.scandir(path), key=lambda entry: entry.is_dir(follow_symlinks=False)):
            os.unlink(entry.path)
        os.rmdir(path)

    def remove_committed(self, path: Path, aside: Path) -> None:
        """Remove a checkpoint that is whole or absent meanwhile, too: it has the name `aside` while it is removed."""
        self.rename(path, aside)
        self.remove_tree(aside)

    def write_new(self, path: Path, data: bytes) -> None:
        """Write a small file that is not there yet, and return when its bytes are on the device."""
        fd = self.create(path, len(data))
        try:
            self.write(fd, data)
            self.sync(fd)
        finally:
            self.close(fd)

    def write_stream(self, path: Path, length: int, parts: Iterable[memoryview | bytes]) -> None:
        """Write a file that is not there yet from parts, and return when its bytes are on the device."""
        fd = self.create(path, length)
        try:
            for part in parts:
                self.write(fd, part)
            self.sync(fd)
        finally:
            self.close(fd)

    def sync_tree(self, path: Path) -> None:
        """Return when a file, or a folder with all in it, is on the device; for what other libraries wrote."""
        if path.is_dir():
            for entry in list(os.scandir(path)):
                self.sync_tree(Path(entry.path))
            self.sync_folder(path)
            return
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.sync(fd)
        finally:
            self.close(fd)

    def discard(self, path: Path) -> None:
        """Remove a file or folder with all in it, if it is there; for what we were writing and gave up."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

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

    def read(self, path: Path, limit_bytes: int = SMALL_BYTES) -> bytes:
        """Return the bytes of a small file; one of more than `limit_bytes` is an OSError."""
        fd = self.open(path)
        try:
            length = os.fstat(fd).st_size
            if length > limit_bytes:
                raise OSError(errno.EFBIG, f"{length} bytes long, and at most {limit_bytes} were expected", str(path))
            data = bytearray(length)
            return bytes(data[: self.read_into(fd, memoryview(data), 0)])
        finally:
            os.close(fd)

    def stamp(self, path: Path) -> tuple[int, ...]:
        """Return what changes when a file is replaced or written to, as far as the file system tells."""
        found = path.stat()
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def length(self, path: Path) -> int:
        """Return the bytes of a plain file. A pipe, a device, a folder or a link is an OSError."""
        found = os.stat(path, follow_symlinks=False)
        _must_be_plain(found.st_mode, path)
        return found.st_size

    def open(self, path: Path) -> int:
        """Open a plain file for reading. Returns the file descriptor. Anything but a plain file is an OSError."""
        # Looked at first, as opening a device may do something; and again, as it may be another file by then. A pipe
        # would be waited for without O_NONBLOCK.
        self.length(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            _must_be_plain(os.fstat(fd).st_mode, path)
        except OSError:
            os.close(fd)
            raise
        return fd

    def open_direct(self, path: Path) -> int | None:
        """Open a plain file for `read_aligned`; None where the file system knows no O_DIRECT."""
        flag = getattr(os, "O_DIRECT", 0)
        try:
            self.length(path)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flag) if flag else None
        except OSError:  # whoever opens it plainly is told why
            return None

    def is_cached(self, fd: int, offset: int, length: int) -> bool:
        """Return whether most of a range is in memory, so that reading it past the cache would be a waste."""
        return 2 * cached_bytes(fd, offset, length) > length

    def read_aligned(self, fd: int, data: memoryview, offset: int) -> int:
        """Fill `data` past the page cache; memory, offset and length are to be aligned.

        Returns the bytes read, which may be fewer, also because the file system wants another alignment.
        """
        try:
            return os.preadv(fd, [data], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0

    def read_into(self, fd: int, data: memoryview, offset: int) -> int:
        """Fill `data` from the file at `offset`. Returns the bytes read, fewer where the file ends."""
        done = 0
        while done < len(data):
            count = os.preadv(fd, [data[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def read_vectors(self, fd: int, parts: Sequence[memoryview], offset: int) -> int:
        """Fill neighbouring parts, at most 1000, from the file at `offset`. Returns the bytes read."""
        total = sum(map(len, parts))
        filled = os.preadv(fd, parts, offset)
        if filled in (0, total):
            return filled
        filled = 0
        for part in parts:  # a short read is rare: once more, part by part
            filled += self.read_into(fd, part, offset + filled)
        return filled


def _must_be_plain(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a plain file (a link, pipe, device or folder)", str(path))


def _with_room(fd: int, length: int) -> int:
    try:
        if length:
            os.posix_fallocate(fd, 0, length)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            os.close(fd)
            raise
    return fd


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
