"""What moves between host and device beside the computation: weights up, gradients down, in pieces.

The thread of a rank that computes moves activations itself, since it needs them at once; `Lane`, a second thread, moves
weights in pieces. `Link` lets activations go first: a piece is not begun while an activation moves or wants to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from pipeline.roundpipe.peers import LOOK_S, Peers

PIECE_BYTES = 4 * 2**20
_LOOK_S = 0.001
"""Between two looks at jobs that are not ready."""


class Link:
    """One link between host and device. Activations take precedence at the borders of pieces.

    Who moves an activation holds both locks: `with link.urgent, link.moving`.
    """

    def __init__(self) -> None:
        self.urgent, self.moving = threading.Lock(), threading.Lock()

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Move a piece of weights or gradients; nobody waits behind it for more than the piece."""
        with self.urgent:
            self.moving.acquire()
        try:
            yield
        finally:
            self.moving.release()


def pieces(source: Tensor, target: Tensor, move: Callable[[Tensor, Tensor], object]) -> Iterator[None]:
    """Call `move(target, source)` on pieces of at most `PIECE_BYTES`, of about one size; yields after each."""
    source, target = source.reshape(-1), target.view(-1)
    num = max(1, -(-source.nbytes // PIECE_BYTES))
    for part, into in zip(source.chunk(num), target.chunk(num), strict=True):
        move(into, part)
        yield


class Job:
    """Something for the lane. `ready` is asked until it says yes; `work` is then run, piece by piece."""

    def __init__(self, what: str, ready: Callable[[bool], bool], work: Callable[[], Iterator[None]]) -> None:
        self.what, self.ready, self.work = what, ready, work
        self.needed = False
        """Somebody waits for it: `ready` is asked with True, and may no longer hold it back for want of memory."""
        self.done = threading.Event()


class Lane:
    """The thread that moves weights. Jobs run in the order given, but one that is not ready does not hold up others."""

    def __init__(self, peers: Peers, link: Link, *, rank: int) -> None:
        self._peers, self._link = peers, link
        self._jobs: list[Job] = []
        self._changed, self._ending = threading.Condition(), False
        self._thread = threading.Thread(target=self._serve, name=f"roundpipe-lane-{rank}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Queue a job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def wait(self, job: Job, what: Callable[[], str], waited: Callable[[Callable[[], str]], None]) -> None:
        """Return when a job is done. `waited` is called every while, and raises once that takes too long."""
        job.needed = True
        while not job.done.wait(0 if job.done.is_set() else LOOK_S):
            self._peers.check(what)
            waited(what)

    @property
    def pending(self) -> list[Job]:
        """Jobs that are not done."""
        with self._changed:
            return list(self._jobs)

    def close(self) -> None:
        """End the thread; what is queued is dropped."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(timeout=10)

    def _serve(self) -> None:
        try:
            while (job := self._next()) is not None:
                work = job.work()
                while True:
                    with self._link.piece():
                        if next(work, self) is self:
                            break
                with self._changed:
                    self._jobs.remove(job)
                job.done.set()
        except BaseException as error:  # noqa: BLE001  (whatever it is, the rank's own thread raises it)
            self._peers.fail(error)

    def _next(self) -> Job | None:
        """Return the first job that is ready; None at the end."""
        while True:
            with self._changed:
                if self._ending:
                    return None
                jobs = list(self._jobs)
                if not jobs:
                    self._changed.wait()
                    continue
            for job in jobs:
                if job.ready(job.needed):
                    return job
            with self._changed:
                self._changed.wait(_LOOK_S)
