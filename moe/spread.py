"""How many bytes of dense gradients each MoE layer's backward hides: water-filling under the prefix constraint.

Only what exists can be sent: layer l of the backward pass may send what became ready before it and was not sent yet.
First the idle gaps fill, then the rest spreads to wherever it costs less than at the end. With one r a layer this is
greedy, for every cost is flat and then rises by one second a second. Here r changes with the gradients, which makes
the costs bend back; a dynamic programme over quanta is exact for that too, and as deterministic.
Source: FSMoE, arXiv 2501.10714, section 5, whose differential evolution it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moe.cost import LayerLoad, Profile, gradient_time
from moe.errors import PlanError
from moe.plan import LayerPlan
from moe.planner import best_choice, plan_layer

QUANTA = 48
"""Into how many parts all gradients are divided when nothing else is said."""


def spread(
    ready: Sequence[int], cost: Sequence[Callable[[int], float]], flush: Callable[[int], float], *, quantum: int
) -> list[int]:
    """Return the bytes each layer sends, in backward order, so that layers and the final flush together take least.

    `ready[l]` bytes appear between layer l - 1 and layer l; one more entry than layers holds what appears after the
    last, which only the flush can send. `cost[l](bytes)` and `flush(bytes)` are seconds. Multiples of `quantum`; ties
    go to the earlier layer. Raises PlanError when the lengths do not match or a number is negative.
    """
    if len(ready) != len(cost) + 1 or quantum < 1 or min(ready) < 0:
        raise PlanError(
            f"{len(ready)} amounts for {len(cost)} layers, quantum {quantum}: give one amount before each layer and "
            "one after the last, none negative"
        )
    total = sum(ready)
    limits = np.cumsum(ready[:-1]) // quantum
    width = int(limits[-1]) + 1 if len(limits) else 1
    best = np.full(width, np.inf)
    best[0] = 0.0
    came: list[np.ndarray] = []
    for limit, seconds in zip(limits, cost, strict=True):
        best, sent = _step(best, int(limit), np.array([seconds(q * quantum) for q in range(int(limit) + 1)]))
        came.append(sent)
    ends = best + np.array([flush(total - q * quantum) for q in range(width)])
    state = _first_least(ends, reverse=True)
    sent = []
    for choice in reversed(came):
        sent.append(int(choice[state]) * quantum)
        state -= int(choice[state])
    return sent[::-1]


def plan_model(
    profile: Profile, loads: Sequence[LayerLoad], ready: Sequence[int], *, quantum: int | None = None
) -> list[LayerPlan]:
    """Return one plan for each MoE layer, in backward order, with the gradients it drains.

    `loads` hold no gradients of their own; `ready` is as in `spread`.
    """
    if any(load.gradient_bytes for load in loads):
        raise PlanError("loads have gradient_bytes; here they follow from `ready`, so leave them 0")
    quantum = quantum or max(1, -(-sum(ready) // QUANTA))
    known: dict[tuple[LayerLoad, int], float] = {}

    def seconds(load: LayerLoad, sent: int) -> float:
        if (load, sent) not in known:
            known[load, sent] = best_choice(profile, replace(load, gradient_bytes=sent), backward=True).time_s
        return known[load, sent]

    costs = [lambda sent, load=load: seconds(load, sent) for load in loads]
    bare = replace(loads[0], gradient_bytes=0) if loads else None

    def flush(left: int) -> float:
        return gradient_time(profile, replace(bare, gradient_bytes=left)) if bare else 0.0

    sent = spread(ready, costs, flush, quantum=quantum)
    every = [replace(load, gradient_bytes=b) for load, b in zip(loads, sent, strict=True)]
    plans = {load: plan_layer(profile, load) for load in dict.fromkeys(every)}
    return [plans[load] for load in every]


def _step(best: np.ndarray, limit: int, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let one layer send 0..limit quanta; return the least time for each total sent, and what was sent for it."""
    after = np.full_like(best, np.inf)
    sent = np.zeros(len(best), dtype=int)
    for total in range(limit + 1):
        options = best[total - np.arange(total + 1)] + cost[: total + 1]
        # The fewest here is the most before: earlier layers win ties.
        choice = _first_least(options)
        after[total], sent[total] = options[choice], choice
    return after, sent


def _first_least(values: np.ndarray, *, reverse: bool = False) -> int:
    """Return the first (or last) index within rounding of the least value."""
    close = np.flatnonzero(values <= values.min() * (1 + 1e-12))
    return int(close[-1] if reverse else close[0])
