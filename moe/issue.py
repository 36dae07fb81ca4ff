"""One issue queue for each link class: a Python thread that runs synchronous collectives in the order they were given.

What the caller would only wait for it may as well `call`: in its own thread, when nothing is before it.

gloo does not keep the order of asynchronous operations, not even within a group, so the order is kept here. The thread
spends its time inside the collective, which gives up the GIL; one thread that launches everything asynchronously gained
nothing from chunks, one thread a link class follows the plan.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from queue import SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from moe.errors import ExchangeError


class Span(NamedTuple):
    """When one operation ran on its link, in nanoseconds of `time.monotonic_ns`; from when it had what it needs."""

    link: str
    layer: str
    op: str
    t0_ns: int
    t1_ns: int


class Result(Protocol):
    """The handle of something submitted."""

    def result(self) -> Any:
        """Wait for the value, or raise the cause."""
        ...


_GRACE_S = 1.5
"""A collective that waits in vain ends by its group's deadline, as long, and says why. Who waits for it lets it: a
process that ended while its thread was still inside was aborted."""
_END_S = 5.0
"""How long the interpreter, at its end, waits for the thread of a queue that was not closed. What is still in a
collective then waits for a peer that is gone."""


class Ticket(Future):
    """The handle of one submitted operation. `result()` is the only proof that it ran; it re-raises the cause."""

    def __init__(self, who: str, timeout_s: float, peers: str = "a peer") -> None:
        super().__init__()
        self.who, self._timeout_s, self.peers = who, timeout_s, peers

    def result(self, timeout: float | None = None) -> Any:
        """Return what the operation returned. Raises ExchangeError when it failed or is later than the deadline."""
        waited_s = self._timeout_s if timeout is None else timeout
        try:
            return super().result(waited_s + _GRACE_S if timeout is None else timeout)
        except TimeoutError:
            raise ExchangeError(
                f"{self.who}: not done after {waited_s:g} s; {self.peers} is lost, late, or issues in another order"
            ) from None


class _Item(NamedTuple):
    ticket: Ticket
    layer: str
    op: str
    fn: Callable[..., Any]
    needs: Result | None


class IssueQueue:
    """A thread that runs what is submitted, in order, on the process group of one link class.

    Give each queue a group of its own (`own_group`): two threads in one group mix up their collectives. Every rank of
    the group submits the same operations in the same order. After a failure the queue is broken: everything submitted
    then fails with the first cause, for nobody knows any more what the peers are waiting for.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        name: str,
        *,
        timeout_s: float = 300.0,
        on_span: Callable[[Span], None] | None = None,
    ) -> None:
        self.group, self.name, self.timeout_s = group, name, timeout_s
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._peers = _peers(group, self._rank)
        self._on_span = on_span
        self._broken: ExchangeError | None = None
        self._closed = False
        self._lock = Lock()
        self._turn = Lock()
        """Held by the thread that runs an operation."""
        self._ahead = 0
        """Operations given and not done."""
        self._waiting: SimpleQueue[_Item | None] = SimpleQueue()
        # A daemon: a collective whose peer is gone may outlive every deadline, and must not keep the process.
        self._thread = Thread(target=self._run, name=f"moe-{name}", daemon=True)
        self._thread.start()
        # The interpreter ends a daemon thread at its next Python instruction; where that is below a frame of C++, as in
        # a collective or in freeing its tensors, the process is aborted. So threads end before the interpreter does.
        weakref.finalize(self, _end, self._waiting, self._thread)

    def submit(
        self, fn: Callable[..., Any], *, needs: Result | None = None, layer: str = "", op: str = "", call: str = ""
    ) -> Ticket:
        """Run `fn`, which does its collectives synchronously, after all that was submitted before; does not wait.

        With `needs`, the link waits for that value when it is this operation's turn, and `fn` gets it. Errors name the
        layer, or the `call` that is of no layer.
        """
        item = self._item(fn, needs, layer, op, call)
        with self._lock:
            self._take_in(item)
            self._waiting.put(item)
        return item.ticket

    def call(
        self, fn: Callable[..., Any], *, needs: Result | None = None, layer: str = "", op: str = "", call: str = ""
    ) -> Any:
        """Do as `submit` and wait for the value, without another thread where nothing was submitted before.

        To wake one, and to be woken by it, with caches cold takes as long as a small exchange. But a dispatch mode of
        this thread may not see the exchange: selective checkpointing would replay what it saved instead of another one.
        Raises ExchangeError.
        """
        item = self._item(fn, needs, layer, op, call)
        with self._lock:
            self._take_in(item)
            at_once = self._ahead == 1 and not is_in_torch_dispatch_mode()
            if at_once:
                self._turn.acquire()  # of whoever just did the last one
            else:
                self._waiting.put(item)
        if at_once:
            try:
                self._run_one(item)
            finally:
                self._turn.release()
        return item.ticket.result()

    def _item(self, fn: Callable[..., Any], needs: Result | None, layer: str, op: str, call: str) -> _Item:
        place = call or f"layer {layer or '?'}"
        where = f"rank {self._rank}, {place}, {op or 'operation'} on the {self.name} link"
        return _Item(Ticket(where, self.timeout_s, self._peers), layer or call, op, fn, needs)

    def _take_in(self, item: _Item) -> None:
        if self._closed:
            raise ExchangeError(f"{item.ticket.who}: the queue is closed; build the layer anew")
        self._ahead += 1

    def fail(self, error: BaseException, *, layer: str = "", op: str = "") -> None:
        """Break the queue behind what was submitted: this rank's next operation would meet another one of its peers."""
        failed: Future[None] = Future()
        failed.set_exception(error)
        with suppress(ExchangeError):  # closed
            self.submit(lambda _: None, needs=failed, layer=layer, op=op)

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for what was submitted, then end the thread. Raises ExchangeError when it is stuck."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        waited_s = self.timeout_s if timeout_s is None else timeout_s
        self._thread.join(waited_s)
        if self._thread.is_alive():
            raise ExchangeError(f"rank {self._rank}: the {self.name} link is still busy after {waited_s:g} s")

    def __enter__(self) -> IssueQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with self._lock:  # the cause is on its way up: do not wait for peers that may never come
            if not self._closed:
                self._closed = True
                self._waiting.put(None)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            with self._turn:
                self._run_one(item)
            item = None  # closures hold tensors: free them before the next wait

    def _run_one(self, item: _Item) -> None:
        ticket = item.ticket
        if self._broken is not None:
            self._done()
            ticket.set_exception(ExchangeError(f"{ticket.who}: not issued, for the link broke before: {self._broken}"))
            return
        began = False
        try:
            with torch.no_grad():
                inputs = () if item.needs is None else (item.needs.result(),)
                began = True
                t0_ns = time.monotonic_ns()
                value = item.fn(*inputs)
            if self._on_span is not None:
                self._on_span(Span(self.name, item.layer, item.op, t0_ns, time.monotonic_ns()))
        except BaseException as error:  # noqa: BLE001 (it belongs to whoever waits for the ticket)
            by_peers = began and isinstance(error, RuntimeError)  # and not by what it needs, the experts' computation
            lost = f"; {ticket.peers} may be lost or late: see its output" if by_peers else ""
            self._broken = ExchangeError(f"{ticket.who}: {type(error).__name__}: {error}{lost}")
            self._broken.__cause__ = error
            self._done()
            # What ends a process, an interrupt or the exit of a signal's handler, goes on to the caller as it is.
            ticket.set_exception(self._broken if isinstance(error, Exception) else error)
            return
        self._done()
        ticket.set_result(value)

    def _done(self) -> None:
        """Count before whoever waits goes on, and calls again."""
        with self._lock:
            self._ahead -= 1


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Make what torch raises inside, where a rank is lost or late, an ExchangeError that names this rank and `what`."""
    try:
        yield
    except ExchangeError:  # names them already
        raise
    except RuntimeError as error:
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise ExchangeError(f"rank {rank}, {what}: a rank is lost or late: {error}") from error


def _peers(group: dist.ProcessGroup | None, own: int) -> str:
    """Return in words whom a group waits for."""
    others = [] if group is None else [rank for rank in dist.get_process_group_ranks(group) if rank != own]
    if not others:
        return "a peer"
    return f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {others}"


def _end(waiting: SimpleQueue[_Item | None], thread: Thread) -> None:
    waiting.put(None)
    thread.join(_END_S)


def own_group(group: dist.ProcessGroup | None, *, timeout_s: float = 300.0) -> dist.ProcessGroup:
    """Return a new group of the ranks of `group` (None: all). Every one of these ranks calls, in the same order.

    Its collectives fail after `timeout_s`, which is what bounds a wait for a rank that is lost. Raises ExchangeError
    when one is lost already.
    """
    return group_of(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD), timeout_s)


def group_of(ranks: list[int], timeout_s: float) -> dist.ProcessGroup:
    """Return a new group of some ranks, all of which call, in the same order; as `own_group`."""
    with naming(f"making a group of the ranks {ranks}"):
        made = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made
