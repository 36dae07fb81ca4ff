"""Messages over a torch.distributed group (gloo, NCCL), sender-driven.

A rank never schedules its own receives: one thread a peer takes whatever that peer sends, in the peer's order, and puts
it into the mailbox; one thread a peer sends, one message at a time. So no order of actions can deadlock here, neither
tags nor the order of a backend's queue matter, and buffers live until they have left. Each direction has a process
group of its own: NCCL runs what two ranks do in one group in one queue, where a send would wait behind a receive.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import ScheduleError, WatchdogError
from pipeline.transport.base import Mailbox, Message, reason_of
from pipeline.transport.wire import HEADER_WORDS, decode, encode, encode_abort

# A wait that times out inside gloo breaks the whole group, so threads wait (almost) without end and the rank's own
# thread keeps the deadlines. A peer that dies ends the wait at once.
_WITHOUT_END = timedelta(days=30)
_ABORT_FLUSH_S = 2.0


class GroupTransport:
    """The transport of one rank of `group`. Every rank of the group makes one, in the same order of collectives.

    `device` is where the tensors live; headers and payloads travel from there under NCCL, from the CPU under gloo.
    """

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank(group)
        self._wire = self._device if dist.get_backend(group) == "nccl" else torch.device("cpu")
        up, down = (_derived(ranks) for _ in range(2))
        self._mailbox = Mailbox()
        self._outgoing: dict[int, _Link] = {}
        self._incoming: dict[int, _Link] = {}
        for peer in range(len(ranks)):
            if peer != self._rank:
                sends, takes = (up, down) if peer > self._rank else (down, up)
                self._outgoing[peer] = _Link(f"to-{peer}", sends, ranks[peer], self._send_one, self._failer(peer))
                self._incoming[peer] = _Link(f"from-{peer}", takes, ranks[peer], self._take_one, self._failer(peer))
        self._peers = {ranks[peer]: peer for peer in self._outgoing}

    def begin(self, expected: Mapping[int, int]) -> None:
        """Let the threads take so many messages of each peer."""
        for peer, count in expected.items():
            for _ in range(count):
                self._link(self._incoming, peer).put(None)

    def send(self, message: Message, tensor: Tensor, *, peer: int) -> None:
        """Queue a tensor."""
        tensor = tensor.detach().contiguous().to(self._wire)
        self._link(self._outgoing, peer).put((encode(message, tensor), tensor))

    def receive(self, message: Message, *, peer: int, timeout_s: float) -> Tensor:
        """Wait for a tensor."""
        return self._mailbox.take(message, peer=peer, timeout_s=timeout_s)

    def end(self, timeout_s: float) -> None:
        """Wait for the queues of the senders."""
        deadline = time.monotonic() + timeout_s
        for peer, link in self._outgoing.items():
            if not link.drained(max(0.0, deadline - time.monotonic())):
                why = f"did not leave within {timeout_s:g} s" if link.error is None else f"failed: {link.error}"
                raise WatchdogError(
                    f"sending to rank {peer}: {link.pending} messages {why}; rank {peer} is gone, stopped or hangs: "
                    "see its output"
                )

    def abort(self, reason: str) -> None:
        """Queue an abort for every peer, and give it a moment."""
        deadline = time.monotonic() + _ABORT_FLUSH_S
        for link in self._outgoing.values():
            link.put(encode_abort(reason))
        for link in self._outgoing.values():
            link.drained(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """End the threads that are idle; one inside a wait ends with the process."""
        for link in [*self._outgoing.values(), *self._incoming.values()]:
            link.stop()

    def _link(self, links: Mapping[int, _Link], peer: int) -> _Link:
        if peer not in links:
            raise ScheduleError(
                f"the schedule has messages between ranks {self._rank} and {peer}, and this pipeline has "
                f"{len(links) + 1} rank(s): make it with devices={len(links) + 1}"
            )
        return links[peer]

    def _send_one(self, link: _Link, item: tuple[Tensor, Tensor]) -> None:
        header, payload = item
        for tensor in (header.to(self._wire), payload):
            if tensor.numel():
                _finished(dist.isend(tensor, link.global_rank, group=link.group))

    def _take_one(self, link: _Link, _item: None) -> None:
        header = torch.empty(HEADER_WORDS, dtype=torch.int64, device=self._wire)
        _finished(dist.irecv(header, link.global_rank, group=link.group))
        message, dtype, shape = decode(header.tolist())
        payload = torch.empty(shape, dtype=dtype, device=self._wire)
        if payload.numel():
            _finished(dist.irecv(payload, link.global_rank, group=link.group))
        if message is None:
            reason = bytes(payload.cpu().tolist()).decode(errors="replace")
            self._mailbox.fail(self._peers[link.global_rank], f"gave up: {reason}")
        else:
            self._mailbox.put(message, payload.to(self._device))

    def _failer(self, peer: int) -> Callable[[Exception], None]:
        return lambda error: self._mailbox.fail(peer, f"is gone ({reason_of(error)})")


class _Link:
    """One direction to one peer: a queue and the thread that works on it, one item after the other."""

    def __init__(
        self,
        name: str,
        group: dist.ProcessGroup,
        global_rank: int,
        work: Callable[[_Link, Any], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.group, self.global_rank = group, global_rank
        self.pending = 0
        self.error: str | None = None
        self._work, self._failed = work, failed
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._done = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name=f"pipeline-{name}", daemon=True)
        self._thread.start()

    def put(self, item: object) -> None:
        """Queue an item."""
        with self._done:
            self.pending += 1
        self._queue.put((item,))

    def stop(self) -> None:
        """End the thread once its queue is empty."""
        self._queue.put(None)
        if self.pending == 0:
            self._thread.join(timeout=5)

    def drained(self, timeout_s: float) -> bool:
        """Wait until all items are done; return whether they are."""
        with self._done:
            self._done.wait_for(lambda: self.pending == 0 or self.error is not None, timeout_s)
            return self.pending == 0

    def _serve(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self._work(self, entry[0])
            except Exception as error:  # noqa: BLE001  (whatever it is, the rank's own thread raises it)
                self._failed(error)
                with self._done:
                    self.error = reason_of(error)
                    self._done.notify_all()
                return  # the items left stay pending, and `end` names them
            with self._done:
                self.pending -= 1
                self._done.notify_all()


def _derived(ranks: list[int]) -> dist.ProcessGroup:
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _finished(work: dist.Work | None) -> None:
    assert work is not None
    work.wait(_WITHOUT_END)
