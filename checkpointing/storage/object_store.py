"""A bucket as the place of checkpoints: `s3://`, `gs://`, `az://`, through obstore.

Objects appear whole or not at all and there is no rename, so the manifest, written last, is the commit: without it a
`step-N/` is no checkpoint. Credentials and endpoint are obstore's business (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`).
"""

from __future__ import annotations

import errno
import html
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from checkpointing.errors import CheckpointError
from checkpointing.storage.paths import StorePath

SMALL_BYTES = 2**29
_PART_BYTES = 16 * 2**20
_STALL_S = 10.0
"""A store that has no answer for so long is asked once more."""
_WRITE_S = 60.0
"""For so long what is written is tried again."""
_SAY_AFTER_S = 5.0
_log = logging.getLogger("checkpointing")


class ObjectStorage:
    """The calls of LocalStorage that reading needs, and writing whole objects. Paths lie below `root`.

    `open_store` opens the store, whose requests are tried again for some seconds; `allow_http` where the endpoint is
    http://. What is looked at and read is given up after twice `stall_s` without an answer.
    """

    def __init__(self, open_store: Callable[[float, bool], Any], root: Path, stall_s: float) -> None:
        self._open_store, self._root, self._stall_s = open_store, root, stall_s
        self._allow_http, self._answered = False, False
        self._opened: dict[int, str] = {}
        self._next = itertools.count(1)
        self._open()

    @classmethod
    def open_url(cls, url: str, patience_s: float) -> tuple[Path, ObjectStorage]:
        """Return (root, storage) of `s3://bucket/prefix`. Raises CheckpointError when obstore is not installed.

        Whoever waits for the caller does so for `patience_s`: a look or a read that gets no answer ends well before.
        """
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise CheckpointError(f"{url} needs obstore: pip install 'longrail[s3]'") from error
        root = StorePath(url.rstrip("/"))
        scheme, _, rest = url.partition("://")
        run, _, last = rest.rstrip("/").rpartition("/")
        # RUN/step-20 is a place in the store of RUN.
        base = f"{scheme}://{run}" if last.startswith("step-") else url.rstrip("/")
        backoff: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2}

        def open_store(retry_s: float, allow_http: bool) -> Any:
            retries: Any = {"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_s), "backoff": backoff}
            # Client options take the place of all that the environment says of a client (AWS_PROXY_URL and its like),
            # so there are none but where it lacks the one without which nothing works.
            return from_url(base, retry_config=retries, client_options={"allow_http": True} if allow_http else None)

        try:
            storage = cls(open_store, root.parent if last.startswith("step-") else root, min(_STALL_S, patience_s / 6))
        except Exception as error:
            raise CheckpointError(f"{url} cannot be opened: {error}") from error
        return root, storage

    def names(self, path: Path) -> list[str]:
        """Return the names in a folder; none when there is no folder."""
        prefix = self._key(path)
        found = self._asked(path, lambda store: store.list_with_delimiter(f"{prefix}/" if prefix else None))
        folders = [str(one).rstrip("/").rpartition("/")[2] for one in found["common_prefixes"]]
        return folders + [str(one["path"]).rpartition("/")[2] for one in found["objects"]]

    def stamp(self, path: Path) -> tuple[str, ...]:
        """Return what changes when an object is replaced."""
        found = self._asked(path, lambda store: store.head(self._key(path)))
        return (str(found["size"]), str(found["e_tag"]), str(found["last_modified"]))

    def length(self, path: Path) -> int:
        """Return the bytes of an object."""
        return self._asked(path, lambda store: store.head(self._key(path)))["size"]

    def read(self, path: Path, limit_bytes: int = SMALL_BYTES) -> bytes:
        """Return the bytes of a small object; one of more than `limit_bytes` is an OSError."""
        length = self.length(path)
        if length > limit_bytes:
            raise OSError(errno.EFBIG, f"{length} bytes long, and at most {limit_bytes} were expected", str(path))
        return self._asked(path, lambda store: bytes(store.get(self._key(path)).bytes()))

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
        found = memoryview(
            self._asked(self._root / key, lambda store: store.get_range(key, start=offset, length=len(data)))
        )
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
            self._to_write().put(self._key(path), map(bytes, parts), chunk_size=_PART_BYTES)

    def write_new(self, path: Path, data: bytes) -> None:
        """Put a small object that is not there yet."""
        for again in (True, False):  # a connection that was cut may have done it
            try:
                with _as_os_error(path):
                    self._to_write().put(self._key(path), data, mode="create")
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
            self._to_write().delete(self._key(path))

    def remove_tree(self, path: Path) -> None:
        """Remove the objects of a folder, the manifest first: without it the others are no checkpoint."""
        first, rest = self._by_kind(path)
        for keys in filter(None, (first, rest)):
            with _as_os_error(path):
                self._to_write().delete(keys)

    def remove_committed(self, path: Path, aside: Path) -> None:
        """Remove a checkpoint that is whole or absent meanwhile, too."""
        self.remove_tree(path)

    def rename(self, old: Path, new: Path) -> None:
        """Give the objects of a folder other names, the manifest last; the store copies them, S3 up to 5 GB each."""
        first, rest = self._by_kind(old)
        for key in (*rest, *first):
            with _as_os_error(old):
                self._to_write().copy(key, f"{self._key(new)}/{key.rpartition('/')[2]}")
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

    def _open(self) -> None:
        # A store that refuses is to say so before its time is over.
        self._store = self._open_store(self._stall_s / 2, self._allow_http)
        self._writer = self._open_store(_WRITE_S, self._allow_http)

    def _to_write(self) -> Any:
        """Return the store to write with. A first look has found out how it is reached: parts come only once."""
        if not self._answered:
            self.names(self._root)
        return self._writer

    def _asked(self, path: Path, ask: Callable[[Any], Any]) -> Any:
        """Return the answer to a request that someone waits for; that it takes long is said."""
        tries = 0
        with _as_os_error(path):
            while True:
                try:
                    found = self._soon(path, ask)
                    self._answered = True
                    return found
                except TimeoutError:
                    tries += 1
                    if tries == 2:
                        raise
                except Exception as error:
                    if self._allow_http or "BadScheme" not in str(error):  # the endpoint is http://, as was meant
                        raise
                    self._allow_http = True
                    self._open()

    def _soon(self, path: Path, ask: Callable[[Any], Any]) -> Any:
        """Return an answer, or raise TimeoutError; the request goes on then, on a thread of its own."""
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(ask(self._store))
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                answer.set_exception(error)

        try:
            threading.Thread(target=run, name="checkpoint-store", daemon=True).start()
        except RuntimeError:  # no more threads: then obstore's own deadlines hold
            return ask(self._store)
        begun = time.monotonic()
        try:
            return answer.result(min(_SAY_AFTER_S, self._stall_s))
        except TimeoutError:
            if not answer.done():
                _log.warning("looking in %s: no answer for %.1f s", path, time.monotonic() - begun)
        left = max(0.0, begun + self._stall_s - time.monotonic())
        try:
            return answer.result(left)
        except TimeoutError as error:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer for {self._stall_s:g} s, twice", str(path)) from error

    def _key(self, path: Path) -> str:
        key = path.relative_to(self._root).as_posix() if path.is_relative_to(self._root) else path.as_posix()
        return "" if key == "." else key


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Turn obstore's errors into the OSErrors that callers know."""
    from obstore.exceptions import AlreadyExistsError, BaseError

    try:
        yield
    except (FileExistsError, AlreadyExistsError) as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
    except (BaseError, FileNotFoundError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):  # an OSError without a number
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        lost = "Http(" in str(error)  # no answer, however often it was asked
        raise OSError(errno.ETIMEDOUT if lost else errno.EIO, _one_line(str(error)), str(path)) from error


def _one_line(text: str) -> str:
    """Return what obstore says in many lines, and the server in XML, in one line that has the cause."""
    line = re.split(r":?\s*<\?xml|:?\s*<Error", text.splitlines()[0])[0].rstrip(": ")
    said = [re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in ("Code", "Message")]
    causes = [" ".join(html.unescape(found[1]).split()) for found in said if found]
    if not causes and (kind := re.search(r"kind: (Timeout|Connect)\b", text)):
        causes = ["no answer in time" if kind[1] == "Timeout" else "no connection"]
    return ": ".join([line, *causes])
