"""Is a schedule complete, in order, free of deadlock and within its memory? Checked before anything is launched.

`validate` raises ScheduleError with the table and an arrow at the first thing that is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline import graph as graphs
from pipeline.actions import COMPUTE, FORWARD, Op, Phase
from pipeline.cap import over_cap
from pipeline.costs import Costs
from pipeline.errors import ScheduleError
from pipeline.graph import Graph
from pipeline.listing import Listing
from pipeline.schedule import Schedule
from pipeline.simulate import simulate
from pipeline.validate_weights import check_streams, check_updates, check_versions


def validate(schedule: Schedule, *, costs: Costs | None = None, memory_cap_bytes: float | None = None) -> None:
    """Check a schedule, of compute actions only or completed with communication.

    - every (layer, micro-batch) runs forward once, and backward once unless frozen: ranges tile the layers;
    - what an action needs is made, arrives once, and on its own device stands before it; data come in the order sent;
    - no wait is circular, with queues in order and a SEND that waits for its RECV (so with or without buffers);
    - one weight version in forward, recompute and backward of a micro-batch, within the declared staleness;
    - weights are uploaded before use and freed after it, gradients downloaded after the last micro-batch and used by
      one optimizer step;
    - chunk groups run forward ascending and backward descending, keep at most `retain` chunks and are freed;
    - with `costs` and a cap: the simulated peak of every device is within `memory_cap_bytes`.

    Raises ScheduleError.
    """
    graph = graphs.build(schedule)
    found = graph.listing
    _check_tiling(found)
    _check_pairs(found)
    _check_arrivals(found)
    _check_local_order(graph)
    check_versions(found)
    check_streams(found)
    check_updates(found)
    _check_groups(found)
    check_acyclic(graph)
    if costs is not None and memory_cap_bytes is not None:
        over = over_cap(found, costs, simulate(schedule, costs), memory_cap_bytes)
        if over is not None:
            raise found.fail(over.action, over.text)


def _check_tiling(found: Listing) -> None:
    schedule = found.schedule
    ways = (("forward", FORWARD, 0), ("backward", frozenset({Op.B, Op.I, Op.FB}), schedule.first_trainable))
    for way, ops, start in ways:
        done: dict[tuple[int, int], int] = {}
        for i, action in enumerate(found.actions):
            if action.op not in ops:
                continue
            for layer in range(*schedule.layers(action)):
                first = done.setdefault((layer, action.microbatch or 0), i)
                if first != i:
                    device, position = found.where[first]
                    raise found.fail(
                        i,
                        f"layer {layer} runs {way} on micro-batch {action.microbatch} a second time, "
                        f"after {found.actions[first].label} on device {device}, position {position}",
                    )
        for mb in range(schedule.num_microbatches):
            missing = [layer for layer in range(start, schedule.num_layers) if (layer, mb) not in done]
            if missing:
                raise ScheduleError(
                    f"{schedule.name}: layer {missing[0]} never runs {way} on micro-batch {mb}; every layer from "
                    f"{start} to {schedule.num_layers - 1} does once\n{schedule.table()}"
                )


def _check_pairs(found: Listing) -> None:
    """Every I has one W, and every R a backward that follows it."""
    for i, action in enumerate(found.actions):
        key = (found.where[i][0], action.stage, action.microbatch)
        if action.op is Op.I:
            weights = found.local.get((key[0], Op.W, *key[1:]), [])
            if len(weights) != 1:
                raise found.fail(i, f"has {len(weights)} W of its stage and micro-batch on its device; it needs one")
        if action.op is Op.R:
            after = [j for op in (Op.B, Op.I) for j in found.local.get((key[0], op, *key[1:]), []) if j > i]
            again = [j for j in found.local[key[0], Op.R, *key[1:]] if j > i]
            first = found.local.get((key[0], Op.F, *key[1:]), [])
            if not after or again or any(j > i for j in first):
                raise found.fail(i, "an R stands once, after its F and before the B or I that uses it")


def _check_arrivals(found: Listing) -> None:
    """What arrives is taken by an action behind it, and arrives once."""
    first: dict[tuple, int] = {}
    for i, action in enumerate(found.actions):
        if action.op not in (Op.RECV, Op.GET):
            continue
        device, mb = found.where[i][0], action.microbatch
        other = first.setdefault((device, action.phase, action.stage, mb), i)
        if other != i:
            raise found.fail(i, f"brings what position {found.where[other][1]} has brought already; it arrives once")
        takers = (Op.F, Op.FB, Op.R) if action.phase is Phase.F else (Op.B, Op.I)
        if not any(j > i for op in takers for j in found.local.get((device, op, action.stage, mb), [])):
            raise found.fail(i, "no action of its stage and micro-batch behind it on this device takes what it brings")


def _check_local_order(graph: Graph) -> None:
    found = graph.listing
    for i, before in enumerate(graph.before):
        for j, _ in before:
            if j > i and found.where[i][0] == found.where[j][0]:
                other = f"{found.actions[j].label} at position {found.where[j][1]}"
                raise found.fail(i, f"needs {other}, which stands after it on the same device")


def check_acyclic(graph: Graph) -> None:
    """Raise ScheduleError, with the actions of the circle, if some wait for each other.

    A SEND and its RECV count as one, so that the proof holds for transports that buffer nothing.
    """
    found = graph.listing
    n = len(found.actions)
    one = [graph.send_of.get(i, i) for i in range(n)]
    before: dict[int, set[int]] = {i: set() for i in one}
    for i, edges in enumerate(graph.before):
        before[one[i]] |= {one[j] for j, _ in edges if one[j] != one[i]}
    after: dict[int, list[int]] = defaultdict(list)
    for i, js in before.items():
        for j in js:
            after[j].append(i)
    left = {i: len(js) for i, js in before.items()}
    ready = [i for i, count in left.items() if not count]
    while ready:
        for i in after[ready.pop()]:
            left[i] -= 1
            if not left[i]:
                ready.append(i)
    stuck = {i for i, count in left.items() if count}
    if stuck:
        circle = _circle(before, stuck)
        names = " <- ".join(f"{found.actions[i].label}@{found.where[i][0]}" for i in [*circle, circle[0]])
        raise found.fail(circle[0], f"a deadlock, each waits for the next: {names}")


def _circle(before: dict[int, set[int]], stuck: set[int]) -> Sequence[int]:
    seen: dict[int, int] = {}
    path: list[int] = []
    i = min(stuck)
    while i not in seen:
        seen[i] = len(path)
        path.append(i)
        i = min(before[i] & stuck)
    return path[seen[i] :]


def _check_groups(found: Listing) -> None:
    units = found.schedule.units
    if units is None:
        return
    forward: dict[tuple, int] = {}
    backward: dict[tuple, int] = {}
    for i, action in enumerate(found.actions):
        unit = units[action.microbatch] if action.microbatch is not None else None
        if unit is None or unit.group is None:
            continue
        device = found.where[i][0]
        key = (device, action.stage, unit.group)
        if action.op is Op.FREE and unit.index > 0:
            raise found.fail(i, f"chunk {unit.index} of group {unit.group}: the FREE of a group names its first chunk")
        if action.op in FORWARD:
            if unit.index != forward.get(key, -1) + 1:
                raise found.fail(i, f"chunk {unit.index} of group {unit.group} runs forward out of ascending order")
            forward[key] = unit.index
            again = found.local.get((device, Op.R, action.stage, action.microbatch))
            if action.op is Op.F and not unit.kept and not again:
                raise found.fail(i, f"is none of the last {unit.retain} chunks of its group, so it needs an R")
        if action.op in (Op.B, Op.I, Op.FB):
            if unit.index != backward.get(key, unit.count) - 1:
                raise found.fail(i, f"chunk {unit.index} of group {unit.group} runs backward out of descending order")
            backward[key] = unit.index
        if action.op in COMPUTE and unit.index == 0 and backward.get(key) == 0:
            free = found.local.get((device, Op.FREE, action.stage, action.microbatch), [])
            if len(free) != 1 or free[0] < i:
                raise found.fail(i, f"ends group {unit.group}; one FREE of it has to follow, there are {len(free)}")
