"""What has to happen before what: the happens-before graph of a schedule, FIFO queues included.

How a device runs its list: compute actions one after another; a transfer starts no earlier than the compute before it
in the list has ended, and blocks only what needs it, save a RECV, at which the list waits. Each kind of transfer of a
device is a queue, and so is each ordered pair of devices. The validator looks for cycles here, the simulator for times.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum

from pipeline.actions import COMPUTE, FORWARD, MESSAGES, Op, Phase
from pipeline.listing import Listing, boundary, listing
from pipeline.schedule import Schedule
from pipeline.weights import weight_edges


class Why(Enum):
    """The reason of an edge."""

    ORDER = "order of the list"
    QUEUE = "queue"
    DATA = "data"
    HOP = "data from another device"
    WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class Graph:
    """Action i of the listing waits for each (j, why) of `before[i]`; `send_of` leads from a RECV to its SEND."""

    listing: Listing
    before: tuple[tuple[tuple[int, Why], ...], ...]
    send_of: dict[int, int]


Edges = list[list[tuple[int, Why]]]


def build(schedule: Schedule) -> Graph:
    """The graph of a schedule; without SEND and RECV, data pass between devices as edges of kind HOP.

    Raises ScheduleError, with an arrow, where something is needed that nothing makes or brings.
    """
    found = listing(schedule)
    edges: Edges = [[] for _ in found.actions]
    has_messages = any(a.op in MESSAGES for a in found.actions)
    _order(found, edges)
    send_of = _pair_messages(found, edges)
    for i, action in enumerate(found.actions):
        if action.op in FORWARD or action.op is Op.R:
            _need_input(found, edges, i, has_messages)
        if action.op in (Op.B, Op.I):
            _need_kept(found, edges, i)
            _need_gradient(found, edges, i, has_messages)
        if action.op is Op.W:
            edges[i].append((_required(found, i, found.own(i, Op.I), "its I"), Why.DATA))
        if action.op in COMPUTE and found.where[i][0] in found.streamed:
            edges[i].append((_required(found, i, _upload_of(found, i), "an UPLOAD of its stage"), Why.DATA))
        if action.op in (Op.SEND, Op.PUT):
            _need_made(found, edges, i)
        if action.op is Op.GET:
            _need_put(found, edges, i)
    for i, j in weight_edges(found):
        edges[i].append((j, Why.WEIGHTS))
    return Graph(found, tuple(tuple(dict.fromkeys(e)) for e in edges), send_of)


def _required(found: Listing, i: int, j: int | None, what: str) -> int:
    if j is None:
        raise found.fail(i, f"needs {what} earlier on the same device; it is not there")
    return j


def _order(found: Listing, edges: Edges) -> None:
    """The order of each list, and of each queue."""
    compute: int | None = None
    received: int | None = None
    queues: dict[object, int] = {}
    for i, (action, (_, position)) in enumerate(zip(found.actions, found.where, strict=True)):
        if position == 0:
            compute, received, queues = None, None, {}
        edges[i] += [(j, Why.ORDER) for j in (compute, received) if j is not None]
        if action.op in COMPUTE or action.op is Op.FREE:
            compute, received = i, None
            continue
        if action.op is Op.RECV:
            received = i
        queue = (action.op, action.peer)
        if queue in queues:
            edges[i].append((queues[queue], Why.QUEUE))
        queues[queue] = i


def _pair_messages(found: Listing, edges: Edges) -> dict[int, int]:
    """The k-th SEND of an ordered pair of devices is what the k-th RECV gets: queues keep their order."""
    sends, receives = defaultdict(list), defaultdict(list)
    for i, action in enumerate(found.actions):
        if action.op in (Op.SEND, Op.RECV):
            device, peer = found.where[i][0], action.peer
            if peer is None or peer >= found.schedule.num_devices or peer == device:
                raise found.fail(i, f"its peer is {peer}; it needs another device of the {found.schedule.num_devices}")
            (sends[device, peer] if action.op is Op.SEND else receives[peer, device]).append(i)
    send_of = {}
    for a, b in sorted(sends.keys() | receives.keys()):
        for j, i in zip(sends[a, b], receives[a, b], strict=False):
            if _message(found, j) != _message(found, i):
                sent = f"{found.actions[j].label} at position {found.where[j][1]}"
                raise found.fail(i, f"device {a} sends {sent} as this message; messages of a pair keep their order")
            send_of[i] = j
            edges[i].append((j, Why.DATA))
        for i in receives[a, b][len(sends[a, b]) :]:
            raise found.fail(i, f"device {a} never sends this; add its SEND")
        for j in sends[a, b][len(receives[a, b]) :]:
            raise found.fail(j, f"device {b} never receives this; add its RECV")
    return send_of


def _message(found: Listing, i: int) -> tuple:
    action = found.actions[i]
    return action.phase, boundary(found.schedule, action), action.microbatch


def _upload_of(found: Listing, i: int) -> int | None:
    """The UPLOAD of an action's step and round; without one that says so, the last of its stage before it."""
    schedule, action = found.schedule, found.actions[i]

    def visit(microbatch: int | None) -> tuple[int, int] | None:
        return None if microbatch is None else (schedule.step(microbatch), schedule.round(microbatch))

    uploads = found.uploads.get((found.where[i][0], action.stage), [])
    same = [j for j in uploads if visit(found.actions[j].microbatch) == visit(action.microbatch)]
    return found.before(same or uploads, i)


def _need_input(found: Listing, edges: Edges, i: int, has_messages: bool) -> None:
    action = found.actions[i]
    lo = found.schedule.layers(action)[0]
    near = found.arrival(i, Phase.F, lo)
    if near is None and action.op is Op.R:  # the first forward saved its input
        near = found.own(i, Op.F)
    if near is not None:
        edges[i].append((near, Why.DATA))
    elif lo > 0:
        _direct(found, edges, i, found.forward_producer(action.microbatch or 0, lo), "input activation", has_messages)


def _need_gradient(found: Listing, edges: Edges, i: int, has_messages: bool) -> None:
    schedule = found.schedule
    hi, mb = schedule.layers(found.actions[i])[1], found.actions[i].microbatch or 0
    if hi == schedule.num_layers:
        return
    if (j := found.arrival(i, Phase.B, hi)) is not None:
        edges[i].append((j, Why.DATA))
    else:
        makers = found.gradients.get((hi, mb), [])
        _direct(found, edges, i, makers[0] if makers else None, "output gradient", has_messages)


def _direct(found: Listing, edges: Edges, i: int, maker: int | None, what: str, has_messages: bool) -> None:
    if maker is None:
        raise found.fail(i, f"nothing makes its {what}")
    near = found.where[maker][0] == found.where[i][0]
    if has_messages and (not near or found.where[i][0] in found.streamed):
        raise found.fail(
            i, f"its {what} is made on device {found.where[maker][0]} and never arrives; add a RECV or GET"
        )
    edges[i].append((maker, Why.DATA if near else Why.HOP))


def _need_kept(found: Listing, edges: Edges, i: int) -> None:
    """A backward needs the activations that a forward of the same layers made on its device."""
    j = _required(found, i, found.own(i, Op.F, Op.R), "a forward (F or R) of its stage and micro-batch")
    if found.schedule.layers(found.actions[j]) != found.schedule.layers(found.actions[i]):
        raise found.fail(i, f"its activations come from {found.actions[j]}, which ran other layers")
    edges[i].append((j, Why.DATA))


def _need_made(found: Listing, edges: Edges, i: int) -> None:
    ops = (Op.F, Op.FB) if found.actions[i].phase is Phase.F else (Op.B, Op.I, Op.FB)
    edges[i].append((_required(found, i, found.own(i, *ops), "the action that makes what it gives away"), Why.DATA))


def _need_put(found: Listing, edges: Edges, i: int) -> None:
    """A GET needs the PUT of the same boundary and micro-batch, on whatever device."""
    action = found.actions[i]
    if action.phase is Phase.F and boundary(found.schedule, action) == 0:
        return
    puts = found.puts.get((action.phase, boundary(found.schedule, action), action.microbatch), [])
    if not puts:
        raise found.fail(i, "nothing puts this on the host; add the PUT of what makes it")
    edges[i].append((puts[0], Why.DATA if found.where[puts[0]][0] == found.where[i][0] else Why.HOP))
