"""Threads that write slabs to files. No collectives and no store here: the training thread may be inside one."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from checkpointing.errors import SaveError
from checkpointing.handle import Meter
from checkpointing.slabs import Slab, SlabRing
from checkpointing.storage.local import LocalStorage

_PAGE = 4096
_GOODBYE_S = 1.0


class FlushFile:
    """A file that several threads write, and the first error that one of them met."""

    def __init__(self, fd: int, meter: Meter) -> None:
        self.fd, self.meter = fd, meter
        self._pending, self._error = 0, None
        self._changed = threading.Condition()

    @property
    def error(self) -> BaseException | None:
        """The first error."""
        return self._error

    def began(self) -> None:
        """One more write is on its way."""
        with self._changed:
            self._pending += 1

    def ended(self, error: BaseException | None) -> None:
        """A write is over."""
        with self._changed:
            self._pending -= 1
            self._error = self._error or error
            if not self._pending:
                self._changed.notify_all()

    def give_up(self, error: BaseException) -> None:
        """Drop the writes that have not begun."""
        with self._changed:
            self._error = self._error or error

    def drained(self, timeout_s: float) -> bool:
        """Return whether every write is over, after waiting for it."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)


@dataclass(frozen=True, slots=True)
class _Write:
    file: FlushFile
    slab: Slab
    length: int
    offset: int


class FlushPool:
    """Writes slabs and gives them back to the ring: few threads while training, more when someone waits."""

    def __init__(
        self, storage: LocalStorage, ring: SlabRing, *, calm: int, hurried: int, max_bytes_per_s: float | None
    ) -> None:
        self._storage, self._ring = storage, ring
        self._calm, self._hurried, self._rate = calm, hurried, max_bytes_per_s
        self._queue: deque[_Write] = deque()
        self._changed = threading.Condition()
        self._writing, self._waiting, self._closed = 0, 0, False
        self._next_at = 0.0
        self._threads: list[threading.Thread] = []

    def submit(self, file: FlushFile, slab: Slab, length: int, offset: int) -> None:
        """Write the first `length` bytes of a slab at `offset`; it goes back to the ring afterwards.

        Raises RuntimeError, and nothing was begun, when there can be no thread.
        """
        with self._changed:
            if not self._threads:
                self._start()
            file.began()
            self._queue.append(_Write(file, slab, length, offset))
            self._wake()

    def hurry(self, on: bool) -> None:
        """Count someone who waits, or waits no longer."""
        with self._changed:
            self._waiting += 1 if on else -1
            self._wake()

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """Hurry inside."""
        self.hurry(True)
        try:
            yield
        finally:
            self.hurry(False)

    def close(self) -> None:
        """End the threads; what is queued is dropped, which happens only to saves that were given up.

        A thread that a write holds up is not waited for. One that is left when Python ends can end the process badly.
        """
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        give_up = time.monotonic() + _GOODBYE_S
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))

    def _start(self) -> None:
        for index in range(max(self._calm, self._hurried)):
            # Daemons: a write that hangs must not keep the process from ending.
            thread = threading.Thread(target=self._serve, name=f"checkpoint-flush-{index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads: those that are there do the work
                if not self._threads:
                    raise
                return
            self._threads.append(thread)

    def _may_write(self) -> bool:
        return bool(self._queue) and self._writing < (self._hurried if self._waiting else self._calm)

    def _wake(self) -> None:
        # One at a time, and only for work: a crowd that wakes for one write takes time, and the lock, from training.
        if self._may_write():
            self._changed.notify()

    def _next(self) -> _Write | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may_write())
            if self._closed:
                return None
            self._writing += 1
            write = self._queue.popleft()
            self._wake()
            return write

    def _serve(self) -> None:
        while (write := self._next()) is not None:
            error: BaseException | None = None
            try:
                if write.file.error is None:  # what is behind an error is not worth writing
                    self._pace(write)
                    self._write(write)
            except BaseException as caught:  # noqa: BLE001 - told to the save, which tells the other ranks
                error = caught
            with self._changed:
                self._writing -= 1
            self._ring.release(write.slab)
            write.file.ended(error)

    def _write(self, write: _Write) -> None:
        padded = write.length + -write.length % _PAGE
        write.slab.view[write.length : padded] = bytes(padded - write.length)
        self._storage.write_at(write.file.fd, write.slab.view[:padded], write.offset)
        write.file.meter.wrote(write.length)

    def _pace(self, write: _Write) -> None:
        """Wait for the turn of a write. Raises the error of its file once it is given up."""
        if self._rate is None:
            return
        with self._changed:
            begin = max(self._next_at, time.monotonic())
            self._next_at = begin + write.length / self._rate
        while (left := begin - time.monotonic()) > 0:
            if write.file.error is not None:
                raise write.file.error
            time.sleep(min(left, 0.2))


def drain(file: FlushFile, check: Callable[[], None], alive: Callable[[], None], timeout_s: float) -> None:
    """Return when every write of a file is over, calling `check` now and then, and `alive` while bytes get through.

    Raises the first error, what `check` raises, or SaveError when a write hangs.
    """
    written, since = -1, time.monotonic()
    while not file.drained(0.1):
        check()
        now = file.meter.read().written_bytes
        if now != written:
            written, since = now, time.monotonic()
            alive()
        elif time.monotonic() - since > timeout_s:
            raise SaveError(f"the disk has not finished a write for {timeout_s:g} s")
    check()
    if file.error is not None:
        raise file.error
