"""Items of an iterator, made a few ahead by one background thread."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from chunkflow.errors import ChunkflowError, StateError

T = TypeVar("T")

_POLL_S = 0.1
_JOIN_S = 30.0
_MOST_WAIT_S = 1800.0
"""A batch is made in milliseconds; one that takes this long will not come."""


class Prefetcher(Generic[T]):
    """An iterator over `items`, which are made by a thread, at most `depth` waiting at a time.

    An exception of `items` is raised by `next`, in its turn, with its own traceback. `close` (or leaving the `with`, or
    dropping the object, or the end of the process) ends the thread after the item it is at.
    """

    def __init__(self, items: Iterator[T], *, depth: int) -> None:
        self._ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        # The thread must not hold `self`, or a dropped prefetcher would never be collected.
        args = (items, self._ready, self._stop)
        self._thread = threading.Thread(target=_fill, args=args, name="chunkflow-prefetch", daemon=True)
        self._end = weakref.finalize(self, _end, self._thread, self._stop)
        self._done = False
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StateError(
                "this iteration was ended by close(), by a newer one or by load_state_dict(); iterate anew"
            )
        if self._done:
            raise StopIteration
        kind, value = self._take()
        if kind == "item":
            return value
        self._done = True
        if kind == "error" and isinstance(value, Exception):
            raise value
        if kind == "error":  # SystemExit and its like, meant for the thread: here it would end the program as if well
            raise ChunkflowError(f"the thread that prepares batches was ended by {value!r}") from value
        raise StopIteration

    def _take(self) -> tuple[str, Any]:
        deadline = time.monotonic() + _MOST_WAIT_S
        while time.monotonic() < deadline:
            alive = self._thread.is_alive()  # asked first: a thread that has ended puts nothing after an empty get
            try:
                return self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                if not alive:
                    raise ChunkflowError("the thread that prepares batches is gone without an error") from None
        raise ChunkflowError(f"no batch was ready within {_MOST_WAIT_S:g} s; is storage stuck?")

    def close(self) -> None:
        """End the thread, waiting for the item it is at; raises ChunkflowError if that takes over 30 s."""
        self._end()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            raise ChunkflowError(
                f"the thread that prepares batches did not end within {_JOIN_S:.0f} s; is storage stuck?"
            )

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill(items: Iterator[Any], ready: queue.Queue[tuple[str, Any]], stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(ready, stop, ("item", item)):
                return
        _put(ready, stop, ("end", None))
    except BaseException as error:  # noqa: BLE001 - the consumer raises it
        _put(ready, stop, ("error", error))


def _put(ready: queue.Queue[tuple[str, Any]], stop: threading.Event, entry: tuple[str, Any]) -> bool:
    """Put when there is room; False when the consumer has gone."""
    while not stop.is_set():
        try:
            ready.put(entry, timeout=_POLL_S)
            return True
        except queue.Full:
            continue
    return False


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    # Garbage may be collected in the thread itself. At exit, a thread left inside torch can bring the process down.
    if thread is not threading.current_thread():
        thread.join(timeout=_JOIN_S)
