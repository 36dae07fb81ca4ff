"""A bucket as the place of checkpoints: `s3://`, `gs://`, `az://`, through obstore.

Objects appear whole or not at all and there is no rename, so the manifest, written last, is the commit: without it a
`step-N/` is no checkpoint. Credentials and endpoint are obstore's business (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`).
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpointing.errors import CheckpointError

SMALL_BYTES = 2**29
_PART_BYTES = 16 * 2**20


class ObjectStorage:
    """The calls of LocalStorage that reading needs, and writing whole objects. Paths lie below `root`."""

    def __init__(self, store: Any, root: Path) -> None:
        self._store, self._root = store, root
        self._opened: dict[int, str] = {}
        self._next = itertools.count(1)

    @classmethod
    def open_url(cls, url: str) -> tuple[Path, ObjectStorage]:
        """Return (root, storage) of `s3://bucket/prefix`. Raises CheckpointError when obstore is not installed."""
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise CheckpointError(f"{url} needs obstore: pip install 'longrail[s3]'") from error
        root = Path(url.replace("://", ":/").rstrip("/"))
        scheme, _, rest = url.partition("://")
        run, _, last = rest.rstrip("/").rpartition("/")
        # RUN/step-20 is a place in the store of RUN.
        base = f"{scheme}://{run}" if last.startswith("step-") else url.rstrip("/")
        try:
            store = from_url(base)
        except Exception as error:
            raise CheckpointError(f"{url} cannot be opened: {error}") from error
        return root, cls(store, root.parent if last.startswith("step-") else root)

    def names(self, path: Path) -> list[str]:
        """Return the names in a folder; none when there is no folder."""
        prefix = self._key(path)
        with _as_os_error(path):
            found = self._store.list_with_delimiter(f"{prefix}/" if prefix else None)
        folders = [str(one).rstrip("/").rpartition("/")[2] for one in found["common_prefixes"]]
        return folders + [str(one["path"]).rpartition("/")[2] for one in found["objects"]]

    def stamp(self, path: Path) -> tuple[str, ...]:
        """Return what changes when an object is replaced."""
        with _as_os_error(path):
            found = self._store.head(self._key(path))
        return (str(found["size"]), str(found["e_tag"]), str(found["last_modified"]))

    def length(self, path: Path) -> int:
        """Return the bytes of an object."""
        with _as_os_error(path):
            return self._store.head(self._key(path))["size"]

    def read(self, path: Path, limit_bytes: int = SMALL_BYTES) -> bytes:
        """Return the bytes of a small object; one of more than `limit_bytes` is an OSError."""
        length = self.length(path)
        if length > limit_bytes:
            raise OSError(errno.EFBIG, f"{length} bytes long, and at most {limit_bytes} were expected", str(path))
        with _as_os_error(path):
            return bytes(self._store.get(self._key(path)).bytes())

    def open(self, path: Path) -> int:
        """Return a number that stands for an object, as a file descriptor does."""
        self.length(path)
        number = next(self._next)
        self._opened[number] = self._key(path)
        return number

    def close(self, fd: int) -> None:
        """Forget a number."""
        del self._opened[fd]

    def open_direct(self, path: Path) -> None:
        """There is no page cache to read past."""

    def read_into(self, fd: int, data: memoryview, offset: int) -> int:
        """Fill `data` from an object at `offset`. Returns the bytes read, fewer where it ends."""
        if not len(data):
            return 0
        key = self._opened[fd]
        with _as_os_error(Path(key)):
            found = memoryview(self._store.get_range(key, start=offset, length=len(data)))
        data[: len(found)] = found
        return len(found)

    def read_vectors(self, fd: int, parts: Sequence[memoryview], offset: int) -> int:
        """Fill neighbouring parts by one request. Returns the bytes read."""
        whole = memoryview(bytearray(sum(map(len, parts))))
        filled, at = self.read_into(fd, whole, offset), 0
        for part in parts:
            part[:] = whole[at : at + len(part)]
            at += len(part)
        return filled

    def write_stream(self, path: Path, length: int, parts: Iterable[memoryview | bytes]) -> None:
        """Put an object, in several parts where it is large; it is there, whole, on return."""
        with _as_os_error(path):
            self._store.put(self._key(path), map(bytes, parts), chunk_size=_PART_BYTES)

    def write_new(self, path: Path, data: bytes) -> None:
        """Put a small object that is not there yet."""
        for again in (True, False):  # a connection that was cut may have done it
            try:
                with _as_os_error(path):
                    self._store.put(self._key(path), data, mode="create")
                return
            except FileExistsError:
                if self.read(path) != data:
                    raise
                return
            except OSError:
                if not again:
                    raise

    def remove_file(self, path: Path) -> None:
        """Remove an object."""
        with _as_os_error(path):
            self._store.delete(self._key(path))

    def remove_tree(self, path: Path) -> None:
        """Remove the objects of a folder, the manifest first: without it the others are no checkpoint."""
        first, rest = self._by_kind(path)
        for keys in filter(None, (first, rest)):
            with _as_os_error(path):
                self._store.delete(keys)

    def remove_committed(self, path: Path, aside: Path) -> None:
        """Remove a checkpoint that is whole or absent meanwhile, too."""
        self.remove_tree(path)

    def rename(self, old: Path, new: Path) -> None:
        """Give the objects of a folder other names, the manifest last; the store copies them, S3 up to 5 GB each."""
        first, rest = self._by_kind(old)
        for key in (*rest, *first):
            with _as_os_error(old):
                self._store.copy(key, f"{self._key(new)}/{key.rpartition('/')[2]}")
        self.remove_tree(old)

    def sync_folder(self, path: Path) -> None:
        """Names are durable when they are there."""

    def lock(self, path: Path) -> None:
        """There are no locks: nobody can tell."""

    def _by_kind(self, path: Path) -> tuple[list[str], list[str]]:
        """Return the objects of a folder: the manifest and its like, and the data files."""
        keys = [f"{self._key(path)}/{name}" for name in self.names(path)]
        data = [key for key in keys if key.endswith(".safetensors")]
        return [key for key in keys if key not in data], data

    def make_folders(self, path: Path) -> None:
        """Folders are parts of names here."""

    def _key(self, path: Path) -> str:
        key = path.relative_to(self._root).as_posix() if path.is_relative_to(self._root) else path.as_posix()
        return "" if key == "." else key


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Turn obstore's errors into the OSErrors that callers know."""
    from obstore.exceptions import AlreadyExistsError, BaseError

    try:
        yield
    except FileNotFoundError as error:  # obstore's NotFoundError is one, without a number
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except (FileExistsError, AlreadyExistsError) as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
    except (BaseError, ValueError) as error:
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error
