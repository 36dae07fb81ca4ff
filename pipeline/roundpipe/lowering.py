"""From slots to the schedule that the ranks run: ordered, completed, and proved free of deadlock. Pure.

The runtime waits for a few things more than the actions of a schedule say: rounds hand their gradients over in order,
a buffer is written when what an earlier step left in it is used, gradients are overwritten when the optimizer has used
them. The proof counts these too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from pipeline import graph as graphs
from pipeline.actions import COMPUTE, Action, Op, Phase
from pipeline.costs import Costs
from pipeline.errors import ScheduleError
from pipeline.graph import Why
from pipeline.host import with_host
from pipeline.listing import Listing, boundary
from pipeline.schedule import Schedule
from pipeline.schedules.dispatch import ready_first
from pipeline.schedules.roundpipe import Slots, roundpipe
from pipeline.validate import check_acyclic, validate


def slot_schedule(
    slots: Slots,
    *,
    devices: int,
    microbatches: int | Sequence[int],
    rounds: int = 1,
    steps: int = 1,
    staleness: int = 0,
    costs: Costs | None = None,
    open_slots: int = 1,
    capped: bool = False,
) -> Schedule:
    """Return a schedule with transfers and optimizer steps that a `SlotWorker` runs; ready-first where `costs` say so.

    `microbatches` of each of `steps` steps, or a sequence with those of every step. A ready-first order in which
    devices would wait in a circle, since rounds hand over their gradients in order, or under a memory cap (`capped`)
    for room that gradients take on their way down, gives way to the one with fewer slots open, at last to strict order.
    Raises PlanError or ScheduleError for numbers that do not fit.
    """
    costs = costs or Costs.uniform(slots.num_layers)
    sizes = {microbatches} if isinstance(microbatches, int) else set(microbatches)
    plain = roundpipe(
        devices=devices, microbatches=microbatches, slots=slots, rounds=rounds, steps=steps, staleness=staleness
    )
    for count in range(open_slots, 1, -1):  # within a step: a device ends one before it begins the next
        orders = {size: ready_order(slots, devices, size, min(rounds, size), costs, count) for size in sizes}
        found = roundpipe(
            devices=devices, microbatches=microbatches, slots=slots, rounds=rounds, steps=steps, staleness=staleness,
            order=orders,
        )  # fmt: skip
        try:
            found = completed(found)
            if capped:
                check_waits(found, capped=True)
        except ScheduleError:
            continue
        return found
    return completed(plain)


@lru_cache(maxsize=64)
def ready_order(
    slots: Slots, devices: int, microbatches: int, rounds: int, costs: Costs, open_slots: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return the (slot, micro-batch) pairs of every device in one step, ready-first. Raises as `slot_schedule`."""
    one = roundpipe(devices=devices, microbatches=microbatches, slots=slots, rounds=rounds)
    one = ready_first(one, costs, open_slots=open_slots)
    return tuple(tuple((a.stage, a.microbatch or 0) for a in row if a.op is not Op.R) for row in one.devices)


def reused(schedule: Schedule, microbatch: int, copies: int) -> int | None:
    """Return the micro-batch of an earlier step whose buffers on the host this one uses again, if there is one.

    A micro-batch has those of its place in the step, of which there are `copies`, used by one step after another.
    """
    step, place = schedule.step(microbatch), schedule.place(microbatch)
    before = (s for s in range(step - copies, -1, -copies) if schedule.size(s) > place)
    return next((schedule.first(s) + place for s in before), None)


def completed(schedule: Schedule) -> Schedule:
    """Return a RoundPipe schedule of compute actions with all the rest, validated. Raises ScheduleError."""
    schedule = with_host(schedule)
    validate(schedule)
    check_waits(schedule)
    return schedule


def check_waits(schedule: Schedule, *, capped: bool = False) -> None:
    """Raise ScheduleError when what the runtime waits for beside the schedule's own edges makes a circle.

    With `capped` it also waits for all gradients on their way down before it takes up a micro-batch.
    """
    graph = graphs.build(schedule)
    before = [list(edges) for edges in graph.before]
    for i, j in (*_runtime_edges(graph.listing), *(_room_edges(graph.listing) if capped else ())):
        before[i].append((j, Why.WEIGHTS))
    check_acyclic(replace(graph, before=tuple(map(tuple, before))))


def without_optimizer(schedule: Schedule) -> Schedule:
    """Return a schedule of one step that leaves the optimizer to the caller."""
    return schedule.with_devices([[a for a in row if a.op is not Op.OPT] for row in schedule.devices])


def scoring(schedule: Schedule) -> Schedule:
    """Return the forward slots of a schedule, for an evaluation: the fused slot runs forward only."""
    forward = {a.stage for row in schedule.devices for a in row if a.op in (Op.F, Op.FB)}

    def stays(a: Action) -> bool:
        return a.stage in forward and a.op not in (Op.DOWNLOAD, Op.OPT) and a.phase is not Phase.B

    rows = [[a for a in row if stays(a)] for row in schedule.devices]
    wanted = {(boundary(schedule, a), a.microbatch) for row in rows for a in row if a.op is Op.GET}
    rows = [[a for a in row if a.op is not Op.PUT or (boundary(schedule, a), a.microbatch) in wanted] for row in rows]
    return schedule.with_devices(rows, name=f"{schedule.name}, forward only")


def _room_edges(found: Listing) -> Iterator[tuple[int, int]]:
    """Pairs (i, j): action i may wait for download j of its device, to have room."""
    downloads: list[int] = []
    for i, a in enumerate(found.actions):
        downloads = [] if found.where[i][1] == 0 else downloads
        if a.op is Op.DOWNLOAD:
            downloads.append(i)
        elif a.op in COMPUTE:
            yield from ((i, j) for j in downloads)
            downloads = []  # what comes after i has waited with it


def _runtime_edges(found: Listing) -> Iterator[tuple[int, int]]:
    """Pairs (i, j): action i waits for action j."""
    schedule = found.schedule
    downloads = defaultdict(list)
    updates = defaultdict(list)
    takers = defaultdict(list)
    puts = []
    for i, a in enumerate(found.actions):
        mb = a.microbatch or 0
        if a.op is Op.DOWNLOAD:
            downloads[schedule.step(mb)].append((schedule.round(mb), a.stage, i))
        elif a.op is Op.OPT:
            updates[(a.version or 0) - 1].append(i)
        elif a.op is Op.GET:  # taken up by the action that needs it
            at = boundary(schedule, a) if a.phase is Phase.F else 0
            users = (Op.F, Op.FB, Op.R) if a.phase is Phase.F else (Op.B,)
            device = found.where[i][0]
            takers[a.phase, at, a.microbatch] += [
                j for op in users for j in found.local.get((device, op, a.stage, a.microbatch), [])
            ]
        elif a.op is Op.PUT:
            puts.append(i)
    for i in puts:
        a = found.actions[i]
        at = boundary(schedule, a) if a.phase is Phase.F else 0
        if i + 1 < len(found.actions) and found.where[i + 1][0] == found.where[i][0]:
            yield i + 1, i  # it blocks the device
        before = reused(schedule, a.microbatch or 0, 1 + schedule.staleness)
        yield from ((i, j) for j in takers.get((a.phase, at, before), ()))
    for step, entries in downloads.items():
        by = {(rnd, slot): i for rnd, slot, i in entries}
        for (rnd, slot), i in by.items():
            if rnd > 0:
                yield i, by[rnd - 1, slot]
            else:
                yield from ((i, j) for j in updates.get(step - 1, ()))
        # A clipped step waits for all gradients.
        yield from ((i, j) for i in updates.get(step, ()) for *_, j in entries)
