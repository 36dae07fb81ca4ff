"""Which optimizer step waits for which gradients, and which use of weights waits for which optimizer step.

Version v of a layer holds the gradients of the optimizer steps 0 to v - 1. `OPT` makes it; where a schedule has no OPT,
it exists once these gradients do. The host keeps staleness + 1 versions of a layer, so `OPT` to version v also waits
for the last use of version v - staleness - 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from pipeline.actions import COMPUTE, Op
from pipeline.listing import Listing

PerVersion = dict[tuple[int, int], list[int]]


def weight_edges(found: Listing) -> Iterator[tuple[int, int]]:
    """Pairs (i, j): action i waits for action j because of weights."""
    gradients, made, used = _by_version(found)
    schedule = found.schedule
    for (layer, version), makers in made.items():
        for i in makers:
            yield from ((i, j) for j in gradients.get((layer, version - 1), []))
            yield from ((i, j) for j in used.get((layer, version - schedule.staleness - 1), []))
    for (layer, version), users in used.items():
        makers = made.get((layer, version)) or gradients.get((layer, version - 1), [])
        yield from ((i, j) for i in users for j in makers)


def _by_version(found: Listing) -> tuple[PerVersion, PerVersion, PerVersion]:
    """(layer, step) to what hands its gradients over, (layer, version) to its OPT, and to what reads it."""
    schedule = found.schedule
    ops = {a.op for a in found.actions}
    hand_over = {Op.DOWNLOAD} if Op.DOWNLOAD in ops else {Op.B, Op.W, Op.FB}
    read = {Op.UPLOAD} if Op.UPLOAD in ops else COMPUTE
    gradients, made, used = defaultdict(list), defaultdict(list), defaultdict(list)
    for i, action in enumerate(found.actions):
        for layer in range(*schedule.layers(action)):
            if action.op in hand_over:
                gradients[layer, schedule.step(action.microbatch or 0)].append(i)
            if action.op is Op.OPT:
                made[layer, schedule.version(action)].append(i)
            if action.op in read:
                used[layer, schedule.version(action)].append(i)
    return gradients, made, used
