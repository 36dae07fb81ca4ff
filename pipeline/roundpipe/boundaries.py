"""Activations and gradients between slots: put into the host store by one, fetched by others, of any rank."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.actions import Action, Op, Phase
from pipeline.errors import ScheduleError
from pipeline.listing import boundary
from pipeline.roundpipe.arena import Arena, Lease
from pipeline.roundpipe.host_store import HostStore
from pipeline.roundpipe.lowering import reused
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.transfers import Link
from pipeline.schedule import Schedule
from pipeline.transport.base import Message
from pipeline.transport.wire import decode, words_of

Item = tuple[Phase, int, int]
"""Phase, boundary, micro-batch of the schedule."""


@dataclass(slots=True)
class Held:
    """A tensor on the device."""

    tensor: Tensor
    lease: Lease


class Boundaries:
    """What crosses between the slots of one run, and what of it is on this device. `what` says where the rank is."""

    def __init__(
        self,
        schedule: Schedule,
        store: HostStore,
        peers: Peers,
        arena: Arena,
        link: Link,
        *,
        base: int,
        device: torch.device,
        what: Callable[[], str],
    ) -> None:
        self._schedule, self._store, self._peers, self._arena, self._link = schedule, store, peers, arena, link
        self._base, self._device, self._what = base, device, what
        self._gets: dict[tuple[Phase, int, int], Item] = {}
        self._outbox: dict[Item, Held] = {}
        self._makers: dict[Item, Action] = {}
        self._backward = {a.stage for row in schedule.devices for a in row if a.op is Op.B}
        takers: dict[tuple[Phase, int], set[bool]] = {}
        for row in schedule.devices:
            for action in row:
                if action.op is Op.PUT:
                    self._makers[self._item(action)] = action
                if action.op is Op.GET:
                    phase, at, _ = self._item(action)
                    again = phase is Phase.F and action.stage in self._backward
                    takers.setdefault((phase, at), set()).add(again)
        self._takers = takers

    def note(self, get: Action) -> None:
        """Remember a GET until the action that needs it takes it up."""
        self._gets[get.phase or Phase.F, get.stage, get.microbatch or 0] = self._item(get)

    def take(self, action: Action, phase: Phase) -> Held | None:
        """Wait for the input activation of an action, or the gradient of its output; None before the first layer."""
        mb = action.microbatch or 0
        if self._schedule.layers(action)[0 if phase is Phase.F else 1] == 0:
            return None
        item = self._gets.pop((phase, action.stage, mb), None)
        maker = self._makers.get(item) if item is not None else None
        if item is None or maker is None:
            kind = "GET" if item is None else "PUT"
            raise ScheduleError(
                f"{self._what()}: there is no {kind} of what it needs; complete and validate the schedule"
            )
        self._peers.wait(self._put_word(item), self._turn(mb), lambda: f"{self._what()}: waiting for {_made(maker)}")
        return self._fetch(item, action.stage)

    def hold(self, phase: Phase, at: int, mb: int, tensor: Tensor, slot: int) -> None:
        """Keep what a slot made, until its PUT."""
        lease = self._arena.lease(tensor.nbytes, slot=slot, what="an output")
        self._outbox[phase, at, mb] = Held(tensor, lease)

    def put(self, action: Action) -> None:
        """Write what a PUT carries to the host, and say that it is there."""
        item = self._item(action)
        held = self._outbox.pop(item, None)
        if held is None:
            raise ScheduleError(f"{self._what()}: it puts what has not been computed; validate the schedule")
        self._wait_until_free(item)
        phase, at, mb = item
        tensor, turn = held.tensor, self._turn(mb)
        most = self._store.plan.boundary_bytes
        if tensor.nbytes > most:
            raise ScheduleError(
                f"{self._what()}: {tensor.nbytes:,} bytes between two slots; the host store has room for "
                f"{most:,} each: shorten the micro-batch, or plan for longer ones"
            )
        where = phase, at, self._schedule.place(mb), turn
        with self._link.urgent, self._link.moving:
            self._store.header(*where)[:] = array("q", words_of(Message(turn, phase, action.stage, mb), tensor))
            self._store.room(*where, tensor.dtype, tensor.shape).copy_(tensor)
        self._store.words.publish(self._put_word(item), turn)
        held.lease.free()

    def leftover(self) -> list[object]:
        """Return what nobody took."""
        return [*self._outbox, *self._gets.values()]

    def carried(self, action: Action) -> Item:
        """Return what a GET or PUT carries."""
        return self._item(action)

    def _fetch(self, item: Item, slot: int) -> Held:
        phase, at, mb = item
        where = phase, at, self._schedule.place(mb), self._turn(mb)
        _, dtype, shape = decode(self._store.header(*where))
        made = self._store.room(*where, dtype, shape)
        lease = self._arena.lease(made.nbytes, slot=slot, what="an input")
        with self._link.urgent, self._link.moving:
            copy = made.to(self._device, copy=True)
        again = phase is Phase.F and slot in self._backward
        self._store.words.publish(self._store.plan.words.taken(*where, again=again), self._turn(mb))
        return Held(copy, lease)

    def _item(self, action: Action) -> Item:
        assert action.phase is not None
        return action.phase, boundary(self._schedule, action), action.microbatch or 0

    def _wait_until_free(self, item: Item) -> None:
        """Wait until what an earlier step left in this buffer is used.

        Within a step it is free: an activation has a buffer of its own, and the gradients of a micro-batch have one,
        which each backward slot reads before it writes.
        """
        phase, at, mb = item
        plan, place = self._store.plan, self._schedule.place(mb)
        before = reused(self._schedule, mb, 1 + plan.staleness)
        if before is None:
            return
        for (kind, number), readers in self._takers.items():
            if kind is phase and (phase is Phase.B or number == at):
                for again in readers:
                    self._peers.wait(
                        plan.words.taken(phase, number, place, self._turn(before), again=again),
                        self._turn(before),
                        lambda: f"{self._what()}: waiting until what an earlier step left there is used",
                    )

    def _put_word(self, item: Item) -> int:
        return self._store.plan.words.put(item[0], item[1], self._schedule.place(item[2]), self._turn(item[2]))

    def _turn(self, mb: int) -> int:
        return self._base + self._schedule.step(mb) + 1


def _made(put: Action) -> str:
    """Say what a PUT carries, and from where."""
    kind = "activation" if put.phase is Phase.F else "gradient"
    return f"the {kind} of slot {put.stage}, micro-batch {put.microbatch}, from rank {put.device}"
