"""Ready-first dispatch of RoundPipe: the order in which each device runs its slots, fixed by simulation.

In strict slot order a device waits at a paced backward slot while later work is ready. Here it keeps a few slots open,
the first that is not finished and those right behind it, and, each time it is free, takes the lowest whose next
micro-batch can start now, else the one that can start first. All devices then follow the order found, not what happens
to be ready. The planner simulates the same (`roundpipe.slot_sim`), and counts the memory of slots that follow another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline import graph as graphs
from pipeline.actions import COMPUTE, Op
from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.graph import Graph, Why
from pipeline.schedule import Schedule
from pipeline.simulate import duration

Task = tuple[int, ...]
"""Numbers of actions that run as one: an R with its B, or anything else alone."""


@dataclass(slots=True)
class _Device:
    slots: list[list[Task]]
    """From the first slot that is not finished on, in slot order, the tasks that are left."""
    free_s: float = 0.0
    row: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _State:
    graph: Graph
    costs: Costs
    seconds: list[float]
    end: dict[int, float]

    def ready_s(self, i: int, task: Task) -> float:
        """When what action i needs, other than from its own task, is there; inf if that is not known yet."""
        ready = 0.0
        for j, why in self.graph.before[i]:
            if why in (Why.ORDER, Why.QUEUE) or j in task:
                continue
            hop_s = self.costs.between_s(self.graph.listing.actions[i].microbatch or 0) if why is Why.HOP else 0.0
            ready = max(ready, self.end.get(j, math.inf) + hop_s)
        return ready

    def start_s(self, task: Task, free_s: float) -> float:
        """When a task can begin, so that its backward need not wait for the gradient after its recompute."""
        start, before = free_s, 0.0
        for i in task:
            start = max(start, self.ready_s(i, task) - before)
            before += self.seconds[i]
        return start


def ready_first(schedule: Schedule, costs: Costs, *, open_slots: int) -> Schedule:
    """Reorder a RoundPipe schedule of compute actions in strict slot order, with `open_slots` open on each device.

    The memory of the open slots is what the completed schedule then shows. Pure.

    Raises PlanError for fewer than one open slot, or a schedule that has transfers already.
    """
    if open_slots < 1 or any(a.op not in COMPUTE for row in schedule.devices for a in row):
        raise PlanError(f"ready_first got {open_slots} open slots; it takes at least 1, and compute actions only")
    graph = graphs.build(schedule)
    state = _State(graph, costs, [duration(schedule, a, costs) for a in graph.listing.actions], {})
    devices = [_Device(slots) for slots in _slots_of(graph)]
    while any(device.slots for device in devices):
        start, d, k = min(
            (state.start_s(slot[0], device.free_s), d, k)
            for d, device in enumerate(devices)
            for k, slot in enumerate(device.slots[:open_slots])
            if slot
        )
        if start == math.inf:
            raise PlanError(f"{schedule.name} cannot go on with {open_slots} open slots; it is not in slot order")
        device = devices[d]
        task = device.slots[k].pop(0)
        for i in task:
            start += state.seconds[i]
            state.end[i] = start
        device.free_s = start
        device.row += task
        while device.slots and not device.slots[0]:
            device.slots.pop(0)
    return schedule.with_devices([[graph.listing.actions[i] for i in device.row] for device in devices])


def _slots_of(graph: Graph) -> list[list[list[Task]]]:
    """Per device and visit (one slot in one round), its tasks."""
    found = graph.listing
    schedule = found.schedule
    slots: list[list[list[Task]]] = [[] for _ in schedule.devices]
    last: dict[int, tuple[int, int, int]] = {}
    for i, (action, (device, _)) in enumerate(zip(found.actions, found.where, strict=True)):
        mb = action.microbatch or 0
        visit = (schedule.step(mb), schedule.round(mb), action.stage)
        if last.get(device) != visit:
            slots[device].append([])
            last[device] = visit
        slot = slots[device][-1]
        if action.op is not Op.R and slot and found.actions[slot[-1][-1]].op is Op.R:
            slot[-1] = (*slot[-1], i)
        else:
            slot.append((i,))
    return slots
