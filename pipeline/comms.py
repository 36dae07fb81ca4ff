"""Complete a schedule of compute actions with the messages between devices.

Sender-driven: every SEND follows what makes it, and the RECVs of a device stand in the order in which each peer sends,
each as late as it may. So no lists can deadlock that do not wait for themselves anyway.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from pipeline import graph as graphs
from pipeline.actions import COMPUTE, Action, Op
from pipeline.crossings import crossings, ends, without_transfers
from pipeline.graph import Why
from pipeline.host import with_host
from pipeline.schedule import Schedule


def complete(schedule: Schedule) -> Schedule:
    """With messages between devices where stages are bound to them; through the host for slots, which are not.

    Raises ScheduleError if an action needs what nothing makes.
    """
    owner: dict[int, int] = {}
    compute = [(d, a) for d, row in enumerate(schedule.devices) for a in row if a.op in COMPUTE]
    bound = all(a.op is not Op.FB and owner.setdefault(a.stage, d) == d for d, a in compute)
    return with_messages(schedule) if bound else with_host(schedule)


def with_messages(schedule: Schedule) -> Schedule:
    """The schedule with a SEND and a RECV for everything that crosses from one device to another.

    Raises ScheduleError if an action needs what nothing makes.
    """
    graph = graphs.build(without_transfers(schedule))
    found = graph.listing
    sends: dict[int, list[Action]] = defaultdict(list)  # by maker
    queues: dict[tuple[int, int], list[Action]] = defaultdict(list)  # RECVs of a (from, to), in order
    due: dict[int, list[tuple[tuple[int, int], int]]] = defaultdict(list)  # consumer to (queue, messages it needs)
    numbers: dict[tuple[int, int, int], int] = {}
    for i, j, at in sorted(crossings(graph, Why.HOP), key=lambda c: (c[1], c[0])):
        a, b = found.where[j][0], found.where[i][0]
        if (j, b, at) not in numbers:
            send, recv = ends(graph, j, i, at, Op.SEND, Op.RECV)
            sends[j].append(replace(send, peer=b))
            queues[a, b].append(replace(recv, peer=a))
            numbers[j, b, at] = len(queues[a, b])
        due[i].append(((a, b), numbers[j, b, at]))
    rows: list[list[Action]] = [[] for _ in schedule.devices]
    received: dict[tuple[int, int], int] = defaultdict(int)
    for i, (action, (device, _)) in enumerate(zip(found.actions, found.where, strict=True)):
        for queue, count in due.get(i, []):
            rows[device] += queues[queue][received[queue] : count]
            received[queue] = max(received[queue], count)
        rows[device] += [action, *sends.get(i, [])]
    return schedule.with_devices(rows)
