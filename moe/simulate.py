"""Event simulation of one layer in one direction: three lanes, each running its operations in issue order.

`makespan` is the plain recurrence (floats or arrays over many layers). `timeline` says when each operation runs and
knows what running beside another lane costs; without slowdowns both agree, and with fifo order so does `layer_time`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from moe.cost import LayerLoad, Profile, StageTimes, gradient_time, stage_times
from moe.errors import PlanError
from moe.plan import (
    COMBINE,
    COMPUTE,
    DISPATCH,
    EXPERT,
    GATHER,
    GRADIENT,
    INTER,
    INTRA,
    SCATTER,
    LayerPlan,
    Op,
    Order,
    inter_order,
    intra_order,
)

LANES = (INTER, INTRA, COMPUTE)
PREVIOUS = {GATHER: DISPATCH, EXPERT: GATHER, SCATTER: EXPERT, COMBINE: SCATTER}


@dataclass(frozen=True, slots=True)
class Event:
    """One operation on its lane, seconds from the layer's start."""

    op: Op
    lane: str
    t0_s: float
    t1_s: float


def makespan(t: StageTimes, intra: Sequence[Op]) -> Any:
    """Return when the last combine ends, no lane slowing another. `intra` is the order of the intra-node lane."""
    chunks = len(intra) // 2
    dispatched = [(i + 1) * t.all_to_all for i in range(chunks)]
    end: dict[Op, Any] = {}
    free = 0.0 * t.gather
    computed = 0.0 * t.gather
    for op in intra:
        if op.name == GATHER:
            free = end[op] = np.maximum(free, dispatched[op.chunk]) + t.gather
            computed = end[Op(EXPERT, op.chunk)] = np.maximum(computed, free) + t.expert
        else:
            free = end[op] = np.maximum(free, end[Op(EXPERT, op.chunk)]) + t.scatter
    combined = dispatched[-1] + t.gradient
    for i in range(chunks):
        combined = np.maximum(combined, end[Op(SCATTER, i)]) + t.all_to_all
    return combined


def lanes(intra: Sequence[Op], *, gradient: bool) -> dict[str, tuple[Op, ...]]:
    """Return the issue order of every lane."""
    chunks = len(intra) // 2
    return {
        INTER: inter_order(chunks, gradient=gradient),
        INTRA: tuple(intra),
        COMPUTE: tuple(Op(EXPERT, i) for i in range(chunks)),
    }


def timeline(
    t: StageTimes, intra: Sequence[Op], slowdown: Mapping[tuple[str, str], float] | None = None
) -> list[Event]:
    """Return every operation's span, by start. `slowdown[one, other]` stretches lane `one` while `other` runs too."""
    seconds = {
        DISPATCH: t.all_to_all,
        COMBINE: t.all_to_all,
        GATHER: t.gather,
        SCATTER: t.scatter,
        EXPERT: t.expert,
        GRADIENT: t.gradient,
    }
    return _run(lanes(intra, gradient=t.gradient > 0), seconds, slowdown or {})


def _run(
    orders: Mapping[str, Sequence[Op]], seconds: Mapping[str, float], slowdown: Mapping[tuple[str, str], float]
) -> list[Event]:
    waiting = {lane: list(reversed(ops)) for lane, ops in orders.items()}
    running: dict[str, tuple[Op, float, float]] = {}  # op, start, seconds of work left
    done: set[Op] = set()
    events: list[Event] = []
    now = 0.0
    while True:
        for lane, ops in waiting.items():
            if lane not in running and ops and _ready(ops[-1], done):
                op = ops.pop()
                running[lane] = (op, now, seconds[op.name])
        if not running:
            break
        rate = {a: 1 / prod(slowdown.get((a, b), 1.0) for b in running if b != a) for a in running}
        step = min(left / rate[lane] for lane, (_, _, left) in running.items())
        now += step
        for lane, (op, began, left) in list(running.items()):
            left -= step * rate[lane]
            running[lane] = (op, began, left)
            if left <= 1e-12:
                del running[lane]
                done.add(op)
                events.append(Event(op, lane, began, now))
    if any(waiting.values()):
        stuck = {lane: ops[-1] for lane, ops in waiting.items() if ops}
        raise PlanError(f"no lane can go on: {stuck} wait for one another; gather i must be issued before scatter i")
    return sorted(events, key=lambda e: (e.t0_s, e.t1_s))


def _ready(op: Op, done: set[Op]) -> bool:
    previous = PREVIOUS.get(op.name)
    return previous is None or Op(previous, op.chunk) in done


def predict(profile: Profile, t: StageTimes, chunks: int, *, order: Order = "fifo", lag: int = 1) -> list[Event]:
    """Return the timeline of one direction under a profile's slowdowns."""
    pairs = {(a, b): profile.slowdown(a, b) for a in LANES for b in LANES if a != b}
    return timeline(t, intra_order(chunks, order, lag), pairs)


def run_plan(profile: Profile, load: LayerLoad, plan: LayerPlan, *, backward: bool) -> tuple[list[Event], float]:
    """Return the timeline of one direction and the seconds of the gradients that the plan leaves for afterwards.

    Of the load's gradients a backward hides those of `plan.gradient_bytes`. With `profile.layer_s` both are what the
    plan of this profile and load predicts.
    """
    left = replace(load, gradient_bytes=max(0, round(load.gradient_bytes) - plan.gradient_bytes))
    hidden = load.gradient_bytes - left.gradient_bytes
    chunks, lag = plan.chunks(backward=backward), plan.backward_lag if backward else plan.forward_lag
    bare = replace(load, gradient_bytes=hidden)
    times = stage_times(profile, bare, chunks, backward=backward, pieces=plan.pieces)
    return predict(profile, times, chunks, order=plan.order, lag=lag), gradient_time(profile, left) * backward


def peak_bytes(events: Sequence[Event], load: LayerLoad, chunks: int) -> float:
    """Return the most bytes of communication buffers that are alive at once.

    A chunk holds what it received until it is gathered, what was gathered until the experts are done, their output
    until it is summed, and that until it is combined. Activations the experts keep are the same for every r.
    """
    exchange, gathered = load.exchange_bytes / chunks, load.gather_bytes / chunks
    start = {e.op: e.t0_s for e in events}
    end = {e.op: e.t1_s for e in events}
    changes: list[tuple[float, float]] = []
    for i in range(chunks):
        for size, born, dead in (
            (exchange, start[Op(DISPATCH, i)], end[Op(GATHER, i)]),
            (gathered, start[Op(GATHER, i)], end[Op(EXPERT, i)]),
            (gathered, start[Op(EXPERT, i)], end[Op(SCATTER, i)]),
            (exchange, start[Op(SCATTER, i)], end[Op(COMBINE, i)]),
        ):
            changes += [(born, size), (dead, -size)]
    alive = peak = 0.0
    for _, change in sorted(changes):  # what dies makes room before what is born at the same moment
        alive += change
        peak = max(peak, alive)
    return peak
