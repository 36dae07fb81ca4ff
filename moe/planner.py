"""Choose a layer's plan from its profile: every r from 1 to 16, forward and backward apart, and say why.

Pure: integers and measured times in, a frozen plan out. Source: FSMoE, arXiv 2501.10714, section 4, whose sequential
quadratic programming over r is an enumeration here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import inf

from moe.cost import (
    MAX_CHUNKS,
    PAIRS,
    LayerLoad,
    Profile,
    StageTimes,
    gradient_time,
    lane_bound,
    layer_time,
    serial_time,
    stage_times,
)
from moe.errors import PlanError
from moe.plan import LayerPlan, Order, intra_order, pieces
from moe.simulate import makespan, peak_bytes, predict

READY_GAIN = 1.08
"""Where scatters are issued early it gained 2% on average and could lose 5%: taken only where it promises this."""
LEAVE_FIXED_GAIN = 1.03
"""A plan within 3% of the best single r, or of no overlap, is not worth leaving those for."""
FEWER_CHUNKS = 1.01
"""Within 1% of the fastest, fewer chunks and pieces are taken: every operation more is one more that can be late."""
_WORSE = 1.1
"""How much slower than the best of its direction an r may be, to be the better one of a pair with fewer pieces."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One direction: r, the order of its intra-node lane, and the time predicted."""

    chunks: int
    order: Order
    lag: int
    time_s: float


def direction_time(
    profile: Profile, load: LayerLoad, chunks: int, *, backward: bool, pieces: int | None = None
) -> float:
    """Return T(r) in fifo order; simulated where lanes slow one another, else exact. `pieces`: see `stage_times`."""
    t = stage_times(profile, load, chunks, backward=backward, pieces=pieces)
    return _time(profile, t, chunks, "fifo", 1)


def planned_time(profile: Profile, load: LayerLoad, plan: LayerPlan, *, backward: bool) -> float:
    """Return what one direction takes under a plan, with the load's own gradients."""
    r, lag = plan.chunks(backward=backward), plan.backward_lag if backward else plan.forward_lag
    t = stage_times(profile, load, r, backward=backward, pieces=plan.pieces)
    return _time(profile, t, r, plan.order, lag)


def best_choice(
    profile: Profile,
    load: LayerLoad,
    *,
    backward: bool,
    order: Order = "fifo",
    max_chunks: int = MAX_CHUNKS,
    memory_bytes: float | None = None,
) -> Choice:
    """Return the least r, then lag, within 1% of the fastest of one direction whose buffers fit.

    Raises PlanError when no r fits in `memory_bytes`.
    """
    fitting = _choices(profile, load, backward, order, max_chunks, memory_bytes)
    best_s = min(c.time_s for c in fitting)
    return next(c for c in fitting if c.time_s <= best_s * FEWER_CHUNKS)


def best_pair(
    profile: Profile,
    load: LayerLoad,
    *,
    order: Order = "fifo",
    max_chunks: int = MAX_CHUNKS,
    memory_bytes: float | None = None,
) -> tuple[Choice, Choice]:
    """Return forward and backward chosen together: the fewest pieces, then chunks, within 1% of the fastest pair.

    Where the two r differ, the experts run in more pieces than either has chunks, and each piece costs.
    Raises PlanError when no r fits in `memory_bytes`.
    """
    every = (_choices(profile, load, b, order, max_chunks, memory_bytes) for b in (False, True))
    forwards, backwards = (_one_a_count(choices) for choices in every)
    # The fastest of each alone is a lower bound: pieces only add to it.
    pairs = sorted(product(forwards, backwards), key=_sum)
    found: list[tuple[Choice, Choice]] = []
    best_s = float("inf")
    for pair in pairs:
        if _sum(pair) > best_s * FEWER_CHUNKS:
            break
        found.append(_in_pieces(profile, load, pair))
        best_s = min(best_s, _sum(found[-1]))
    near = (pair for pair in found if _sum(pair) <= best_s * FEWER_CHUNKS)
    return min(near, key=lambda p: (pieces(p[0].chunks, p[1].chunks), p[0].chunks + p[1].chunks, _sum(p)))


def _one_a_count(choices: Sequence[Choice]) -> list[Choice]:
    """Return the fastest of each r, of equal ones that with the least lag."""
    ascending = sorted(choices, key=lambda c: (c.chunks, c.time_s, c.lag))
    return [next(same) for _, same in groupby(ascending, key=lambda c: c.chunks)]


def _in_pieces(profile: Profile, load: LayerLoad, pair: tuple[Choice, Choice]) -> tuple[Choice, Choice]:
    count = pieces(pair[0].chunks, pair[1].chunks)

    def timed(c: Choice, backward: bool) -> Choice:
        if count == c.chunks:
            return c
        t = stage_times(profile, load, c.chunks, backward=backward, pieces=count)
        return replace(c, time_s=_time(profile, t, c.chunks, c.order, c.lag))

    return timed(pair[0], False), timed(pair[1], True)


def _choices(
    profile: Profile, load: LayerLoad, backward: bool, order: Order, max_chunks: int, memory_bytes: float | None
) -> list[Choice]:
    """Return every r and lag worth a look, ascending."""
    fitting: list[Choice] = []
    best_s = float("inf")
    for chunks in range(1, max_chunks + 1):
        t = stage_times(profile, load, chunks, backward=backward)
        for lag in range(1, max(2, chunks)) if order == "ready" else (1,):
            if _least(t, chunks) >= best_s * _WORSE:
                break
            if memory_bytes is not None and _buffers(profile, load, t, chunks, order, lag) > memory_bytes:
                continue
            fitting.append(Choice(chunks, order, lag, _time(profile, t, chunks, order, lag)))
            best_s = min(best_s, fitting[-1].time_s)
    if fitting:
        return fitting
    least = min(
        _buffers(profile, load, stage_times(profile, load, r, backward=backward), r, order, 1)
        for r in range(1, max_chunks + 1)
    )
    raise PlanError(
        f"no r of 1..{max_chunks} keeps the communication buffers in {memory_bytes:.0f} bytes; the smallest needs "
        f"{least:.0f}: raise the limit or give each rank fewer tokens"
    )


def fixed_time(profile: Profile, load: LayerLoad, chunks: int) -> tuple[float, float]:
    """Return the forward and backward time of one r for both, fifo, gradients afterwards."""
    bare = replace(load, gradient_bytes=0)
    forward, backward = (direction_time(profile, bare, chunks, backward=b) for b in (False, True))
    return forward, backward + gradient_time(profile, load)


def best_fixed(profile: Profile, load: LayerLoad, *, max_chunks: int = MAX_CHUNKS) -> tuple[int, float]:
    """Return Tutel's choice and its time: one r for forward and backward, gradients afterwards."""
    times = {r: sum(fixed_time(profile, load, r)) for r in range(1, max_chunks + 1)}
    best = min(times, key=lambda r: (times[r], r))
    return best, times[best]


def plan_layer(
    profile: Profile,
    load: LayerLoad,
    *,
    max_chunks: int = MAX_CHUNKS,
    memory_bytes: float | None = None,
) -> LayerPlan:
    """Return the plan of one layer, its prediction and its reasons.

    `load` holds the measured maxima over ranks. Falls back to the best single r where the plan promises less than 3%
    over it, and to r = 1 where nothing promises 3% over no overlap. Raises PlanError where no r fits in memory.
    """
    if memory_bytes is not None and not memory_bytes > 0:
        raise PlanError(f"memory_bytes is {memory_bytes!r}; give more than 0, or leave it out")
    if not load.exchange_bytes and not load.expert_rows:
        return LayerPlan(1, 1, reasons=("nothing is exchanged or computed: r = 1",))
    serial_s = serial_time(profile, load, backward=False) + serial_time(profile, load, backward=True)
    after = ", gradients afterwards" if load.gradient_bytes else ""
    chosen, notes = _search(profile, load, max_chunks, memory_bytes)
    plan, best_s = _as_plan(chosen, load, serial_s), _sum(chosen)
    fixed_r, fixed_s = best_fixed(profile, load, max_chunks=max_chunks)
    promise = f"promises {_over(fixed_s, best_s):.3f}x over the best single r = {fixed_r}"
    if serial_s < best_s * LEAVE_FIXED_GAIN and _fixed_fits(profile, load, 1, memory_bytes):
        plan = _fixed_plan(profile, load, 1, serial_s)
        notes.append(f"overlap promises {serial_s / best_s:.3f}x over none, {LEAVE_FIXED_GAIN} needed: r = 1{after}")
    elif fixed_s < best_s * LEAVE_FIXED_GAIN and _fixed_fits(profile, load, fixed_r, memory_bytes):
        plan = _fixed_plan(profile, load, fixed_r, serial_s)
        pair = f"r = {chosen[0].chunks} forward and {chosen[1].chunks} backward"
        notes.append(f"{pair} {promise}, {LEAVE_FIXED_GAIN} needed: stays with that{after}")
    else:
        notes.append(promise)
    reasons = [*(_why(profile, load, plan, max_chunks, backward=b) for b in (False, True)), *notes]
    if plan.forward_chunks * plan.backward_chunks > 1:
        reasons.append(f"promises {_over(serial_s, plan.predicted_s):.3f}x over no overlap")
    if profile.slowdowns:
        reasons.append("lanes slow one another: " + ", ".join(f"{k} {v:.2f}x" for k, v in profile.slowdowns.items()))
    return replace(plan, reasons=tuple(reasons))


def _time(profile: Profile, t: StageTimes, chunks: int, order: Order, lag: int) -> float:
    if profile.slowdowns and any(profile.slowdown(*pair) > 1 for pair in PAIRS):
        busy = max((e.t1_s for e in predict(profile, t, chunks, order=order, lag=lag)), default=0.0)
    elif order == "fifo":
        busy = float(layer_time(t, chunks))
    else:
        busy = float(makespan(t, intra_order(chunks, order, lag)))
    return profile.layer_s + busy


def _least(t: StageTimes, chunks: int) -> float:
    """No order of these chunks ends before its busiest lane: what lets the search stop early."""
    return max(2 * chunks * t.all_to_all + t.gradient, chunks * (t.gather + t.scatter), chunks * t.expert)


def _buffers(profile: Profile, load: LayerLoad, t: StageTimes, chunks: int, order: Order, lag: int) -> float:
    return peak_bytes(predict(profile, t, chunks, order=order, lag=lag), load, chunks)


def _search(
    profile: Profile, load: LayerLoad, max_chunks: int, memory_bytes: float | None
) -> tuple[tuple[Choice, Choice], list[str]]:
    def both(order: Order) -> tuple[Choice, Choice]:
        return best_pair(profile, load, order=order, max_chunks=max_chunks, memory_bytes=memory_bytes)

    chosen, why_not = both("fifo"), []
    if load.gather_bytes:
        ready = both("ready")
        promise = _over(_sum(chosen), _sum(ready))
        taken = promise >= READY_GAIN
        chosen, verb = (ready, "taken") if taken else (chosen, "not taken")
        why_not.append(f"ready order promises {promise:.3f}x over fifo, {READY_GAIN} needed: {verb}")
    return chosen, why_not


def _fixed_fits(profile: Profile, load: LayerLoad, chunks: int, memory_bytes: float | None) -> bool:
    if memory_bytes is None:
        return True
    times = (stage_times(profile, load, chunks, backward=b) for b in (False, True))
    return all(_buffers(profile, load, t, chunks, "fifo", 1) <= memory_bytes for t in times)


def _fixed_plan(profile: Profile, load: LayerLoad, chunks: int, serial_s: float) -> LayerPlan:
    forward, backward = fixed_time(profile, load, chunks)
    return LayerPlan(
        chunks,
        chunks,
        predicted_forward_s=forward,
        predicted_backward_s=backward,
        predicted_serial_s=serial_s,
    )


def _as_plan(chosen: tuple[Choice, Choice], load: LayerLoad, serial_s: float) -> LayerPlan:
    forward, backward = chosen
    return LayerPlan(
        forward.chunks,
        backward.chunks,
        order=forward.order,
        forward_lag=forward.lag,
        backward_lag=backward.lag,
        gradient_bytes=round(load.gradient_bytes),
        predicted_forward_s=forward.time_s,
        predicted_backward_s=backward.time_s,
        predicted_serial_s=serial_s,
    )


def _over(one_s: float, other_s: float) -> float:
    """Return how many times as long one takes as the other; two that take no time take the same."""
    return 1.0 if one_s == other_s else one_s / other_s if other_s else inf


def _sum(choices: tuple[Choice, Choice]) -> float:
    return choices[0].time_s + choices[1].time_s


def _why(profile: Profile, load: LayerLoad, plan: LayerPlan, max_chunks: int, *, backward: bool) -> str:
    r = plan.chunks(backward=backward)
    t = stage_times(profile, load, r, backward=backward, pieces=plan.pieces)
    took_s = plan.predicted_backward_s if backward else plan.predicted_forward_s
    terms = {
        "the inter-node link": 2 * r * t.all_to_all + t.gradient,
        "the intra-node link": r * (t.gather + t.scatter),
        "the experts": r * t.expert,
    }
    busy = max(terms, key=lambda name: terms[name])
    bound = lane_bound(profile, load, backward=backward, max_chunks=max_chunks)
    return (
        f"{'backward' if backward else 'forward'} r = {r}: {took_s * 1e3:.2f} ms, limited by {busy} "
        f"({terms[busy] * 1e3:.2f} ms busy; no plan is under {bound * 1e3:.2f})"
    )
