"""Bytes on each device over time, from the times of a schedule.

Counted: weights and their gradients (of streamed stages between UPLOAD, DOWNLOAD and FREE; otherwise all the time),
activations from a forward or recompute to the end of its backward, saved inputs of what will be recomputed, messages
from their making to their use, and the state of chunk groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.actions import COMPUTE, Op, Phase
from pipeline.costs import Costs
from pipeline.listing import Listing

Curve = tuple[tuple[float, float], ...]
Held = tuple[int, float, float | None, float]
"""Device, from when, until when (None: to the end), bytes."""

_FORWARD, _BACKWARD = (Op.F, Op.FB), (Op.B, Op.I, Op.FB)
"""What makes or takes a message, by its direction."""


def memory_curves(found: Listing, costs: Costs, start: Sequence[float], end: Sequence[float]) -> tuple[Curve, ...]:
    """Per device, (seconds, bytes from then on), with what ends at a moment gone before what begins then."""
    schedule = found.schedule
    changes: list[list[tuple[float, float]]] = [[(0.0, costs.kept_bytes)] for _ in range(schedule.num_devices)]
    for device in set(range(schedule.num_devices)) - found.streamed:
        changes[device].append((0.0, _resident_bytes(found, costs, device)))
    for i in range(len(found.actions)):
        for device, since, until, size in _held(found, costs, start, end, i):
            changes[device].append((since, size))
            if until is not None:
                changes[device].append((until, -size))
    return tuple(_curve(c) for c in changes)


def _curve(changes: list[tuple[float, float]]) -> Curve:
    curve: list[tuple[float, float]] = []
    level = 0.0
    for time, change in sorted(changes):
        level += change
        if curve and curve[-1][0] == time:
            curve[-1] = (time, level)
        else:
            curve.append((time, level))
    return tuple(curve)


def _resident_bytes(found: Listing, costs: Costs, device: int) -> float:
    """Weights of the layers that compute here, and gradients of those that are trained."""
    schedule = found.schedule
    here = {layer for a in schedule.of(device) if a.op in COMPUTE for layer in range(*schedule.layers(a))}
    one = {layer: costs.weights((layer, layer + 1)) for layer in here}
    return sum(size * (2 if layer >= schedule.first_trainable else 1) for layer, size in one.items())


def _held(
    found: Listing,
    costs: Costs,
    start: Sequence[float],
    end: Sequence[float],
    i: int,
) -> Iterator[Held]:
    action = found.actions[i]
    device, mb, layers = found.where[i][0], action.microbatch or 0, found.schedule.layers(action)
    match action.op:
        case Op.F | Op.R | Op.FB:
            yield device, start[i], _activations_end(found, end, i), _activations_held(found, costs, i)
            recompute = _next(found, i, Op.R) if action.op is Op.F else None
            if recompute is not None:
                yield device, end[i], start[recompute], costs.boundary(mb)
            units = found.schedule.units
            if action.op is Op.F and units is not None and units[mb].group is not None:
                first = mb - units[mb].index
                release = _of(found, device, action.stage, first, Op.FREE, Op.B)
                yield device, start[i], None if release is None else end[release], costs.state(mb, layers)
        case Op.SEND | Op.PUT:
            maker = found.own(i, *(_FORWARD if action.phase is Phase.F else _BACKWARD))
            assert maker is not None  # the graph has asked for it
            yield device, end[maker], end[i], costs.boundary(mb)
        case Op.RECV | Op.GET:
            ops = (*_FORWARD, Op.R) if action.phase is Phase.F else _BACKWARD
            users = [j for op in ops if (j := _next(found, i, op)) is not None]
            yield device, start[i], end[min(users)] if users else end[i], costs.boundary(mb)
        case Op.UPLOAD:
            free = _free_after(found, i)
            yield device, start[i], None if free is None else end[free], costs.weights(layers)
        case Op.DOWNLOAD if device in found.streamed:
            first = _first_backward(found, i)
            yield device, start[first], end[i], costs.weights(layers)


def _activations_held(found: Listing, costs: Costs, i: int) -> float:
    """A forward whose backward recomputes, or runs elsewhere, keeps none."""
    action = found.actions[i]
    used = action.op is not Op.F or (_next(found, i, Op.R) is None and _backward_of(found, i) is not None)
    return costs.activations(action.microbatch or 0, found.schedule.layers(action)) if used else 0.0


def _activations_end(found: Listing, end: Sequence[float], i: int) -> float:
    last = _backward_of(found, i) if found.actions[i].op is not Op.FB else i
    return end[last if last is not None else i]


def _backward_of(found: Listing, i: int) -> int | None:
    """The action after i that uses up its activations: its W, or else its B."""
    weight = _next(found, i, Op.W)
    return weight if weight is not None else _next(found, i, Op.B)


def _next(found: Listing, i: int, op: Op) -> int | None:
    action, device = found.actions[i], found.where[i][0]
    found_here = found.local.get((device, op, action.stage, action.microbatch), [])
    return next((j for j in found_here if j > i), None)


def _of(found: Listing, device: int, stage: int, microbatch: int, *ops: Op) -> int | None:
    return next((j for op in ops for j in found.local.get((device, op, stage, microbatch), [])), None)


def _free_after(found: Listing, i: int) -> int | None:
    frees = found.local.get((found.where[i][0], Op.FREE, found.actions[i].stage, None), [])
    return next((j for j in frees if j > i), None)


def _first_backward(found: Listing, i: int) -> int:
    """The first backward whose gradients DOWNLOAD i takes: after the DOWNLOAD before it, of the same stage."""
    action, (device, position) = found.actions[i], found.where[i]
    first = i
    for j in range(i - 1, i - position - 1, -1):
        other = found.actions[j]
        if other.stage == action.stage:
            if other.op is Op.DOWNLOAD:
                break
            if other.op in (Op.B, Op.I, Op.FB):
                first = j
    assert found.where[first][0] == device
    return first
