"""What ranks tell each other outside of collectives: short JSON answers through the job's store, with deadlines.

A rank that fails here can still tell the others why, which it cannot from inside a collective. Where they wait longer
than a board's own timeout, a rank at work gives signs of life: one that is stopped is found after that timeout all the
same, and one that takes hours is waited for.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from launch.errors import KNOWN_ERRORS, LaunchError, WorldError

T = TypeVar("T")

_BEATS = 20
"""Signs of life within a board's timeout."""


class Board:
    """A place where every rank leaves one answer a question. All ranks ask the same questions in the same order.

    `kept` is a store that ranks find again which torchrun starts in the place of these; None where there is none.
    """

    def __init__(
        self, store: Store, *, rank: int, world_size: int, timeout_s: float, kept: Store | None = None
    ) -> None:
        self.rank, self.world_size, self._timeout_s = rank, world_size, timeout_s
        self._store, self._asked, self._kept = store, 0, kept

    def note(self, fact: str) -> None:
        """Write a fact down for the ranks of this start of the job and of later ones, as far as there is a place."""
        if self._kept is not None:
            self._kept.set(f"noted/{fact}", "yes")

    def noted(self, fact: str) -> bool | None:
        """Return whether a fact was written down in any start of the job; None where that is not kept."""
        return None if self._kept is None else self._kept.check([f"noted/{fact}"])

    def gather(self, topic: str, answer: Any, *, timeout_s: float | None = None) -> list[Any]:
        """Return the answers of all ranks, by rank. Raises WorldError naming a rank that does not answer in time."""
        return self._exchange(self._next(topic), answer, timeout_s)

    def together(self, topic: str, work: Callable[[], T], *, timeout_s: float | None = None) -> T:
        """Return `work()` once it has succeeded on every rank; where it fails on one, raise its error on all."""
        key = self._next(topic)
        try:
            with self._at_work(key, timeout_s):
                result, error = work(), None
        except KNOWN_ERRORS as known:
            result, error = None, known
        except Exception as unknown:
            self._exchange(key, f"{type(unknown).__name__}: {unknown}", timeout_s, self._timeout_s)
            raise
        failures = self._exchange(key, None if error is None else str(error), timeout_s, self._timeout_s)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise LaunchError(f"on rank {rank}: {failure}")
        return result  # pyright: ignore[reportReturnType]  (no error: it is work()'s)

    def rank0_first(self, topic: str, work: Callable[[], T], *, timeout_s: float | None = None) -> T:
        """Return `work()`, done on rank 0 alone first, then on the others, which find what rank 0 has cached.

        Where it fails, its error is raised on every rank. Ranks wait for `timeout_s`, but for no longer than the
        board's own timeout for one that is stopped.
        """
        key = self._next(topic)
        if self.rank == 0:
            with self._at_work(key, timeout_s):
                result = self._announced(key, work)
            return self.together(topic, lambda: result, timeout_s=timeout_s)
        failure = self._read(key, 0, timeout_s, self._timeout_s)
        if failure is not None:
            raise LaunchError(failure)
        return self.together(topic, work, timeout_s=timeout_s)

    def leave(self, *, timeout_s: float) -> None:
        """Return when every rank has called, as the last thing that it needs the others for.

        Raises WorldError naming a rank that does not in time. A store that went with rank 0, which has left then, is no
        error: torchrun tells how that one ended.
        """
        try:
            self.gather("leaving", None, timeout_s=timeout_s)
        except WorldError as error:
            if not isinstance(error.__cause__, dist.DistNetworkError):
                raise

    def failing(self, *, timeout_s: float | None) -> list[int]:
        """Say that this rank ends by an error; return the ranks that have not said so after `timeout_s`.

        A rank may call at any time, and others need not. Returns [] where the store is gone, and with None at once.
        """
        with suppress(RuntimeError):
            self._store.set(f"failing/{self.rank}", "yes")
            if timeout_s is not None:
                deadline = time.monotonic() + timeout_s
                return [rank for rank in range(self.world_size) if not self._fails(rank, deadline)]
        return []

    def _fails(self, rank: int, deadline: float) -> bool:
        try:
            self._store.wait([f"failing/{rank}"], timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        except dist.DistNetworkError:  # the store is gone
            raise
        except RuntimeError:
            return False
        return True

    def _announced(self, key: str, work: Callable[[], T]) -> T:
        try:
            result = work()
        except Exception as error:
            text = str(error) if isinstance(error, KNOWN_ERRORS) else f"{type(error).__name__}: {error}"
            self._store.set(f"{key}/0", json.dumps(text))
            raise
        self._store.set(f"{key}/0", json.dumps(None))
        return result

    @contextmanager
    def _at_work(self, key: str, timeout_s: float | None) -> Iterator[None]:
        """Give signs of life while the block runs, where others may wait longer than this board's timeout."""
        ended = threading.Event()

        def beat() -> None:
            count = 0
            with suppress(RuntimeError):  # the store is gone, which the block's own rank finds when it answers
                while not ended.wait(self._timeout_s / _BEATS):
                    count += 1
                    self._store.set(f"{key}/{self.rank}/at work", str(count))

        thread = threading.Thread(target=beat, name="board", daemon=True)
        if timeout_s is not None and timeout_s > self._timeout_s:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.ident is not None:
                thread.join()

    def _next(self, topic: str) -> str:
        self._asked += 1
        return f"board/{self._asked}/{topic}"

    def _exchange(self, key: str, answer: Any, timeout_s: float | None, silent_s: float | None = None) -> list[Any]:
        self._store.set(f"{key}/{self.rank}", json.dumps(answer))
        return [self._read(key, rank, timeout_s, silent_s) for rank in range(self.world_size)]

    def _read(self, key: str, rank: int, timeout_s: float | None, silent_s: float | None = None) -> Any:
        """Return a rank's answer. Raises WorldError without one in time, or without a sign of life for `silent_s`."""
        answer, topic = f"{key}/{rank}", key.split("/", 2)[2]
        left, seen = self._timeout_s if timeout_s is None else timeout_s, b""
        while True:
            seconds = left if silent_s is None else min(left, silent_s)
            try:
                self._store.wait([answer], timedelta(seconds=seconds))
                return json.loads(self._store.get(answer))
            except RuntimeError as error:  # what every store raises, of torch's own errors the base
                before, seen, left = seen, self._sign_of(answer), left - seconds
                if seen == before or left <= 0:
                    raise WorldError(
                        f"rank {rank} did not answer about '{topic}' within {seconds:g} s; it ended, hangs, or does "
                        "something else: see its own output"
                    ) from error

    def _sign_of(self, answer: str) -> bytes:
        """Return the last sign of life of who owes an answer; empty for none, and where the store is gone."""
        with suppress(RuntimeError):
            if self._store.check([f"{answer}/at work"]):
                return self._store.get(f"{answer}/at work")
        return b""
