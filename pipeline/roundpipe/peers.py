"""Waiting for other ranks: with a deadline, and with an eye on whether they live and whether one has given up."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from pipeline.errors import WatchdogError
from pipeline.roundpipe.host_store import HostStore

LOOK_S = 0.05
"""Between two looks of a waiting rank at the abort word and at the other processes."""


class Peers:
    """The other ranks of a store. `pids` are the processes of all ranks, in order."""

    def __init__(self, store: HostStore, pids: Sequence[int], *, rank: int, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self.failure: BaseException | None = None
        """What made this rank give up, in whichever of its threads."""
        self._store, self._words = store, store.words
        self._poll, self._rank_of = select.poll(), {}
        self._lock = threading.Lock()
        for other, pid in enumerate(pids):
            if other != rank and hasattr(os, "pidfd_open"):
                with suppress(OSError):  # another process namespace: the deadline is left
                    fd = os.pidfd_open(pid)
                    self._rank_of[fd] = other
                    self._poll.register(fd, select.POLLIN)

    def wait(self, word: int, value: int, what: Callable[[], str]) -> None:
        """Return once a word is at least `value`; `what` says who waits for what.

        Raises WatchdogError when that takes longer than `timeout_s`, when a rank has given up, or when one is gone; and
        what another thread of this rank gave up for.
        """
        if self._words[word] >= value:
            return
        deadline = time.monotonic() + self.timeout_s
        while (seen := self._words[word]) < value:
            try:
                self.check(what)
            except WatchdogError:
                if self._words[word] >= value:  # said before it ended
                    return
                raise
            left = deadline - time.monotonic()
            if left <= 0:
                raise WatchdogError(
                    f"{what()}: nothing came within {self.timeout_s:g} s; that rank is stopped, hangs or is slower: "
                    "see its output, or raise the timeout"
                )
            self._words.sleep(word, seen, min(left, LOOK_S))

    def check(self, what: Callable[[], str]) -> None:
        """Raise WatchdogError when a rank has given up or is gone, or what another thread of this one gave up for."""
        if self.failure is not None:
            raise self.failure
        by = self._words[self._store.plan.words.abort]
        if by and by - 1 != self.rank:
            raise WatchdogError(f"{what()}: rank {by - 1} gave up: {self._store.said()}")
        with self._lock:  # poll objects are for one thread at a time
            ended = self._poll.poll(0)
        for fd, _ in ended:
            raise WatchdogError(f"{what()}: rank {self._rank_of[fd]} is gone: its process ended")

    def fail(self, error: BaseException) -> None:
        """Give up because of an error: the others are told, and every thread of this rank that waits raises it.

        The first to say so is heard. Does not raise.
        """
        with self._lock:
            self.failure = self.failure or error
            if not self._words[self._store.plan.words.abort]:
                self._store.say(str(error) or type(error).__name__)
                self._words.publish(self._store.plan.words.abort, self.rank + 1)

    def close(self) -> None:
        """Let go of the other processes."""
        for fd in self._rank_of:
            os.close(fd)
        self._rank_of.clear()
        self._poll = select.poll()
